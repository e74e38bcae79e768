"""Many at once: create --count and -f, rm by labels, several names a verb."""

import json

import pytest
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.batches import chunked
from prism_common import errors
from tests.cli.conftest import Run
from tests.cli.fake_prism import FakePrism


def test_count_makes_numbered_sandboxes_and_waits_for_all(inline: Run, fake: FakePrism) -> None:
    result = inline("sandbox", "create", "--count", "3", "--name", "w", "--request-id", "r")
    assert (result.returncode, result.stdout) == (0, b"w-1\nw-2\nw-3\n")
    sent = fake.requests("BatchCreateSandboxes")[0].requests
    assert [one.request_id for one in sent] == ["r-1", "r-2", "r-3"]


def test_what_failed_is_listed_with_why_and_the_rest_is_kept(inline: Run, fake: FakePrism) -> None:
    fake.put("w-2", pb.SANDBOX_STATE_READY)
    result = inline("sandbox", "create", "--count", "3", "--name", "w", "-o", "json")
    assert result.returncode == 1
    assert [one["name"] for one in json.loads(result.stdout)] == ["w-1", "w-3"]
    assert b"prismctl: w-2: a sandbox is named 'w-2' already" in result.stderr
    assert b"1 of 3 failed" in result.stderr


def test_a_full_queue_is_tried_again_under_the_same_request_ids(
    inline: Run, fake: FakePrism
) -> None:
    fake.fail("BatchCreateSandboxes", errors.QueueFullError("full", retry_after_s=0.05))
    fake.fail("CreateSandbox", errors.QueueFullError("full", retry_after_s=0.05))
    result = inline("sandbox", "create", "--count", "2", "--name", "w", "--no-wait")
    assert (result.returncode, result.stdout) == (0, b"w-1\nw-2\n")
    calls = fake.requests("BatchCreateSandboxes")
    ids = [[one.request_id for one in call.requests] for call in calls]
    assert ids[0] == ids[1]
    assert ids[2] == ids[0][:1]


def test_a_file_describes_many(inline: Run, fake: FakePrism) -> None:
    text = b"name: a\ncpu: 250m\nlabels: {job: '1'}\n---\n- name: b\n  ttl: 1h\n- memory: 1Gi\n"
    result = inline("sandbox", "create", "-f", "-", "--no-wait", stdin=text)
    assert result.stdout == b"a\nb\ncosmic-dragon-3f2a\n"
    first, second, third = fake.requests("BatchCreateSandboxes")[0].requests
    assert (first.spec.limits.cpu_millicores, dict(first.spec.labels)) == (250, {"job": "1"})
    assert (second.spec.ttl.seconds, third.spec.limits.memory_bytes) == (3600, 2**30)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"name: a\nimagee: x\n", b"line 2: unknown key 'imagee'; did you mean image?"),
        (b'[{"name": "a"}, {"nam": "b"}]', b"item 1: unknown key 'nam'"),
        (b"env: {DEBUG: true}\n", b"line 1: env: "),
        (b"cpu: lots\n", b"line 1: cpu: "),
        (b"a: [\n", b"is not YAML"),
        (b"name: a\nname: b\n", b"line 2: 'name' is given twice"),
        (b"", b"describes no sandbox"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_made(
    inline: Run, fake: FakePrism, text: bytes, words: bytes
) -> None:
    result = inline("sandbox", "create", "-f", "-", stdin=text)
    assert result.returncode == 2
    assert words in result.stderr
    assert not fake.sandboxes


def test_rm_by_selector_and_all(inline: Run, fake: FakePrism) -> None:
    for name, job in (("a", "1"), ("b", "1"), ("c", "2")):
        fake.put(name, pb.SANDBOX_STATE_READY, spec=pb.SandboxSpec(labels={"job": job}))
    assert inline("sandbox", "rm", "--all").returncode == 2  # nobody can be asked
    assert set(fake.sandboxes) == {"sb-a", "sb-b", "sb-c"}
    assert inline("sandbox", "rm", "--selector", "job=1").stdout == b"a\nb\n"
    assert inline("sandbox", "rm", "a", "--all").returncode == 2
    assert inline("sandbox", "rm", "--all", "--yes").stdout == b"c\n"
    assert not fake.sandboxes


def test_several_names_change_and_each_failure_is_named(inline: Run, fake: FakePrism) -> None:
    fake.put("a", pb.SANDBOX_STATE_READY)
    fake.put("c", pb.SANDBOX_STATE_READY)
    result = inline("sandbox", "stop", "a", "b", "c")
    assert (result.returncode, result.stdout) == (1, b"a\nc\n")
    assert result.stderr.startswith(b"prismctl: b: no sandbox is named 'b'")


def test_chunks_keep_to_items_and_bytes() -> None:
    assert list(chunked([1, 1, 1], 2)) == [[0, 1], [2]]
    assert list(chunked([2**20, 2**20, 1], 500)) == [[0, 1], [2]]
