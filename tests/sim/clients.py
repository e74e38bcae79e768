"""Who uses the cluster: writers, readers, sessions that repeat requests, and an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from prism_control.raft.confchange import ConfigurationChange
from prism_control.raft.core import Core
from prism_control.raft.errors import InvalidRequestError, NotLeaderError, NotReadyError
from prism_control.state import commands
from prism_control.state.model import Spec
from tests.sim.invariants import ViolationError
from tests.sim.linearizability import UNKNOWN_END, Kind, Operation, TooHardError, is_linearizable
from tests.sim.options import member
from tests.sim.state_machine import REGISTERS

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster
    from tests.sim.node import Node

_ANSWER_TIMEOUT_US = 300_000
_SPEC = Spec("img", 100, 1 << 20, 0, 10, 10)


class Clients:
    """All clients of one cluster, and what they were told."""

    def __init__(self, cluster: Cluster, random: Random) -> None:
        self._cluster = cluster
        self._random = random
        self._writes = 0
        self._histories: list[list[Operation]] = [[] for _ in range(REGISTERS)]
        #: Request id to the sandbox id that it was first answered with.
        self._answers: dict[str, str] = {}
        self.histories_checked = 0
        self.transfers = 0
        self.changes = 0

    def start(self) -> None:
        """Begin."""
        options = self._cluster.options
        for _ in range(options.clients):
            self._cluster.after(self._random.randrange(100_000), self._work)
        for _ in range(options.register_clients):
            self._cluster.after(self._random.randrange(100_000), self._use_register)
        if options.operator_interval_us:
            self._cluster.after(self._random.randrange(300_000), self._operate)

    def _some_node(self) -> Node:
        nodes = list(self._cluster.nodes.values())
        leaders = [node for node in nodes if node.core and node.core.replication]
        if leaders and self._random.random() < 0.8:
            return self._random.choice(leaders)
        return self._random.choice(nodes)

    # ---------------------------------------------------------------- writes and reads

    def _work(self) -> None:
        if self._cluster.is_healed:
            return
        random = self._random
        node = self._some_node()
        if random.random() < 0.3:
            node.read(random.getrandbits(63))
        else:
            node.propose([self.next_write() for _ in range(random.choice((1, 1, 2, 8)))])
        self._cluster.after(random.randrange(2 * self._cluster.options.pause_us), self._work)

    def next_write(self) -> bytes:
        """Return a command; a session may send the same one again, through another member."""
        self._writes += 1
        if not self._cluster.options.with_prism:
            return b"fill %d" % self._writes
        number = self._random.randrange(max(1, self._writes - 8), self._writes + 1)
        request_id, sandbox_id = f"r{number}", f"s{number}.{self._writes}"
        create = commands.CreateSandbox(request_id, b"f", sandbox_id, f"name-{number}", _SPEC)
        return commands.encode(commands.Proposal(1, self._cluster.now_us // 1000, (create,)))

    def answered(self, data: bytes, answer: object) -> None:
        """Check an answer: a request has one effect, however often it is sent."""
        if not self._cluster.options.with_prism or not isinstance(answer, tuple):
            return
        (command,) = commands.decode(data).items
        (result,) = answer
        if not isinstance(command, commands.CreateSandbox):
            return
        if not hasattr(result, "sandbox"):
            raise ViolationError(f"session: {command.request_id} was refused: {result}")
        first = self._answers.setdefault(command.request_id, result.sandbox.id)
        if first != result.sandbox.id:
            raise ViolationError(f"session: {command.request_id} made {first} and another")

    # ---------------------------------------------------------------- registers

    def _use_register(self) -> None:
        if self._cluster.is_healed:
            return
        random, key = self._random, self._random.randrange(REGISTERS)
        history = self._histories[key]
        self._writes += 1
        kind = random.choice((Kind.READ, Kind.READ, Kind.WRITE, Kind.CAS))
        expected = history[-1].value if history else 0
        operation = Operation(kind, self._cluster.now_us, UNKNOWN_END, self._writes, expected)
        position = len(history)
        history.append(operation)

        def done(answer: object) -> None:
            if history[position].end != UNKNOWN_END or operation.begin < self._cluster.now_us - (
                _ANSWER_TIMEOUT_US
            ):
                return
            ended = replace(operation, end=self._cluster.now_us)
            if isinstance(answer, bool):
                ended = replace(ended, succeeded=answer)
            elif isinstance(answer, int):
                ended = replace(ended, value=answer)
            history[position] = ended

        node = self._some_node()
        if kind is Kind.READ:
            node.read(random.getrandbits(63), lambda: done(node.state.register(key)))
        elif kind is Kind.WRITE:
            node.propose([b"set %d %d" % (key, self._writes)], done)
        else:
            node.propose([b"cas %d %d %d" % (key, expected, self._writes)], done)
        self._cluster.after(random.randrange(10_000, _ANSWER_TIMEOUT_US), self._use_register)

    def check_histories(self) -> None:
        """Check all histories.

        Raises:
            ViolationError: One is not linearizable.
        """
        for key, history in enumerate(self._histories):
            try:
                if not is_linearizable(history, steps_max=20_000):
                    raise ViolationError(f"register {key} is not linearizable: {history}")
                self.histories_checked += bool(history)
            except TooHardError:
                self._cluster.trace("history too hard", key, len(history))

    # ---------------------------------------------------------------- the operator

    def _operate(self) -> None:
        cluster, random = self._cluster, self._random
        if cluster.is_healed:
            return
        interval_us = cluster.options.operator_interval_us
        cluster.after(random.randrange(1, 2 * interval_us), self._operate)
        seed = random.getrandbits(64)
        is_transfer = random.random() < cluster.options.transfers
        action = self._transfer if is_transfer else self._change
        self._some_node().receive(partial(self._try, action, seed))

    def _try(self, action: Callable[[Core, Random], None], seed: int, core: Core) -> None:
        if self._cluster.is_healed or core.replication is None:
            return
        try:
            action(core, Random(seed))
        except (NotLeaderError, NotReadyError, InvalidRequestError) as error:
            self._cluster.trace("refuse", core.config.id, error)

    def _transfer(self, core: Core, random: Random) -> None:
        to = random.choice(core.configuration.ids())
        core.transfer(to)
        self.transfers += 1
        self._cluster.trace("transfer", core.config.id, to)

    def _change(self, core: Core, random: Random) -> None:
        change = self._choose(core, random)
        index = core.propose_configuration(change)
        self.changes += 1
        self._cluster.trace("change", core.config.id, index, change)

    def _choose(self, core: Core, random: Random) -> ConfigurationChange:
        configuration, lost = core.configuration, self._cluster.lost
        gone = tuple(id_ for id_ in configuration.ids() if id_ in lost)
        if gone and random.random() < 0.7:
            return ConfigurationChange(remove=gone)
        caught_up = tuple(id_ for id_ in core.caught_up_learners() if id_ not in lost)
        # While a disk is lost, a sane operator removes nobody who is still there.
        removable = [] if gone else list(configuration.ids())
        count = min(len(removable), random.choice((0, 1, 1, 2)))
        choices = [
            ConfigurationChange(remove=tuple(random.sample(removable, count))),
            ConfigurationChange(promote=caught_up),
        ]
        if len(configuration.ids()) < random.choice((2, 4, 6)) and len(self._cluster.nodes) < 12:
            new = self._cluster.add_node()
            choices = [ConfigurationChange(add=(member(new.id),))]
        elif caught_up and removable:
            voters = list(configuration.voters)
            choices.append(ConfigurationChange(promote=caught_up, remove=(random.choice(voters),)))
        return random.choice(choices)
