"""What is done to the hosts. Each fault begins, and `Hosts.heal` undoes all of them."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from typing import Final, TypeAlias

from tests.nemesis.hosts import Host, Hosts

Fault: TypeAlias = Callable[[Hosts, random.Random], str]


def _leader(hosts: Hosts) -> Host | None:
    for host in hosts.all:
        if host.ready_text().startswith(f"{host.name} leads"):
            return host
    return None


def kill_leader(hosts: Hosts, chance: random.Random) -> str:
    """SIGKILL of whoever leads."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    victim.kill()
    return f"kill -9 of {victim.name}, the leader"


def kill_any(hosts: Hosts, chance: random.Random) -> str:
    """SIGKILL of anyone."""
    victim = chance.choice(hosts.all)
    victim.kill()
    return f"kill -9 of {victim.name}"


def kill_all(hosts: Hosts, chance: random.Random) -> str:
    """SIGKILL of everyone."""
    for host in hosts.all:
        host.kill()
    return "kill -9 of all"


def pause_leader(hosts: Hosts, chance: random.Random) -> str:
    """SIGSTOP of the leader, for longer than an election."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    victim.signal(signal.SIGSTOP)
    return f"SIGSTOP of {victim.name}, the leader"


def isolate_leader(hosts: Hosts, chance: random.Random) -> str:
    """The leader and the others do not hear each other; clients reach all."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    others = [host for host in hosts.all if host is not victim]
    victim.drop_from(others)
    for other in others:
        other.drop_from([victim])
    return f"{victim.name}, the leader, is cut off"


def deafen_leader(hosts: Hosts, chance: random.Random) -> str:
    """One way: the leader is heard, and hears nobody."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    victim.drop_from([host for host in hosts.all if host is not victim])
    return f"{victim.name}, the leader, hears nobody"


def mute_leader(hosts: Hosts, chance: random.Random) -> str:
    """One way: the leader hears, and nobody hears it."""
    victim = _leader(hosts) or chance.choice(hosts.all)
    for other in hosts.all:
        if other is not victim:
            other.drop_from([victim])
    return f"nobody hears {victim.name}, the leader"


def bridge(hosts: Hosts, chance: random.Random) -> str:
    """Two halves that do not hear each other, and one host that hears both."""
    order = list(hosts.all)
    chance.shuffle(order)
    middle, rest = order[0], order[1:]
    left, right = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    for host in left:
        host.drop_from(right)
    for host in right:
        host.drop_from(left)
    return f"{middle.name} is the bridge between two halves"


FAULTS: Final[tuple[Fault, ...]] = (
    kill_leader,
    kill_any,
    kill_all,
    pause_leader,
    isolate_leader,
    deafen_leader,
    mute_leader,
    bridge,
)
