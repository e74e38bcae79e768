"""What a caller is told of each failure, and what it makes of it."""

import inspect

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from prism_common import errors, status

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.PrismError) and kind is not errors.NotServedError
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_failure_survives_the_trip_with_all_that_it_says(
    kind: type[errors.PrismError],
) -> None:
    error = kind("what is wrong", field="spec.env", retry_after_s=1.25, metadata={"leader": "h:1"})
    remote = status.RemoteError(status.to_status(error))
    assert remote.message == "what is wrong"
    assert remote.code == kind.reason
    assert remote.retry_after_s == 1.25
    assert remote.metadata == {"leader": "h:1"}
    assert remote.status_code == status.code_of(error)
    assert remote.field == ("spec.env" if issubclass(kind, errors.InvalidArgumentError) else "")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_has_a_status_of_its_own_or_its_parents(kind: type[errors.PrismError]) -> None:
    code = status.code_of(kind("x"))
    assert (code == grpc.StatusCode.INTERNAL) == (kind is errors.PrismError)


def test_reasons_are_stable_and_unique() -> None:
    assert len({kind.reason for kind in CLASSES}) == len(CLASSES)


def test_a_reason_may_be_more_exact_than_the_class() -> None:
    error = errors.WrongStateError("x", reason="CLUSTER_MISMATCH")
    assert status.RemoteError(status.to_status(error)).code == "CLUSTER_MISMATCH"


def test_without_retry_info_there_is_no_retry() -> None:
    assert status.RemoteError(status.to_status(errors.NotFoundError("x"))).retry_after_s is None


def test_a_remote_failure_is_passed_on_as_it_came() -> None:
    came = status.to_status(errors.QueueFullError("full", retry_after_s=2))
    came.details.append(any_pb2.Any(type_url="type.googleapis.com/unknown.Thing", value=b"\x01"))
    assert status.status_of(status.RemoteError(came)) == came


def test_a_long_message_is_cut_so_that_the_trailers_fit() -> None:
    error = errors.InvalidArgumentError("é" * 1_000_000, field="f")
    packed = status.to_status(error)
    assert packed.message.endswith("…")
    assert packed.ByteSize() < 8000


def _failed_call(
    trailers: list[tuple[str, str | bytes]], code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details="Socket closed"
    )


def test_details_are_read_from_the_trailers() -> None:
    packed = status.to_status(errors.NoLeaderError("no leader", retry_after_s=1))
    error = status.from_rpc_error(_failed_call([(status.DETAILS_KEY, packed.SerializeToString())]))
    assert (error.code, error.retry_after_s) == ("NO_LEADER", 1)


@pytest.mark.parametrize("trailers", [[], [(status.DETAILS_KEY, b"\xff\xff\xff")]])
def test_a_failure_of_the_connection_is_named_by_its_status(
    trailers: list[tuple[str, str | bytes]],
) -> None:
    error = status.from_rpc_error(_failed_call(trailers))
    assert (error.code, error.message) == ("UNAVAILABLE", "Socket closed")


def test_a_status_of_a_number_that_is_none_is_unknown() -> None:
    assert status.code_named(4711) is grpc.StatusCode.UNKNOWN
    assert status.RemoteError(status_pb2.Status(code=4711)).code == "UNKNOWN"


def test_the_field_stands_in_bad_request() -> None:
    packed = status.to_status(errors.InvalidArgumentError("bad", field="name"))
    bad = error_details_pb2.BadRequest()
    assert [detail.Unpack(bad) for detail in packed.details if detail.Is(bad.DESCRIPTOR)] == [True]
    assert [(v.field, v.description) for v in bad.field_violations] == [("name", "bad")]
