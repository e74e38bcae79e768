"""Commands that some member could not apply are not proposed."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from prism_common.errors import NoLeaderError, UpgradeNeededError, WrongStateError
from prism_control.node.upgrade import VersionGate, common_version
from prism_control.raft.core import Core
from prism_control.raft.types import Configuration, HeartbeatReply, Member
from prism_control.state.commands import (
    VERSION,
    VERSION_UNTOLD,
    DeleteSandbox,
    MoveSandboxes,
    RaiseVersion,
    decode,
    encode,
    propose,
)
from prism_control.state.machine import Machine
from tests.unit.raft.test_reads import settled_leader

NEW = MoveSandboxes("nd1", ("sb1",))
OLD = DeleteSandbox("", b"", "sb1")


class Bench:
    """A leader of three, its state, and its gate."""

    def __init__(self) -> None:
        members = tuple(Member(n, f"n{n}", f"n{n}:4200", f"n{n}:8008") for n in (1, 2, 3))
        self.core: Core = settled_leader(Configuration(voters=(1, 2, 3), members=members))
        self.machine = Machine()
        self.gate = VersionGate(lambda: self.machine)
        self.gate.attach(
            cast("Any", SimpleNamespace(core=self.core, configuration=self.core.configuration))
        )

    def tells(self, member: int, version: int) -> None:
        self.core.step(HeartbeatReply(member, 1, self.core.term, 0, version))

    def apply(self, command: RaiseVersion) -> None:
        index = self.machine.applied_index + 1
        self.machine.apply(index, encode(propose(1, (command,))))


@pytest.mark.parametrize(
    ("members", "common"),
    [
        ({}, 7),
        ({"n2": 7, "n3": 9}, 7),
        ({"n2": 9, "n3": 5}, 5),
        ({"n2": 9, "n3": 0}, VERSION_UNTOLD),
        ({"n2": 9, "n3": None}, VERSION_UNTOLD),
    ],
)
def test_the_common_version_is_what_all_can_apply(
    members: dict[str, int | None], common: int
) -> None:
    assert common_version(members, 7) == common


def test_new_commands_wait_until_every_member_is_heard_and_upgraded() -> None:
    bench = Bench()
    bench.gate.check(OLD)
    with pytest.raises(UpgradeNeededError, match="not heard yet") as raised:
        bench.gate.check(NEW)
    assert raised.value.metadata["members"] == "n2,n3"
    bench.tells(2, VERSION)
    bench.tells(3, 0)
    assert bench.gate.due() is None
    with pytest.raises(UpgradeNeededError, match=r"n3 \(version 2\)"):
        bench.gate.check(NEW)

    bench.tells(3, VERSION)
    with pytest.raises(NoLeaderError):  # in a moment
        bench.gate.check(NEW)
    command = bench.gate.due()
    assert command == RaiseVersion(VERSION)
    bench.gate.check(command)
    bench.apply(command)
    bench.gate.check(NEW)
    assert bench.gate.due() is None
    assert bench.gate.behind() == {}

    # Whoever is not heard later changes nothing: what is in force was agreed.
    bench.tells(3, 0)
    bench.gate.check(NEW)


def test_a_raise_waits_for_who_is_joining_and_refuses_who_comes_after() -> None:
    bench = Bench()
    bench.tells(2, VERSION)
    bench.tells(3, VERSION)
    old = Member(4, "n4", "n4:4200", "n4:8008")
    with bench.gate.admitting(old, 0):
        assert bench.gate.due() is None
    assert bench.gate.due() == RaiseVersion(VERSION)
    # It is proposed, and not yet applied.
    with pytest.raises(WrongStateError, match="newer release"), bench.gate.admitting(old, 0):
        raise AssertionError
    with bench.gate.admitting(old, VERSION):
        assert bench.gate.due() == RaiseVersion(VERSION)


def test_the_version_in_force_is_replicated_and_never_goes_down() -> None:
    bench = Bench()
    assert bench.machine.command_version == VERSION_UNTOLD
    bench.apply(RaiseVersion(VERSION))
    bench.apply(RaiseVersion(3))
    assert bench.machine.command_version == VERSION


def test_a_raise_is_proposed_under_the_version_that_it_raises_to() -> None:
    assert decode(encode(propose(1, (OLD, RaiseVersion(VERSION))))).version == VERSION
