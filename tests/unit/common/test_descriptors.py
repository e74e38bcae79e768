"""A daemon may have as many files open as the machine allows it."""

import subprocess
import sys

_PROGRAM = """
import resource, click
from prism_common import settings
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 300))
@click.command()
def daemon():
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
settings.run(daemon, [])
"""


def test_a_daemon_raises_its_limit_to_the_most_that_it_may_have() -> None:
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["300", "300"]
