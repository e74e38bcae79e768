"""Members of different versions: commands are held back that one of them could not apply."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from prism_common.errors import NoLeaderError, UpgradeNeededError, WrongStateError
from prism_control.node.driver import Driver
from prism_control.raft.types import Member
from prism_control.state.commands import (
    VERSION,
    VERSION_UNTOLD,
    Command,
    RaiseVersion,
    version_of,
)
from prism_control.state.machine import Machine

#: A member that has not been heard yet, or comes back upgraded, is known after a heartbeat.
_RETRY_AFTER_S: Final = 5.0


def common_version(members: Mapping[str, int | None], own: int) -> int:
    """Return the highest version of commands that all members can apply.

    Args:
        members: What each other member told, by name: 0 where its release does not tell, None
            where it was not heard in this term.
        own: That of this member.
    """
    return min([own, *(version or VERSION_UNTOLD for version in members.values())])


class VersionGate:
    """Knows up to which version commands may be proposed, and when to raise that.

    The version in force is replicated and never goes down, so a command that passes here is one
    that all members of this moment's configuration can apply, whoever leads when it is committed.

    Args:
        machine: The replicated state.
        version: Highest version that this member can apply.
    """

    def __init__(self, machine: Callable[[], Machine], version: int = VERSION) -> None:
        self._machine = machine
        self._version = version
        self._driver: Driver | None = None
        #: Highest version that this member has proposed to raise to.
        self._proposed = 0
        #: What members can apply that are about to be in the configuration, by name.
        self._joining: dict[str, int] = {}

    def attach(self, driver: Driver) -> None:
        """Look at the members through this driver from now on."""
        self._driver = driver

    def check(self, command: Command) -> None:
        """Let a command pass that all members can apply.

        Raises:
            UpgradeNeededError: Some member cannot, or was not heard yet; it names them.
            NoLeaderError: All can, and it passes in a moment.
        """
        if self.may(command):
            return
        behind = self.behind()
        if not behind:
            raise NoLeaderError("the leader is taking office", retry_after_s=0.1)
        names = ", ".join(
            f"{name} (version {version})" if version else f"{name} (not heard yet)"
            for name, version in sorted(behind.items())
        )
        raise UpgradeNeededError(
            f"it needs commands of version {version_of(command)}, and this cluster uses version "
            f"{self._machine().command_version} until these members are upgraded: {names}",
            retry_after_s=_RETRY_AFTER_S,
            metadata={"members": ",".join(sorted(behind))},
        )

    def may(self, command: Command) -> bool:
        """Whether a command would pass; the raise itself is what lets the others pass."""
        active = self._machine().command_version
        # First: mostly all are upgraded, and this is asked for every request and report.
        return (
            active >= VERSION or isinstance(command, RaiseVersion) or version_of(command) <= active
        )

    def due(self) -> RaiseVersion | None:
        """Return the raise that all members are ready for; called on a leader."""
        version = common_version(self._others() | self._joining, self._version)
        if version <= self._machine().command_version:
            return None
        self._proposed = max(self._proposed, version)
        return RaiseVersion(version)

    @contextmanager
    def admitting(self, member: Member, version: int) -> Iterator[None]:
        """Let a member join that can apply what this cluster uses; raise nothing meanwhile.

        Raises:
            WrongStateError: It cannot.
        """
        version = version or VERSION_UNTOLD
        active = max(self._proposed, self._machine().command_version)
        if version < active:
            raise WrongStateError(
                f"{member.name} knows commands up to version {version}, and this cluster uses "
                f"version {active}: start it with a newer release of prismd",
                reason="VERSION_MISMATCH",
            )
        self._joining[member.name] = version
        try:
            yield
        finally:
            del self._joining[member.name]

    def behind(self) -> dict[str, int | None]:
        """Return the other members, by name, because of whom commands are held back.

        None: it has not been heard by this leader. Empty where nothing is held back.
        """
        if self._machine().command_version >= self._version:
            return {}
        return {
            name: version if version is None else version or VERSION_UNTOLD
            for name, version in self._others().items()
            if (version or 0) < self._version
        }

    def known(self) -> dict[str, int]:
        """Return what each member can apply, by name, as far as this leader knows."""
        driver = self._driver
        if driver is None or driver.core.replication is None:
            return {}
        me = next((m for m in driver.configuration.members if m.id == driver.core.config.id), None)
        told = {
            name: version or VERSION_UNTOLD
            for name, version in self._others().items()
            if version is not None
        }
        return told if me is None else told | {me.name: self._version}

    def _others(self) -> dict[str, int | None]:
        """Return what each other member of the configuration told this leader."""
        driver = self._driver
        if driver is None or driver.core.replication is None:
            return {}
        progress = driver.core.replication.progress
        configuration, me = driver.core.configuration, driver.core.config.id
        names = {member.id: member.name for member in configuration.members}
        return {
            names.get(key, f"{key:016x}"): progress[key].command_version
            for key in configuration.ids()
            if key != me
        }
