"""Which configuration comes next (§6, thesis 4.3); pure functions of configurations.

Voters change only by way of a joint configuration, even if it is only one of them: one
mechanism is enough, and it is the one that covers every change. Learners and addresses are in no
majority, so a change of these is one entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prism_control.raft.errors import InvalidRequestError
from prism_control.raft.types import Configuration

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prism_control.raft.types import Member, MemberId


@dataclass(frozen=True, slots=True)
class ConfigurationChange:
    """What shall be different; all of it takes effect together.

    Attributes:
        add: New members, with ids that this cluster has never seen: a member whose disk was
            lost has forgotten its votes, and comes back only under a new id. They begin as
            learners (thesis 4.2.1).
        update: Members whose name or addresses have changed.
        promote: Learners that become voters.
        remove: Voters or learners that leave.
    """

    add: tuple[Member, ...] = ()
    update: tuple[Member, ...] = ()
    promote: tuple[MemberId, ...] = ()
    remove: tuple[MemberId, ...] = ()


def begin(configuration: Configuration, change: ConfigurationChange) -> Configuration:
    """Return what follows `configuration`: joint if its voters change, else final.

    Raises:
        InvalidRequestError: The change makes no sense in `configuration`, which is not joint.
    """
    _check(configuration, change)
    added = {member.id for member in change.add}
    promoted, removed = set(change.promote), set(change.remove)
    voters = tuple(sorted({*configuration.voters, *promoted} - removed))
    learners = tuple(sorted({*configuration.learners, *added} - promoted - removed))
    if not voters:
        raise InvalidRequestError("no voter would be left")
    outgoing = () if voters == tuple(sorted(configuration.voters)) else configuration.voters
    after = Configuration(voters, outgoing, learners)
    members = {m.id: m for m in (*configuration.members, *change.update, *change.add)}
    return Configuration(voters, outgoing, learners, _members(members.values(), after))


def leave(configuration: Configuration) -> Configuration:
    """Return what follows a joint configuration."""
    after = Configuration(configuration.voters, (), configuration.learners)
    members = _members(configuration.members, after)
    return Configuration(after.voters, (), after.learners, members)


def _check(configuration: Configuration, change: ConfigurationChange) -> None:
    ids = configuration.ids()
    named = [m.id for m in (*change.add, *change.update)] + [*change.promote, *change.remove]
    if configuration.is_joint:
        raise InvalidRequestError("a change is half done")
    if not named:
        raise InvalidRequestError("nothing would change")
    if len(set(named)) < len(named):
        raise InvalidRequestError("a member is named twice")
    for member in change.add:
        if member.id <= 0 or member.id in ids:
            raise InvalidRequestError(f"{member.id:016x} cannot be the id of a new member")
    for id_ in (*(m.id for m in change.update), *change.remove):
        if id_ not in ids:
            raise InvalidRequestError(f"{id_:016x} is no member")
    for id_ in change.promote:
        if id_ not in configuration.learners:
            raise InvalidRequestError(f"{id_:016x} is no learner")


def _members(members: Iterable[Member], configuration: Configuration) -> tuple[Member, ...]:
    ids = configuration.ids()
    return tuple(sorted((m for m in members if m.id in ids), key=lambda m: m.id))
