"""PrismError ⇄ gRPC status: one table, and the details of AIP-193."""

import contextlib
from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from prism_common import errors

DOMAIN: Final = "prism"
DETAILS_KEY: Final = "grpc-status-details-bin"
#: The same in initial metadata, ahead of the status: gRPC loses that where a client still sends.
FAILURE_KEY: Final = "prism-failure-bin"
#: gRPC drops a reply whose trailers pass 8 KiB; the message stands there up to three times.
_MESSAGE_LENGTH_MAX: Final = 1000

#: The most specific class wins.
STATUS_OF: Final[dict[type[errors.PrismError], grpc.StatusCode]] = {
    errors.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.AmbiguousError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WrongStateError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UpgradeNeededError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NoCapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.TooManyCallsError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DiskFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotLeaderError: grpc.StatusCode.UNAVAILABLE,
    errors.NoLeaderError: grpc.StatusCode.UNAVAILABLE,
    errors.OutcomeUnknownError: grpc.StatusCode.UNAVAILABLE,
    errors.StoppingError: grpc.StatusCode.UNAVAILABLE,
    errors.NodeUnreachableError: grpc.StatusCode.UNAVAILABLE,
    errors.SandboxGoneError: grpc.StatusCode.UNAVAILABLE,
    errors.CompactedError: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotServedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.StartupError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PrismError: grpc.StatusCode.INTERNAL,
}
_CODE_OF_VALUE: Final = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: errors.PrismError) -> grpc.StatusCode:
    """Return the gRPC status of an expected failure."""
    for kind in type(error).__mro__:
        code = STATUS_OF.get(kind)
        if code is not None:
            return code
    return grpc.StatusCode.INTERNAL


def code_named(value: int) -> grpc.StatusCode:
    """Return the status code with this number; UNKNOWN if there is none."""
    return _CODE_OF_VALUE.get(value, grpc.StatusCode.UNKNOWN)


def to_status(error: errors.PrismError) -> status_pb2.Status:
    """Return google.rpc.Status with ErrorInfo, and BadRequest and RetryInfo where they fit."""
    message = error.message
    if len(message) > _MESSAGE_LENGTH_MAX:
        message = message[:_MESSAGE_LENGTH_MAX] + "…"
    status = status_pb2.Status(code=code_of(error).value[0], message=message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN, metadata=error.metadata)
    )
    if isinstance(error, errors.InvalidArgumentError) and error.field:
        status.details.add().Pack(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=error.field, description=message, reason=error.code
                    )
                ]
            )
        )
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


class RemoteError(errors.PrismError):
    """A failure that another process reported, with its status, kept as it came."""

    def __init__(self, status: status_pb2.Status) -> None:
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        bad = error_details_pb2.BadRequest()
        retry_after_s: float | None = None
        for detail in status.details:
            if detail.Is(info.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(retry.DESCRIPTOR):
                detail.Unpack(retry)
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
            elif detail.Is(bad.DESCRIPTOR):
                detail.Unpack(bad)
        super().__init__(
            status.message,
            field=bad.field_violations[0].field if bad.field_violations else "",
            retry_after_s=retry_after_s,
            reason=info.reason or code_named(status.code).name,
            metadata=dict(info.metadata),
        )
        self.status = status

    @property
    def status_code(self) -> grpc.StatusCode:
        """The status code that the other process gave."""
        return code_named(self.status.code)


def from_rpc_error(error: grpc.RpcError) -> RemoteError:
    """Read a failed call's status and details.

    `grpc_status.rpc_status.from_call` fails on AioRpcError, so the trailing metadata is read here.
    """
    call: Any = error
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            status = status_pb2.Status()
            with contextlib.suppress(DecodeError):  # from something that is not ours
                status.ParseFromString(value)
                return RemoteError(status)
    return RemoteError(status_pb2.Status(code=call.code().value[0], message=call.details() or ""))


def failure_metadata(error: errors.PrismError) -> tuple[tuple[str, bytes], ...]:
    """Return initial metadata that tells a client that still sends why its call will fail."""
    return ((FAILURE_KEY, status_of(error).SerializeToString()),)


def failure_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> RemoteError | None:
    """Return the failure that a call's initial metadata tells of; None: none."""
    for key, value in metadata or ():
        if key == FAILURE_KEY and isinstance(value, bytes):
            status = status_pb2.Status()
            with contextlib.suppress(DecodeError):
                status.ParseFromString(value)
                return RemoteError(status)
    return None


def status_of(error: errors.PrismError) -> status_pb2.Status:
    """Return what to tell a caller: a remote failure as it came, else the table's status."""
    return error.status if isinstance(error, RemoteError) else to_status(error)
