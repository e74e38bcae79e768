"""Every bound of a request, refused by its field before anything is proposed."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import duration_pb2
from hypothesis import given
from hypothesis import strategies as st
from prism.sandbox.v1 import sandbox_pb2

from prism_common import limits
from prism_common.errors import InvalidArgumentError
from prism_common.status import RemoteError, to_status
from prism_control.api import listing, nodes, validation

Spec = sandbox_pb2.SandboxSpec


def limit(**amounts: int) -> Spec:
    return Spec(limits=sandbox_pb2.Limits(**amounts))


def seconds(value: int, nanos: int = 0) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=value, nanos=nanos)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (Spec(image="ubuntu"), "spec.image"),
        (Spec(image="x" * 1_048_576), "spec.image"),
        (Spec(runtime="docker"), "spec.runtime"),
        (Spec(priority=1001), "spec.priority"),
        (Spec(priority=-1001), "spec.priority"),
        (Spec(on_node_loss=9), "spec.on_node_loss"),  # type: ignore[arg-type]
        (limit(cpu_millicores=-1), "spec.limits.cpu_millicores"),
        (limit(cpu_millicores=limits.CPU_MILLICORES_MAX + 1), "spec.limits.cpu_millicores"),
        (limit(memory_bytes=1), "spec.limits.memory_bytes"),
        (limit(memory_bytes=-(2**63)), "spec.limits.memory_bytes"),
        (limit(memory_bytes=2**63 - 1), "spec.limits.memory_bytes"),
        (limit(disk_bytes=limits.DISK_BYTES_MIN - 1), "spec.limits.disk_bytes"),
        (limit(processes_max=1), "spec.limits.processes_max"),
        (limit(processes_max=limits.PROCESSES_MAX + 1), "spec.limits.processes_max"),
        (limit(open_files_max=15), "spec.limits.open_files_max"),
        (limit(open_files_max=-5), "spec.limits.open_files_max"),
        (limit(output_bytes_per_second=1023), "spec.limits.output_bytes_per_second"),
        (limit(output_bytes_per_second=2**35), "spec.limits.output_bytes_per_second"),
        (Spec(env={"A=B": "x"}), "spec.env"),
        (Spec(env={"A": "\0"}), "spec.env"),
        (Spec(env={"A": "x" * limits.ENV_BYTES_MAX}), "spec.env"),
        (Spec(labels={"-": "x"}), "spec.labels"),
        (Spec(labels={f"k{i}": "" for i in range(65)}), "spec.labels"),
        (Spec(node_selector={"a": "b c"}), "spec.node_selector"),
        (Spec(ttl=seconds(-1)), "spec.ttl"),
        (Spec(ttl=seconds(0)), "spec.ttl"),
        (Spec(ttl=seconds(0, 999_999)), "spec.ttl"),
        (Spec(ttl=seconds(limits.TTL_S_MAX, 1)), "spec.ttl"),
        (Spec(ttl=seconds(2**62)), "spec.ttl"),
        (Spec(idle_timeout=seconds(0, -1)), "spec.idle_timeout"),
        (Spec(idle_timeout=seconds(-(2**62))), "spec.idle_timeout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_out_of_range_is_refused_by_its_field(spec: Spec, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        validation.spec_of(spec)
    assert caught.value.field == field
    # And so it reaches the caller: in BadRequest, and small enough for the trailers.
    status = to_status(caught.value)
    assert RemoteError(status).field == field
    assert status.ByteSize() < 4000


def test_what_is_left_out_gets_its_default() -> None:
    spec = validation.spec_of(Spec())
    assert spec.image == "host"
    assert spec.cpu_millicores == limits.CPU_MILLICORES_DEFAULT
    assert spec.memory_bytes == limits.MEMORY_BYTES_DEFAULT
    assert (spec.ttl_ms, spec.idle_timeout_ms, spec.env, spec.labels) == (0, 0, (), ())


@pytest.mark.parametrize(
    "spec",
    [
        limit(
            cpu_millicores=limits.CPU_MILLICORES_MAX,
            memory_bytes=limits.MEMORY_BYTES_MAX,
            disk_bytes=limits.DISK_BYTES_MAX,
            processes_max=limits.PROCESSES_MAX,
            open_files_max=limits.OPEN_FILES_MAX,
            output_bytes_per_second=limits.OUTPUT_BYTES_PER_SECOND_MAX,
        ),
        limit(cpu_millicores=1, memory_bytes=limits.MEMORY_BYTES_MIN,
              disk_bytes=limits.DISK_BYTES_MIN, processes_max=2, open_files_max=16),
        Spec(priority=-1000, ttl=seconds(limits.TTL_S_MAX), idle_timeout=seconds(0, 1_000_000)),
    ],
    ids=["most", "least", "times"],
)  # fmt: skip
def test_each_bound_itself_is_in_range(spec: Spec) -> None:
    validation.spec_of(spec)


@given(
    st.builds(
        Spec,
        image=st.text(max_size=5),
        env=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
        labels=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
        priority=st.integers(-(2**31), 2**31 - 1),
        limits=st.builds(
            sandbox_pb2.Limits,
            cpu_millicores=st.integers(-(2**63), 2**63 - 1),
            memory_bytes=st.integers(-(2**63), 2**63 - 1),
        ),
    )
)
def test_nothing_but_a_spec_or_a_refusal_comes_out(spec: Spec) -> None:
    with contextlib.suppress(InvalidArgumentError):
        assert validation.spec_of(spec).image == "host"


@pytest.mark.parametrize("value", ["", "x" * 129, "x" * 1_048_576])
def test_a_reference_is_neither_empty_nor_longer_than_any(value: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        validation.reference(value, "sandbox")
    assert caught.value.field == "sandbox"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(("given_size", "size"), [(0, 50), (1, 1), (1000, 1000)])
def test_page_sizes(given_size: int, size: int) -> None:
    assert validation.page_size(given_size) == size


@pytest.mark.parametrize("value", [-1, 1001, 2**31 - 1])
def test_page_sizes_are_bounded(value: int) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        validation.page_size(value)
    assert caught.value.field == "page_size"


def test_a_request_without_an_id_gets_one() -> None:
    assert validation.request_id("") != validation.request_id("")
    assert validation.request_id("abc") == "abc"
    with pytest.raises(InvalidArgumentError):
        validation.request_id("a b")


def test_a_fingerprint_is_of_the_contents_and_not_of_how_they_were_sent() -> None:
    request = sandbox_pb2.CreateSandboxRequest(
        request_id="a",
        name="n",
        spec=Spec(env={f"K{i}": "v" for i in range(50)}),
        wait_until=sandbox_pb2.WAIT_UNTIL_COMMITTED,
    )
    same = sandbox_pb2.CreateSandboxRequest(
        request_id="b", name="n", wait_until=sandbox_pb2.WAIT_UNTIL_READY,
        spec=Spec(env={f"K{i}": "v" for i in reversed(range(50))}),
    )  # fmt: skip
    other = sandbox_pb2.CreateSandboxRequest()
    other.CopyFrom(request)
    other.spec.env["K1"] = "w"
    fingerprints = [validation.fingerprint(r, "wait_until") for r in (request, same, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert request.request_id == "a"


def test_the_fingerprint_of_a_create_is_that_of_its_contents_however_it_is_found() -> None:
    spec = Spec(labels={"a": "b", "c": "d"}, priority=3)
    ready = sandbox_pb2.WAIT_UNTIL_READY
    for request in (
        sandbox_pb2.CreateSandboxRequest(request_id="r", spec=spec, wait_until=ready),
        sandbox_pb2.CreateSandboxRequest(request_id="r", spec=Spec()),
        sandbox_pb2.CreateSandboxRequest(request_id="r", name="web", spec=spec),
        sandbox_pb2.CreateSandboxRequest(request_id="r", name="web"),
        sandbox_pb2.CreateSandboxRequest(request_id="r"),
    ):
        found = validation.fingerprint_of_create(request)
        assert found == validation.fingerprint(request, "wait_until")
        assert request.request_id == "r"


# ── Page tokens ──────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 2**64 - 1), st.integers(1, 2**64 - 1))
def test_a_sandbox_token_comes_back_as_it_went(after: int, revision: int) -> None:
    assert listing.decode_token(listing.encode_token(after, revision)) == (after, revision)


def test_a_sandbox_token_of_an_earlier_release_tells_no_revision() -> None:
    assert listing.decode_token("AAAAAAAAAAc") == (7, 0)


@given(st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True))
def test_a_node_token_comes_back_as_it_went(name: str) -> None:
    assert nodes._decode_token(nodes._encode_token(name)) == name


@pytest.mark.parametrize("decode", [listing.decode_token, nodes._decode_token])
@pytest.mark.parametrize(
    "token", ["!", "AAAA!AAAAAAA", "é", "\0", "/w", "AAAAA", "____", "A" * 1_048_577]
)
def test_any_other_token_is_refused_by_its_field(decode: Callable[[str], Any], token: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        decode(token)
    assert caught.value.field == "page_token"
    assert len(caught.value.message) < 200


def test_no_token_is_the_beginning() -> None:
    assert listing.decode_token("") == (0, 0)
    assert nodes._decode_token("") == ""


def test_new_limits_are_within_the_ranges_of_a_create() -> None:
    asked = sandbox_pb2.Limits(cpu_millicores=700, processes_max=2)
    assert validation.new_limits(asked) == {
        "cpu_millicores": 700, "memory_bytes": 0, "disk_bytes": 0, "processes_max": 2,
    }  # fmt: skip
    for wrong in (
        sandbox_pb2.Limits(memory_bytes=1),
        sandbox_pb2.Limits(cpu_millicores=-1),
        sandbox_pb2.Limits(processes_max=1),
        sandbox_pb2.Limits(open_files_max=100),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            validation.new_limits(wrong)
        assert caught.value.field.startswith("limits.")
