"""Batches and lists through a follower: their answers are bytes that a member hands on."""

import uuid

from prism.sandbox.v1 import sandbox_pb2

from tests.integration.harness import WAIT_S, Cluster


def test_batches_and_pages_through_a_follower_are_those_of_the_leader(three: Cluster) -> None:
    leader, follower = three.leader(), three.followers()[0]
    label = {"batch": uuid.uuid4().hex}
    requests = [
        sandbox_pb2.CreateSandboxRequest(
            name=f"batch-{number}", spec=sandbox_pb2.SandboxSpec(labels=label)
        )
        for number in range(5)
    ]
    requests.append(sandbox_pb2.CreateSandboxRequest(name="Not a name"))
    batch = sandbox_pb2.BatchCreateSandboxesRequest(requests=requests)
    *made, refused = follower.sandboxes.BatchCreateSandboxes(batch, timeout=WAIT_S).results
    assert [(each.code, each.sandbox.name) for each in made] == [
        (0, f"batch-{number}") for number in range(5)
    ]
    assert (refused.reason, refused.HasField("sandbox")) == ("INVALID_ARGUMENT", False)

    page = sandbox_pb2.ListSandboxesRequest(page_size=2, label_selector=label)
    for member in (leader, follower):
        listed: list[sandbox_pb2.Sandbox] = []
        page.page_token = ""
        while True:
            answer = member.sandboxes.ListSandboxes(page, timeout=WAIT_S)
            listed += answer.sandboxes
            page.page_token = answer.next_page_token
            if not page.page_token:
                break
        assert [one.id for one in listed] == [each.sandbox.id for each in made]

    deletes = [sandbox_pb2.DeleteSandboxRequest(sandbox=one.id, wait=True) for one in listed]
    deletes.append(sandbox_pb2.DeleteSandboxRequest(sandbox="sb-none"))
    ends = sandbox_pb2.BatchDeleteSandboxesRequest(requests=deletes)
    *gone, unknown = follower.sandboxes.BatchDeleteSandboxes(ends, timeout=WAIT_S).results
    assert {each.sandbox.state for each in gone} == {sandbox_pb2.SANDBOX_STATE_DELETED}
    assert unknown.reason == "NOT_FOUND"
