"""What is done to the hosts. Each fault begins, and `Hosts.heal` undoes all of them.

A fault says what it did and, before it is undone, whether it has bitten: one that does nothing
proves nothing, and fails the run.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from tests.nemesis.hosts import Host, Hosts


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that has begun.

    Attributes:
        said: What was done, to whom.
        has_bitten: Whether it can be seen to have had an effect.
        length_min_s: How long it must last at least to have it.
    """

    said: str
    has_bitten: Callable[[], bool]
    length_min_s: float = 0.0


Fault: TypeAlias = Callable[[Hosts, random.Random], Struck]


#: Longer than any election timeout.
_HANG_S: Final = 3.0


def _leads(host: Host) -> bool:
    return host.ready_text().startswith(f"{host.name} leads")


def _leader(hosts: Hosts) -> Host | None:
    return next((host for host in hosts.all if _leads(host)), None)


def _dropped(hosts: Sequence[Host]) -> bool:
    return any(host.dropped_packets for host in hosts)


def _says_full(hosts: Sequence[Host]) -> bool:
    return any("disk is full" in host.readyz()[1] for host in hosts)


def _slow(victim: Host, delay_s: float, who: str) -> Struck:
    before = victim.meddle.delayed_syncs
    victim.meddle.slow_disk(delay_s)
    return Struck(
        f"each sync of {victim.name}, {who}, takes {delay_s:g} s longer",
        lambda: victim.meddle.delayed_syncs > before,
    )


def kill_leader(hosts: Hosts, chance: random.Random) -> Struck:
    """SIGKILL of whoever leads."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    victim.kill()
    return Struck(f"kill -9 of {victim.name}, the leader", lambda: not victim.runs)


def kill_any(hosts: Hosts, chance: random.Random) -> Struck:
    """SIGKILL of anyone."""
    victim = chance.choice(hosts.all)
    victim.kill()
    return Struck(f"kill -9 of {victim.name}", lambda: not victim.runs)


def kill_all(hosts: Hosts, chance: random.Random) -> Struck:
    """SIGKILL of everyone."""
    for host in hosts.all:
        host.kill()
    return Struck("kill -9 of all", lambda: not any(host.runs for host in hosts.all))


def pause_leader(hosts: Hosts, chance: random.Random) -> Struck:
    """SIGSTOP of the leader, for longer than an election."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    victim.signal(signal.SIGSTOP)
    return Struck(f"SIGSTOP of {victim.name}, the leader", lambda: victim.is_stopped)


def isolate_leader(hosts: Hosts, chance: random.Random) -> Struck:
    """The leader and the others do not hear each other; clients reach all."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    others = [host for host in hosts.all if host is not victim]
    victim.drop_from(others)
    for other in others:
        other.drop_from([victim])
    return Struck(f"{victim.name}, the leader, is cut off", lambda: _dropped([victim, *others]))


def deafen_leader(hosts: Hosts, chance: random.Random) -> Struck:
    """One way: the leader is heard, and hears nobody."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    victim.drop_from([host for host in hosts.all if host is not victim])
    return Struck(f"{victim.name}, the leader, hears nobody", lambda: _dropped([victim]))


def mute_leader(hosts: Hosts, chance: random.Random) -> Struck:
    """One way: the leader hears, and nobody hears it."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    for other in hosts.all:
        if other is not victim:
            other.drop_from([victim])
    others = [host for host in hosts.all if host is not victim]
    return Struck(f"nobody hears {victim.name}, the leader", lambda: _dropped(others))


def bridge(hosts: Hosts, chance: random.Random) -> Struck:
    """Two halves that do not hear each other, and one host that hears both."""
    # Not by the leader: followers have little to say to each other, so nothing would be cut.
    leader = _leader(hosts)
    middle = chance.choice([host for host in hosts.all if host is not leader])
    rest = [host for host in hosts.all if host is not middle]
    chance.shuffle(rest)
    left, right = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    for host in left:
        host.drop_from(right)
    for host in right:
        host.drop_from(left)
    return Struck(
        f"{middle.name} is the bridge between two halves", lambda: _dropped([*left, *right])
    )


def fill_leaders_disk(hosts: Hosts, chance: random.Random) -> Struck:
    """The leader's disk takes no new commands any more, or nothing at all."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    left_bytes = chance.choice((0, 8 * 2**20))
    victim.fill_disk(left_bytes)
    return Struck(
        f"the disk of {victim.name}, the leader, is full but for {left_bytes} bytes",
        lambda: _says_full([victim]) or _leader(hosts) not in (None, victim),
    )


def fill_disks(hosts: Hosts, chance: random.Random) -> Struck:
    """Nothing fits on the disks of a majority or of all; of the leader in any case.

    A follower may write on for a while, in pages of its database that are free; a leader that has
    no room refuses, or hands over to one that has.
    """
    leader = _leader(hosts) or chance.choice(hosts.all)
    others = [host for host in hosts.all if host is not leader]
    victims = [leader, *chance.sample(others, chance.choice((len(others) // 2, len(others))))]
    for victim in victims:
        victim.fill_disk(0)
    return Struck(
        f"the disks of {', '.join(victim.name for victim in victims)} are full",
        lambda: _says_full(victims) or _leader(hosts) not in (None, leader),
    )


def slow_leaders_disk(hosts: Hosts, chance: random.Random) -> Struck:
    """Each sync of the leader takes long."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    return _slow(victim, chance.choice((0.05, 0.3)), "the leader")


def hang_leaders_disk(hosts: Hosts, chance: random.Random) -> Struck:
    """Each sync of the leader takes longer than an election: another must lead meanwhile."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    others = [host for host in hosts.all if host is not victim]
    slow = _slow(victim, _HANG_S, "the leader")
    return Struck(
        slow.said,
        lambda: slow.has_bitten() and any(map(_leads, others)),
        length_min_s=_HANG_S + 2.0,
    )


def slow_disk(hosts: Hosts, chance: random.Random) -> Struck:
    """Each sync of someone takes long."""
    victim = chance.choice(hosts.all)
    delay_s = chance.choice((0.05, 0.3, 1.0))
    return _slow(victim, delay_s, "whoever it is")


def shift_clocks(hosts: Hosts, chance: random.Random) -> Struck:
    """The wall clocks of some, the leader's among them or not, jump by hours; days, backwards."""
    victims = chance.sample(hosts.all, chance.randrange(1, len(hosts.all)))
    parts = []
    for victim in victims:
        offset_s = chance.choice((-72, -3, 3)) * 3600
        victim.meddle.shift_clock(offset_s)
        parts.append(f"{victim.name} by {offset_s // 3600} h")
    before = [victim.meddle.shifted_reads for victim in victims]
    return Struck(
        f"the clock jumps: {', '.join(parts)}",
        lambda: all(v.meddle.shifted_reads > n for v, n in zip(victims, before, strict=True)),
    )


FAULTS: Final[tuple[Fault, ...]] = (
    kill_leader,
    kill_any,
    kill_all,
    pause_leader,
    isolate_leader,
    deafen_leader,
    mute_leader,
    bridge,
    fill_leaders_disk,
    fill_disks,
    slow_leaders_disk,
    hang_leaders_disk,
    slow_disk,
    shift_clocks,
)
