"""The envelope: what a member of one version does with another's bytes."""

from __future__ import annotations

import msgspec
import pytest

from prism_control.state import commands as c
from prism_control.state.model import ObservedState, PlacementRefusal
from tests.unit.state.builders import create, register, report, reports


def test_every_command_survives_encoding():
    proposal = c.Proposal(
        1,
        77,
        (
            create("s1", "r1", env=(("A", "b"),), ttl_ms=5),
            c.DeleteSandbox("", b"", "s1", True, 5),
            c.StopSandbox("r", b"x", "s1", 5),
            c.StartSandbox("r", b"x", "s1"),
            c.AssignSandboxes(
                (c.Placement("s1", 1, "n1"),),
                (c.Explanation(("s2",), "why", (PlacementRefusal("n", "nn", "full"),)),),
            ),
            reports(report(ObservedState.READY)),
            register(reports=(report(ObservedState.FAILED, reason="X"),)),
            c.SuspectNode("n", "i", 1),
            c.LoseNode("n", "i", 1),
            c.ReviveNode("n", "i", 1),
            c.CordonNode("n", True),
            c.ExpireSandboxes(("s1",)),
        ),
    )
    assert c.decode(c.encode(proposal)) == proposal


def test_newer_version_names_the_version_that_is_needed():
    for items in ([], [[99, "what"]]):
        with pytest.raises(c.UnknownCommandError, match="version 7") as caught:
            c.decode(msgspec.msgpack.encode([7, 5, items]))
        assert caught.value.version == 7


def test_unknown_tag_is_refused_and_not_skipped():
    with pytest.raises(c.UnknownCommandError, match="does not know") as caught:
        c.decode(msgspec.msgpack.encode([1, 5, [[99, "what"]]]))
    assert caught.value.version == 1


@pytest.mark.parametrize("data", [b"", b"\xc1", msgspec.msgpack.encode({"a": 1})])
def test_damage_is_told_from_novelty(data):
    with pytest.raises(c.MalformedProposalError):
        c.decode(data)


def test_trailing_fields_of_a_newer_writer_are_passed_over():
    data = msgspec.msgpack.encode([1, 5, [[4, "r", b"f", "s1", "a field of the future"]]])
    assert c.decode(data).items == (c.StartSandbox("r", b"f", "s1"),)
