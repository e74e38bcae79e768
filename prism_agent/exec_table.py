"""The execs of one sandbox by each of their names, and what is kept of those that have ended."""

from pathlib import Path
from typing import Final

from prism.sandbox.v1 import sandbox_pb2

from prism_agent import limits
from prism_agent.exec_record import Exec, digest_of, load_execs, sweep_rings
from prism_agent.output_room import OutputRoom
from prism_agent.removals import Removals
from prism_common.errors import NotFoundError, RequestIdReusedError

#: More is freed, rather than kept for another exec that may need none.
_SPARE_BYTES_MAX: Final = 64 * 1024


class ExecTable:
    """See the module. Execs of before a restart are in it from the beginning.

    An exec costs the same however many were run before it: what has ended is looked at once, unless
    something in the background goes on to write to its output.

    #: Invariant: each exec is in one of `_open`, `_kept` and `_bare`.

    Args:
        room: Where their files are.
    """

    def __init__(self, room: OutputRoom) -> None:
        self._by_id: dict[str, Exec] = {}
        self._by_number: dict[int, Exec] = {}
        self._by_request: dict[str, Exec] = {}
        #: Those that run, and those whose end `prune` has not seen yet. By number, as all below.
        self._open: dict[int, Exec] = {}
        #: Those that have ended and whose output is kept, the first that has ended first.
        self._kept: dict[int, Exec] = {}
        #: What the output of each takes on disk, and all together.
        self._sizes: dict[int, int] = {}
        self._kept_bytes = 0
        #: Of those kept, whose output may still grow.
        self._growing: dict[int, Exec] = {}
        #: Those whose output may be written to: they run, or something in the background does.
        self._written: dict[int, Exec] = {}
        #: Those of which only the request id and the end are known.
        self._bare: dict[int, Exec] = {}
        self._room = room
        #: One whose output on disk was given up: the next exec may have its file.
        self._spare: Exec | None = None
        #: Output on disk that was given up.
        self.removals = Removals()
        self.next_number = sweep_rings(room) + 1
        for each in load_execs(room):
            self.add(each)

    def add(self, each: Exec) -> None:
        """Take an exec that was not in it."""
        record = each.record
        self._by_id[record.exec_id] = each
        self._by_number[record.number] = each
        self._by_request[record.request_id] = each
        self._open[record.number] = self._written[record.number] = each
        self.next_number = max(self.next_number, record.number + 1)

    def drop(self, each: Exec) -> None:
        """Forget an exec, and remove its files."""
        each.input.close()
        if self._spare is each:
            self._spare = None
        number = each.record.number
        self._by_id.pop(each.record.exec_id, None)
        self._by_number.pop(number, None)
        self._by_request.pop(each.record.request_id, None)
        self._open.pop(number, None)
        self._kept.pop(number, None)
        self._growing.pop(number, None)
        self._written.pop(number, None)
        self._bare.pop(number, None)
        self._kept_bytes -= self._sizes.pop(number, 0)
        each.remove()

    def all(self) -> list[Exec]:
        """Return all execs in order of their start."""
        return list(self._by_id.values())

    def numbered(self, number: int) -> Exec | None:
        """Return the exec that the supervisor calls so."""
        return self._by_number.get(number)

    def running(self) -> list[Exec]:
        """Return the execs that run."""
        return [each for each in self._open.values() if each.running]

    def written(self) -> list[Exec]:
        """Return the execs whose output may yet grow, up to the size of their rings.

        Also of those whose output was given up: what holds it open takes the room.
        """
        for number, each in list(self._written.items()):
            if not each.running and (each.forgotten or each.lost or each.refused):
                del self._written[number]
        return list(self._written.values())

    def get(self, exec_id: str) -> Exec:
        """Return an exec.

        Raises:
            NotFoundError: The sandbox has none of this id.
        """
        each = self._by_id.get(exec_id)
        if each is None:
            raise NotFoundError(f"no exec {exec_id} in this sandbox", field="exec_id")
        return each

    def find_request(self, start: sandbox_pb2.ExecStart) -> Exec | None:
        """Return the exec that this request has started already.

        Raises:
            RequestIdReusedError: It was another request that had this id.
        """
        known = self._by_request.get(start.request_id)
        if known is not None and known.record.digest != digest_of(start):
            raise RequestIdReusedError(
                "start.request_id: it was used in this sandbox to run something else",
                field="start.request_id",
            )
        return known

    # ── what is kept ──

    def prune(self) -> None:
        """Give up the output of the oldest execs that have ended, then their request ids."""
        for each in [each for each in self._open.values() if not each.running]:
            number = each.record.number
            del self._open[number]
            self._kept[number] = self._growing[number] = each
        for number, each in list(self._growing.items()):
            self._measure(each)
            if each.forgotten or each.lost:
                del self._growing[number]
        bytes_max = self._room.kept_bytes_max()
        while len(self._kept) > limits.EXECS_KEPT_MAX or self._kept_bytes > bytes_max:
            oldest = _first_unread(self._kept)
            if oldest is None:
                break
            self._give_up(oldest)
        while len(self._kept) + len(self._bare) > limits.REQUESTS_KEPT_MAX:
            oldest = _first_unread(self._bare)
            if oldest is None:
                break
            self.drop(oldest)

    def _measure(self, each: Exec) -> None:
        number = each.record.number
        size = each.disk_bytes()
        self._kept_bytes += size - self._sizes.get(number, 0)
        self._sizes[number] = size

    def _give_up(self, each: Exec) -> None:
        number = each.record.number
        del self._kept[number]
        self._growing.pop(number, None)
        size = self._sizes.pop(number, 0)
        self._kept_bytes -= size
        if self._room.in_memory:
            each.ring_path.unlink(missing_ok=True)
        elif self._spare is None and each.forgotten and size <= _SPARE_BYTES_MAX:
            self._spare = each
        else:
            self.removals.add(each.ring_path, size)
        self._bare[number] = each

    def take_spare(self) -> Path | None:
        """Return the ring of one whose output was given up, to be made another's; None: no."""
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        if spare.readers or spare.log_readers:
            # Somebody came when it was not gone yet.
            self.removals.add(spare.ring_path, _SPARE_BYTES_MAX)
            return None
        return spare.ring_path


def _first_unread(execs: dict[int, Exec]) -> Exec | None:
    """Return the first exec that no client follows."""
    return next((each for each in execs.values() if not each.readers), None)
