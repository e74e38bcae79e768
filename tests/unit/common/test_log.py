import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_common import log
from prism_common.errors import StartupError


@pytest.fixture(autouse=True)
def root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    yield root
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before


def test_json_is_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.configure("info", "json", str(path))
    logger = logging.getLogger("demo")
    logger.debug("unseen")
    logger.info("two\nlines é", extra={"sandbox": "sb-1"})
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("failed")
    first, second = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    assert (first["message"], first["sandbox"], first["level"]) == ("two\nlines é", "sb-1", "info")
    assert "ValueError: boom" in second["exception"]


def test_console_shows_facts(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("warning", "console", None)
    logging.getLogger("demo").warning("slow", extra={"took_s": 3})
    line = capsys.readouterr().err
    assert "WARNING demo: slow took_s=3" in line


def test_grpc_does_not_complain_of_what_this_process_cancelled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.configure("info", "console", None)
    logger = logging.getLogger("grpc._cython.cygrpc")
    for error in (asyncio.CancelledError(), ValueError("real")):
        logger.error("Unexpected", exc_info=error)
    shown = capsys.readouterr().err
    assert "CancelledError" not in shown
    assert "ValueError: real" in shown


def test_a_file_that_cannot_be_written_names_the_flag() -> None:
    with pytest.raises(StartupError, match="--log-file"):
        log.configure("info", "console", "/no/such/directory/log")
