"""Names and ids by how they begin, at almost no cost to the changes, which are many.

Keys are kept in chunks as they come. A lookup halves its way through the chunks that are sorted,
reads the others, and sorts one of them for those that come after it: so nothing is ever sorted
where nobody looks up, and nothing takes long. Removed keys stay for a while; whoever looks up tells
which live.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

#: Keys in a chunk. To read or to sort one takes a millisecond or two.
_CHUNK_MAX: Final = 4096
#: After so many removals one chunk, in turn, is rid of what lives no more.
_REMOVALS_A_SWEEP: Final = 2048


class _Chunk:
    """Some of the keys."""

    __slots__ = ("is_sorted", "keys")

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.is_sorted = False

    def beginning_with(self, prefix: str) -> list[str]:
        """Return the keys that begin so."""
        keys = self.keys
        if not self.is_sorted:
            return [key for key in keys if key.startswith(prefix)]
        first = last = bisect_left(keys, prefix)
        while last < len(keys) and keys[last].startswith(prefix):
            last += 1
        return keys[first:last]


class PrefixIndex:
    """Keys, with those that were removed for a while."""

    def __init__(self) -> None:
        #: The last takes what is added, and is not sorted.
        self._chunks = [_Chunk()]
        self._removals = 0
        #: The chunk to be swept next.
        self._broom = 0

    def __len__(self) -> int:
        """Return how many keys are kept, with those that were removed."""
        return sum(len(chunk.keys) for chunk in self._chunks)

    def add(self, *keys: str) -> None:
        """Add keys."""
        last = self._chunks[-1]
        if len(last.keys) + len(keys) > _CHUNK_MAX:
            self._chunks.append(last := _Chunk())
        last.keys += keys

    def remove(self, count: int, lives: Callable[[str], object]) -> None:
        """Take note that some keys live no more.

        Args:
            count: How many.
            lives: Whether a key does.
        """
        self._removals += count
        if self._removals >= _REMOVALS_A_SWEEP:
            self._removals = 0
            self._sweep(lives)

    def beginning_with(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin so, in no order; also such as live no more, or twice."""
        for chunk in self._chunks[:-1]:
            if not chunk.is_sorted:
                chunk.keys.sort()
                chunk.is_sorted = True
                break  # the next lookup sorts the next
        for chunk in self._chunks:
            yield from chunk.beginning_with(prefix)

    def _sweep(self, lives: Callable[[str], object]) -> None:
        """Rid one chunk of what lives no more, and join it with the next where one holds both."""
        chunks = self._chunks
        if self._broom >= len(chunks):
            self._broom = 0
        chunk = chunks[self._broom]
        chunk.keys = [key for key in chunk.keys if lives(key)]
        after = chunks[self._broom + 1 : self._broom + 2]
        if not after or len(chunk.keys) + len(after[0].keys) > _CHUNK_MAX:
            self._broom += 1
            return
        chunk.keys += after[0].keys
        chunk.is_sorted = chunk.is_sorted and after[0].is_sorted
        if chunk.is_sorted:
            chunk.keys.sort()  # which finds two sorted runs, and merges them
        del chunks[self._broom + 1]

    def check(self) -> None:
        """Verify the invariants of the fields.

        Raises:
            AssertionError: One of them is broken.
        """
        sound = not self._chunks[-1].is_sorted and all(
            len(chunk.keys) <= _CHUNK_MAX
            and (not chunk.is_sorted or chunk.keys == sorted(chunk.keys))
            for chunk in self._chunks
        )
        if not sound:
            raise AssertionError("the index of prefixes is broken")
