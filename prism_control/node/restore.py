"""Offline: a new cluster from a backup, and a cluster of one from what a survivor has."""

import secrets
from dataclasses import dataclass
from pathlib import Path

from prism_common.errors import StartupError
from prism_control.node.formation import new_cluster_id
from prism_control.raft import recovery
from prism_control.raft.errors import CorruptEntryError, InvalidRequestError
from prism_control.raft.types import Configuration, HardState, Member, SnapshotMeta
from prism_control.state.machine import Machine
from prism_control.storage.directory import DataDirectory
from prism_control.storage.errors import DiskFullError, StorageError
from prism_control.storage.log import Identity, LogStore
from prism_control.storage.snapshots import SnapshotStore, read_records

#: The term of what a backup holds; the restored member's first election is for the next one.
_TERM = 1


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore has made."""

    cluster_id: str
    sandboxes: int
    nodes: int


def restore(
    backup: Path, data_dir: Path, name: str, raft_address: str, api_address: str
) -> Restored:
    """Make a new member, the only one of a new cluster, that holds what a backup holds.

    The cluster gets a new id, so that nobody of the old one takes part by mistake: agents join it
    with a new --data-dir.

    Raises:
        StartupError: The backup is damaged, or the directory is not new.
    """
    directory = DataDirectory(data_dir)
    try:
        store = LogStore(directory.path / "log", lambda _: None)
        try:
            if store.identity is not None:
                raise StartupError(f"--data-dir: {data_dir} is not new; give an empty one")
            with backup.open("rb") as file:
                chunks = list(read_records(file, backup.name))
            machine = Machine.from_snapshot(chunks)
            index = max(machine.applied_index, 1)
            SnapshotStore(directory.path / "snapshots").write(index, chunks)
            me = Member(secrets.randbits(63) or 1, name, raft_address, api_address)
            configuration = Configuration(voters=(me.id,), members=(me,))
            cluster_id = new_cluster_id()
            store.restore(
                Identity(me.id, name, cluster_id),
                HardState(term=_TERM, commit=index),
                SnapshotMeta(index, _TERM, configuration),
            )
        finally:
            store.close()
    except OSError as error:
        raise StartupError(f"--from: {backup}: {error.strerror}") from None
    except (DiskFullError, StorageError) as error:
        raise StartupError(f"--data-dir: {error}") from None
    finally:
        directory.close()
    return Restored(cluster_id, machine.sandbox_count, len(machine.nodes()))


def recover(data_dir: Path, member: str) -> recovery.Recovery:
    """Make a survivor the only member of its cluster. See `raft.recovery` for what that risks.

    Args:
        data_dir: Of a node that is stopped.
        member: Its name, to be sure that it is the one that is meant.

    Raises:
        StartupError: It is another's directory, or runs, or belongs to no cluster.
    """
    directory = DataDirectory(data_dir)
    try:
        store = LogStore(directory.path / "log", lambda _: None)
        try:
            identity = store.identity
            if identity is None or not identity.cluster_id:
                raise StartupError(f"--data-dir: {data_dir} belongs to no cluster")
            if member != identity.name:
                raise StartupError(
                    f"--member: {data_dir} is that of {identity.name!r}, not of {member!r}"
                )
            stored = store.load()
            try:
                found = recovery.recover(
                    stored.hard_state, stored.snapshot, stored.entries, identity.member_id
                )
            except (InvalidRequestError, CorruptEntryError) as error:
                raise StartupError(f"--data-dir: {data_dir}: {error}") from None
            store.persist(found.hard_state, None, found.entries)
            return found
        finally:
            store.close()
    except (DiskFullError, StorageError) as error:
        raise StartupError(f"--data-dir: {error}") from None
    finally:
        directory.close()
