"""The state machine on this member, and who is told of its changes."""

from collections.abc import Callable, Iterable

from prism_common.signal import KeyedSignal, Signal
from prism_control.state.events import Event, SandboxChanged
from prism_control.state.machine import Machine
from prism_control.state.snapshot import encode_snapshot

Listener = Callable[[list[Event]], None]


class Replica:
    """Applies the driver's entries to a machine, which a received snapshot replaces."""

    def __init__(self) -> None:
        self.machine = Machine()
        #: Notified after each entry that changed something.
        self.changed = Signal()
        #: Notified, by id, of each sandbox that an entry changed.
        self.sandbox_changed = KeyedSignal()
        #: Told of each entry's changes, in order.
        self.listener: Listener | None = None

    def apply(self, index: int, data: bytes) -> object:
        """Apply one entry; return the results of its items."""
        results, events = self.machine.apply(index, data)
        if events:
            if self.listener is not None:
                self.listener(events)
            self.sandbox_changed.notify_each(
                event.row.id for event in events if isinstance(event, SandboxChanged)
            )
            self.changed.notify()
        return results

    def snapshot(self) -> Callable[[], Iterable[bytes]]:
        """Return what encodes the state as of now."""
        view = self.machine.snapshot_view()
        return lambda: encode_snapshot(view)

    def restore(self, chunks: Iterable[bytes]) -> Callable[[], None]:
        """Read a snapshot, in any thread; calling what comes back, on the loop, becomes it."""
        machine = Machine.from_snapshot(chunks)

        def become() -> None:
            self.machine = machine
            self.sandbox_changed.notify_all()
            self.changed.notify()

        return become
