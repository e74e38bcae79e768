"""What a figure depends on: the machine, the versions, the disk, and what else runs."""

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Final

from prism_common import __version__

_SYNCS: Final = 50
_BLOCK: Final = b"x" * 4096


def fsync_p50_ms(directory: Path) -> float:
    """Return the median time that fdatasync of 4 KiB takes in a directory."""
    took: list[float] = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(_SYNCS):
            file.write(_BLOCK)
            file.flush()
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - started)
    return statistics.median(took) * 1e3


def describe() -> dict[str, str]:
    """Return what to print above the figures. It is the load's machine; nodes may be others."""
    import grpc

    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "versions": f"prism {__version__}, Python {platform.python_version()}, "
        f"grpc {grpc.__version__}",
        "fsync p50": f"{fsync_p50_ms(Path(tempfile.gettempdir())):.2f} ms",
        "load average": f"{os.getloadavg()[0]:.2f}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
