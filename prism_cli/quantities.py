"""Quantities as people write them: `500m`, `256Mi`, `1h30m`. Bad ones are usage errors."""

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Final

import typer

from prism_common.limits import CPU_MILLICORES_MAX
from prism_common.names import shorten

_BYTE_UNITS: Final = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate(("K", "M", "G", "T"), 1)},
    "k": 1000,
    **{unit: 1024**power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)},
}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)([kKMGT]i?)?B?", re.ASCII)
_DURATION_UNITS: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(
    r"(?:(?P<d>\d+)d)?(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?"
    r"(?:(?P<s>\d+(?:\.\d+)?)s)?(?:(?P<ms>\d+)ms)?",
    re.ASCII,
)
#: What a protobuf int64 holds; the server knows the real limits and names them.
_INT64_MAX: Final = 2**63 - 1
#: A hundred years: past it a number is a typing error, and dates overflow.
_DURATION_S_MAX: Final = 100 * 366 * 86400.0


def parse_cpu(text: str) -> int:
    """Return millicores: `500m` is half a core, `2` and `0.5` count cores."""
    number, scale = (text[:-1], 1) if text.endswith("m") else (text, 1000)
    try:
        millicores = Decimal(number) * scale if number.strip() == number else Decimal("NaN")
    except InvalidOperation:
        millicores = Decimal("NaN")
    if not millicores.is_finite():
        raise typer.BadParameter(
            f"{shorten(text)} is not an amount of CPU; write cores, such as 2 or 0.5, "
            "or thousandths, such as 500m"
        )
    if not 1 <= millicores <= CPU_MILLICORES_MAX:
        raise typer.BadParameter(
            f"{shorten(text)} is out of range: 1m to {CPU_MILLICORES_MAX // 1000}"
        )
    if millicores % 1:
        raise typer.BadParameter(f"{shorten(text)} is finer than a thousandth of a core (1m)")
    return int(millicores)


def parse_bytes(text: str) -> int:
    """Return bytes: `256Mi` and `1Gi` are powers of 1024, `256M` and `1G` of 1000."""
    match = _BYTES.fullmatch(text)
    if match is None:
        raise typer.BadParameter(
            f"{shorten(text)} is not a size; write a number with Ki, Mi, Gi or Ti, such as 256Mi"
        )
    size = int(Decimal(match[1]) * _BYTE_UNITS[match[2] or ""])
    if not 1 <= size <= _INT64_MAX:
        raise typer.BadParameter(f"{shorten(text)} is out of range: above 0, below 8Ei")
    return size


def parse_duration(text: str) -> float:
    """Return seconds: `1h30m`, `90s`, `500ms`; a bare number counts seconds."""
    match = _DURATION.fullmatch(text)
    if match is not None and text:
        parts = match.groupdict().items()
        seconds = sum(float(value) * _DURATION_UNITS[unit] for unit, value in parts if value)
    elif re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        seconds = float(text)
    else:
        raise typer.BadParameter(
            f"{shorten(text)} is not a time; write it with d, h, m, s or ms, such as 1h30m or 90s"
        )
    if seconds > _DURATION_S_MAX:
        raise typer.BadParameter(f"{shorten(text)} is out of range: at most a hundred years")
    return seconds


def parse_positive_duration(text: str) -> float:
    """Return seconds above 0."""
    seconds = parse_duration(text)
    if seconds <= 0:
        raise typer.BadParameter(f"{shorten(text)} must be above 0")
    return seconds


def parse_since(text: str) -> datetime:
    """Return a moment: a time ago (`10m`), or RFC 3339 (`2025-01-31T12:00:00Z`)."""
    if re.match(r"\d{4}-\d", text, re.ASCII):
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise typer.BadParameter(
                f"{shorten(text)} is not a moment; write it as 2025-01-31T12:00:00Z"
            ) from None
        return moment if moment.tzinfo else moment.astimezone()
    return datetime.now(UTC) - timedelta(seconds=parse_duration(text))


def parse_pairs(texts: list[str] | None, flag: str, example: str) -> dict[str, str]:
    """Return the mapping that several KEY=VALUE make."""
    pairs: dict[str, str] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(
                f"{shorten(text)} is not KEY=VALUE; write it as {example}", param_hint=f"'{flag}'"
            )
        if key in pairs and pairs[key] != value:
            raise typer.BadParameter(
                f"{shorten(key)} is given twice with different values", param_hint=f"'{flag}'"
            )
        pairs[key] = value
    return pairs


def parse_selector(texts: list[str] | None) -> dict[str, str]:
    """Return the labels that several KEY=VALUE[,KEY=VALUE…] ask for."""
    parts = [part for text in texts or () for part in text.split(",")]
    return parse_pairs(parts, "--selector", "team=search,env=test")


def format_cpu(millicores: int) -> str:
    """Return `500m`, `2` or `1.5`, as parse_cpu reads it."""
    if millicores % 1000 == 0:
        return str(millicores // 1000)
    return f"{millicores}m" if millicores < 1000 else f"{millicores / 1000:g}"


def format_bytes(size: int) -> str:
    """Return `256Mi` or `1.5Gi`, to three digits."""
    amount = float(size)
    for unit in ("", "Ki", "Mi", "Gi", "Ti"):
        if amount < 1024 or unit == "Ti":
            return (
                f"{amount:.0f}{unit}" if amount >= 100 or amount % 1 == 0 else f"{amount:.1f}{unit}"
            )
        amount /= 1024
    return str(size)


def format_duration(seconds: float) -> str:
    """Return `1h30m` or `12s`: the two largest units."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms" if seconds > 0 else "0s"
    left, parts = int(seconds), []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2])
