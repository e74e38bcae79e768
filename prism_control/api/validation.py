"""Requests to specs: defaults filled in, and every bound checked before anything is proposed."""

import functools
import hashlib
import time
from typing import Final

from google.protobuf import duration_pb2
from google.protobuf.message import Message
from prism.sandbox.v1 import sandbox_pb2

from prism_common import limits, names
from prism_common.errors import InvalidArgumentError
from prism_control.api.egress import egress_of
from prism_control.state.model import OnNodeLoss, Spec, pairs

#: The images that this version serves.
_IMAGES: Final = ("host",)
_RUNTIMES: Final = ("", "bubblewrap", "gvisor", "fake")
#: Specs that are remembered; each may be 64 KiB of environment.
_SPECS_MAX: Final = 64
#: A prefix of an id or name that may be looked up.
_REFERENCE_LENGTH_MAX: Final = 128


def fingerprint(request: Message, *ignored: str) -> bytes:
    """Return a digest of a request's contents, without its request id and the `ignored` fields."""
    # Taken out and put back: a copy costs more than all the rest.
    taken = [(field, getattr(request, field)) for field in ("request_id", *ignored)]
    for field, _ in taken:
        request.ClearField(field)
    encoded = request.SerializeToString(deterministic=True)
    for field, value in taken:
        setattr(request, field, value)
    return hashlib.sha256(encoded).digest()[:16]


def fingerprint_of_create(request: sandbox_pb2.CreateSandboxRequest) -> bytes:
    """Return the fingerprint of a create whose spec was read; what it waits for is not part of it.

    Most have a spec that others have too, and nothing else.
    """
    if request.name or not request.HasField("spec"):
        return fingerprint(request, "wait_until")
    return _spec_of(request.spec.SerializeToString(deterministic=True))[1]


def reference(value: str, field: str) -> str:
    """Return an id, name or prefix as given, if it can be one.

    Raises:
        InvalidArgumentError: It is empty or too long.
    """
    if not value:
        raise InvalidArgumentError(f"{field}: give an id or a name", field=field)
    if len(value) > _REFERENCE_LENGTH_MAX:
        raise InvalidArgumentError(
            f"{field}: {names.shorten(value)} is longer than any id or name", field=field
        )
    return value


def request_id(value: str) -> str:
    """Return the caller's request id, or a new one where it gave none."""
    return names.validate_request_id(value) if value else names.generate_id("req")


def page_size(value: int) -> int:
    """Return how many results a page holds."""
    if value < 0 or value > limits.PAGE_SIZE_MAX:
        raise InvalidArgumentError(
            f"page_size: {value} is not 0 to {limits.PAGE_SIZE_MAX}", field="page_size"
        )
    return value or limits.PAGE_SIZE_DEFAULT


def duration_ms(
    duration: duration_pb2.Duration | None, field: str, default_s: float, max_s: float
) -> int:
    """Return a duration in milliseconds; the default where it is absent.

    Raises:
        InvalidArgumentError: It is negative, or longer than `max_s`.
    """
    if duration is None:
        return int(default_s * 1000)
    nanoseconds = duration.seconds * 10**9 + duration.nanos
    if nanoseconds < 0 or nanoseconds > max_s * 10**9:
        raise InvalidArgumentError(
            f"{field}: {nanoseconds / 1e9:g} s is not 0 to {max_s:g} s", field=field
        )
    return nanoseconds // 10**6


def expire_ms(request: sandbox_pb2.UpdateSandboxRequest) -> int:
    """Return the new end of life in milliseconds since 1970; 0: it stays as it is.

    Raises:
        InvalidArgumentError: It is before 1970, or beyond any time to live from now.
    """
    if not request.HasField("expire_time"):
        return 0
    latest_s = time.time() + limits.TTL_S_MAX
    if not 0 < request.expire_time.seconds <= latest_s:
        raise InvalidArgumentError(
            f"expire_time: {request.expire_time.seconds} s since 1970 is not within "
            f"{limits.TTL_S_MAX} s from now",
            field="expire_time",
        )
    return request.expire_time.seconds * 1000 + request.expire_time.nanos // 10**6


def new_limits(asked: sandbox_pb2.Limits) -> dict[str, int]:
    """Return the limits to change, by name; 0: it stays as it is.

    Raises:
        InvalidArgumentError: One is out of its range, or cannot change.
    """
    if asked.open_files_max:
        raise InvalidArgumentError(
            "limits.open_files_max: cannot change: every process has it from its start",
            field="limits.open_files_max",
        )
    if asked.output_bytes_per_second:
        raise InvalidArgumentError(
            "limits.output_bytes_per_second: cannot change: it is given when a sandbox is created",
            field="limits.output_bytes_per_second",
        )
    return {
        name: _amount(name, getattr(asked, name), 0, least, most, "limits.")
        for name, (least, most) in _RANGES.items()
        if name not in ("open_files_max", "output_bytes_per_second")
    }


def spec_of(proto: sandbox_pb2.SandboxSpec) -> Spec:
    """Return what to store of a request's spec.

    Raises:
        InvalidArgumentError: A field is out of its range; it names field and range.
    """
    return _spec_of(proto.SerializeToString(deterministic=True))[0]


@functools.lru_cache(maxsize=_SPECS_MAX)
def _spec_of(data: bytes) -> tuple[Spec, bytes]:
    """Read a spec; return it, and the fingerprint of a create that has nothing but it.

    Most are equal, and each is read twice: when it is checked and when it is proposed.
    """
    proto = sandbox_pb2.SandboxSpec.FromString(data)
    return _read_spec(proto), fingerprint(sandbox_pb2.CreateSandboxRequest(spec=proto))


def _read_spec(proto: sandbox_pb2.SandboxSpec) -> Spec:
    image = proto.image or "host"
    if image not in _IMAGES:
        raise InvalidArgumentError(
            f"spec.image: {names.shorten(image)} is not served; this version has: "
            f"{', '.join(_IMAGES)}",
            field="spec.image",
        )
    if proto.runtime not in _RUNTIMES:
        raise InvalidArgumentError(
            f"spec.runtime: {names.shorten(proto.runtime)} is not one of "
            f"{', '.join(_RUNTIMES[1:])}",
            field="spec.runtime",
        )
    if abs(proto.priority) > limits.PRIORITY_MAX:
        raise InvalidArgumentError(
            f"spec.priority: {proto.priority} is not -{limits.PRIORITY_MAX} to "
            f"{limits.PRIORITY_MAX}",
            field="spec.priority",
        )
    known_loss = sandbox_pb2.OnNodeLoss.values()
    if proto.on_node_loss not in known_loss:
        raise InvalidArgumentError(
            f"spec.on_node_loss: {proto.on_node_loss} is not one of {known_loss}",
            field="spec.on_node_loss",
        )
    asked = proto.limits
    return Spec(
        image=image,
        cpu_millicores=_limit("cpu_millicores", asked, limits.CPU_MILLICORES_DEFAULT),
        memory_bytes=_limit("memory_bytes", asked, limits.MEMORY_BYTES_DEFAULT),
        disk_bytes=_limit("disk_bytes", asked, limits.DISK_BYTES_DEFAULT),
        processes_max=_limit("processes_max", asked, limits.PROCESSES_DEFAULT),
        open_files_max=_limit("open_files_max", asked, limits.OPEN_FILES_DEFAULT),
        env=pairs(names.validate_env(dict(proto.env), "spec.env")),
        labels=pairs(names.validate_labels(dict(proto.labels), "spec.labels")),
        ttl_ms=_lifetime_ms(proto.ttl if proto.HasField("ttl") else None, "spec.ttl"),
        idle_timeout_ms=_lifetime_ms(
            proto.idle_timeout if proto.HasField("idle_timeout") else None, "spec.idle_timeout"
        ),
        runtime=proto.runtime,
        on_node_loss=OnNodeLoss(proto.on_node_loss or OnNodeLoss.LOST),
        priority=proto.priority,
        node_selector=pairs(
            names.validate_labels(dict(proto.node_selector), "spec.node_selector")
        ),
        output_bytes_per_second=_limit("output_bytes_per_second", asked, 0),
        egress=egress_of(proto.network, "spec.network"),
    )  # fmt: skip


#: Least and most of each limit.
_RANGES: Final = {
    "cpu_millicores": (1, limits.CPU_MILLICORES_MAX),
    "memory_bytes": (limits.MEMORY_BYTES_MIN, limits.MEMORY_BYTES_MAX),
    "disk_bytes": (limits.DISK_BYTES_MIN, limits.DISK_BYTES_MAX),
    "processes_max": (2, limits.PROCESSES_MAX),
    "open_files_max": (16, limits.OPEN_FILES_MAX),
    "output_bytes_per_second": (
        limits.OUTPUT_BYTES_PER_SECOND_MIN, limits.OUTPUT_BYTES_PER_SECOND_MAX
    ),
}  # fmt: skip


def _limit(name: str, asked: sandbox_pb2.Limits, default: int) -> int:
    return _amount(name, getattr(asked, name), default, *_RANGES[name], "spec.limits.")


def _amount(name: str, value: int, default: int, least: int, most: int, within: str) -> int:
    if value == 0:
        return default
    if not least <= value <= most:
        field = f"{within}{name}"
        raise InvalidArgumentError(f"{field}: {value} is not {least} to {most}", field=field)
    return value


def _lifetime_ms(duration: duration_pb2.Duration | None, field: str) -> int:
    if duration is None:
        return 0
    value = duration_ms(duration, field, 0, limits.TTL_S_MAX)
    if value == 0:
        raise InvalidArgumentError(
            f"{field}: must be longer than a millisecond; leave it out for none", field=field
        )
    return value
