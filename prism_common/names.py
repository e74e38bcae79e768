"""Names and ids: how they are made, and what is accepted."""

import os
import re
import threading

from prism_common import limits
from prism_common.errors import InvalidArgumentError

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_ENV_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_ADJECTIVES = (
    "amber", "bold", "brave", "bright", "calm", "clever", "cosmic", "crimson", "daring", "eager",
    "gentle", "golden", "happy", "jolly", "keen", "lively", "lucid", "mellow", "nimble", "noble",
    "polar", "proud", "quick", "quiet", "rapid", "silent", "silver", "solar", "steady", "swift",
    "vivid", "wise",
)  # fmt: skip
_NOUNS = (
    "badger", "beacon", "bison", "cedar", "comet", "condor", "coral", "crane", "dragon", "eagle",
    "falcon", "fern", "fox", "glacier", "harbor", "heron", "ibis", "lynx", "maple", "meteor",
    "orca", "otter", "panda", "phoenix", "prairie", "raven", "river", "sparrow", "summit", "tiger",
    "walrus", "willow",
)  # fmt: skip


class _Randomness:
    """The system's random bytes, fetched many at a time: a burst asks for 30 a sandbox."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = b""
        self._used = 0

    def take(self, count: int) -> bytes:
        """Return so many bytes, of at most a few tens, that nobody else gets."""
        with self._lock:
            begin, end = self._used, self._used + count
            if end > len(self._bytes):
                self._bytes = os.urandom(_FETCHED_BYTES)
                begin, end = 0, count
            self._used = end
            return self._bytes[begin:end]


_FETCHED_BYTES = 4096
_random = _Randomness()


def generate_name(random_bytes: int = 4) -> str:
    """Return a readable random name such as cosmic-dragon-3f2a91c7; with 0 bytes cosmic-dragon."""
    first, second, *rest = _random.take(2 + random_bytes)
    name = f"{_ADJECTIVES[first % len(_ADJECTIVES)]}-{_NOUNS[second % len(_NOUNS)]}"
    return f"{name}-{bytes(rest).hex()}" if random_bytes else name


def generate_id(prefix: str) -> str:
    """Return a random id with 80 bits: `prefix`, a dash, 20 hexadecimal digits."""
    return f"{prefix}-{_random.take(10).hex()}"


def shorten(value: str, length_max: int = 80) -> str:
    """Return `value` for an error message: quoted, and cut where it is long."""
    if len(value) > length_max:
        return f"{value[:length_max]!r}… ({len(value)} characters)"
    return repr(value)


def validate_name(value: str, field: str) -> str:
    """Return `value` if it is an RFC 1123 label, else raise InvalidArgumentError."""
    if len(value) > limits.NAME_LENGTH_MAX or not _NAME.fullmatch(value):
        raise InvalidArgumentError(
            f"{field}: {shorten(value)} is not a name: use 1 to {limits.NAME_LENGTH_MAX} of a-z, "
            "0-9 and '-', beginning and ending with a letter or digit",
            field=field,
        )
    return value


def validate_request_id(value: str, field: str = "request_id") -> str:
    """Return `value` if it is 1 to 128 printable ASCII characters without space."""
    if len(value) > limits.REQUEST_ID_LENGTH_MAX or not _PRINTABLE.fullmatch(value):
        raise InvalidArgumentError(
            f"{field}: {shorten(value)} is not a request id: use 1 to "
            f"{limits.REQUEST_ID_LENGTH_MAX} printable characters; a UUIDv4 is usual",
            field=field,
        )
    return value


def validate_labels(labels: dict[str, str], field: str) -> dict[str, str]:
    """Return `labels` if keys and values are as in Kubernetes and at most 64."""
    if len(labels) > limits.LABELS_MAX:
        raise InvalidArgumentError(
            f"{field}: {len(labels)} labels; at most {limits.LABELS_MAX}", field=field
        )
    for key, value in labels.items():
        prefix, slash, name = key.rpartition("/")
        if not _LABEL_NAME.fullmatch(name) or (slash and not _LABEL_PREFIX.fullmatch(prefix)):
            raise InvalidArgumentError(
                f"{field}: {shorten(key)} is not a label key: use [prefix/]name, the name 1 to 63 "
                "of A-Z, a-z, 0-9, '-', '_' and '.'",
                field=field,
            )
        if value and not _LABEL_NAME.fullmatch(value):
            raise InvalidArgumentError(
                f"{field}[{key}]: {shorten(value)} is not a label value: use at most 63 of A-Z, "
                "a-z, 0-9, '-', '_' and '.'",
                field=field,
            )
    return labels


def validate_env(env: dict[str, str], field: str) -> dict[str, str]:
    """Return `env` if each name is a C identifier, no value holds NUL, and all fit in 64 KiB."""
    if len(env) > limits.ENV_ENTRIES_MAX:
        raise InvalidArgumentError(
            f"{field}: {len(env)} variables; at most {limits.ENV_ENTRIES_MAX}", field=field
        )
    for key, value in env.items():
        if not _ENV_KEY.fullmatch(key):
            raise InvalidArgumentError(
                f"{field}: {shorten(key)} is not a variable's name: use letters, digits and '_'",
                field=field,
            )
        if "\0" in value:
            raise InvalidArgumentError(
                f"{field}[{shorten(key)}]: holds a NUL character", field=field
            )
    size = sum(len(key.encode()) + len(value.encode()) + 2 for key, value in env.items())
    if size > limits.ENV_BYTES_MAX:
        raise InvalidArgumentError(
            f"{field}: {size} bytes; at most {limits.ENV_BYTES_MAX}", field=field
        )
    return env
