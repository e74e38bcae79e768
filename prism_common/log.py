"""Logging: one line a record, for people (console) or for programs (json)."""

import asyncio
import json
import logging
import logging.handlers
import sys
from datetime import UTC, datetime
from typing import Final, Literal

from prism_common.errors import StartupError

Format = Literal["console", "json"]
LEVELS: Final = ("debug", "info", "warning", "error")
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Console(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "milliseconds")
        line = f"{time} {record.levelname:<7} {record.name}: {record.getMessage()}"
        facts = " ".join(f"{key}={value}" for key, value in _facts(record).items())
        line = f"{line} {facts}" if facts else line
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


def _is_cancellation(record: logging.LogRecord) -> bool:
    """Whether gRPC complains of a call that this process itself cancelled while stopping."""
    return bool(record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def configure(level: str, log_format: Format, file: str | None) -> None:
    """Send all records at or above `level` to standard error, or to `file` (10 MiB, 3 kept).

    Raises:
        StartupError: The file cannot be written.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if file:
        try:
            handler = logging.handlers.RotatingFileHandler(
                file, maxBytes=10 * 2**20, backupCount=3, encoding="utf-8"
            )
        except OSError as error:
            raise StartupError(f"--log-file: {file}: {error.strerror}") from None
    handler.setFormatter(_Json() if log_format == "json" else _Console())
    logging.getLogger("grpc._cython.cygrpc").addFilter(lambda record: not _is_cancellation(record))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
