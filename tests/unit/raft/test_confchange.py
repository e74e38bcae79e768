"""Which configuration follows which: §6, thesis 4.3."""

from __future__ import annotations

import pytest

from prism_control.raft.confchange import ConfigurationChange, begin, leave
from prism_control.raft.errors import InvalidRequestError
from prism_control.raft.types import Configuration, Member


def member(id_: int, address: str = "") -> Member:
    return Member(id_, f"n{id_}", address or f"h{id_}:1", "")


BEFORE = Configuration((1, 2, 3), (), (4,), tuple(map(member, (1, 2, 3, 4))))


def test_a_new_member_begins_as_a_learner_without_a_joint_configuration() -> None:
    after = begin(BEFORE, ConfigurationChange(add=(member(9),)))
    assert (after.voters, after.voters_outgoing, after.learners) == ((1, 2, 3), (), (4, 9))
    assert [m.id for m in after.members] == [1, 2, 3, 4, 9]


def test_addresses_change_without_a_joint_configuration() -> None:
    after = begin(BEFORE, ConfigurationChange(update=(member(2, "new:1"),)))
    assert not after.is_joint
    assert after.members[1] == member(2, "new:1")


@pytest.mark.parametrize(
    ("change", "voters", "learners"),
    [
        (ConfigurationChange(promote=(4,)), (1, 2, 3, 4), ()),
        (ConfigurationChange(remove=(1,)), (2, 3), (4,)),
        (ConfigurationChange(promote=(4,), remove=(1, 2), add=(member(5),)), (3, 4), (5,)),
    ],
)
def test_voters_change_by_a_joint_configuration(
    change: ConfigurationChange, voters: tuple[int, ...], learners: tuple[int, ...]
) -> None:
    joint = begin(BEFORE, change)
    assert (joint.voters, joint.voters_outgoing, joint.learners) == (voters, (1, 2, 3), learners)
    assert {m.id for m in joint.members} == set(joint.ids()), "addresses of everybody in it"
    after = leave(joint)
    assert (after.voters, after.voters_outgoing, after.learners) == (voters, (), learners)
    assert {m.id for m in after.members} == {*voters, *learners}


def test_a_learner_is_removed_without_a_joint_configuration() -> None:
    after = begin(BEFORE, ConfigurationChange(remove=(4,)))
    assert after == Configuration((1, 2, 3), (), (), BEFORE.members[:3])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (ConfigurationChange(), "nothing would change"),
        (ConfigurationChange(add=(member(3),)), "cannot be the id of a new member"),
        (ConfigurationChange(add=(member(0),)), "cannot be the id of a new member"),
        (ConfigurationChange(update=(member(9),)), "is no member"),
        (ConfigurationChange(remove=(9,)), "is no member"),
        (ConfigurationChange(promote=(1,)), "is no learner"),
        (ConfigurationChange(promote=(9,), add=(member(9),)), "named twice"),
        (ConfigurationChange(promote=(4,), remove=(4,)), "named twice"),
        (ConfigurationChange(remove=(1, 2, 3)), "no voter would be left"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(change: ConfigurationChange, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        begin(BEFORE, change)


def test_one_change_at_a_time() -> None:
    joint = begin(BEFORE, ConfigurationChange(promote=(4,)))
    with pytest.raises(InvalidRequestError, match="half done"):
        begin(joint, ConfigurationChange(remove=(1,)))
