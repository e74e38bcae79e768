"""The index of beginnings finds what a scan finds, whatever was added, removed and looked up."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prism_common.errors import AmbiguousError
from prism_control.state import commands as c
from prism_control.state import prefixes
from prism_control.state.machine import Machine
from prism_control.state.prefixes import PrefixIndex
from prism_control.state.snapshot import encode_snapshot
from tests.unit.state.builders import Driver, create

KEYS = st.text("ab", min_size=1, max_size=6)


class Beginnings(RuleBasedStateMachine):
    """Beside a set, with chunks so small that all happens often."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(prefixes, "_CHUNK_MAX", 4)
        self.patch.setattr(prefixes, "_REMOVALS_A_SWEEP", 2)
        self.index = PrefixIndex()
        self.live: set[str] = set()

    def teardown(self) -> None:
        """Let others have chunks of the usual size."""
        self.patch.undo()

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3))
    def add(self, keys: list[str]) -> None:
        """Some keys come, or come again."""
        self.index.add(*keys)
        self.live |= set(keys)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """A key goes."""
        if self.live:
            self.live.discard(data.draw(st.sampled_from(sorted(self.live))))
            self.index.remove(1, self.live.__contains__)

    @rule(prefix=KEYS)
    def look_up(self, prefix: str) -> None:
        """What is found and lives is what a scan finds."""
        found = {key for key in self.index.beginning_with(prefix) if key in self.live}
        assert found == {key for key in self.live if key.startswith(prefix)}

    @invariant()
    def is_sound(self) -> None:
        """Sorted is what is said to be."""
        self.index.check()


TestBeginnings = Beginnings.TestCase


def test_what_was_removed_does_not_stay_for_ever() -> None:
    index, live = PrefixIndex(), set()
    for number in range(50_000):
        index.add(f"k{number}")
        live.add(f"k{number}")
        if number >= 10_000:
            live.discard(f"k{number - 10_000}")
            index.remove(1, live.__contains__)
    assert len(live) == 10_000
    assert len(index) < 4 * len(live)


def test_lookups_sort_a_chunk_each_and_no_more() -> None:
    index = PrefixIndex()
    for number in range(5 * prefixes._CHUNK_MAX):
        index.add(f"k{number:06}")
    done = [chunk.is_sorted for chunk in index._chunks]
    assert done == [False] * 5
    for lookups in range(1, 5):
        assert list(index.beginning_with("k000001")) == ["k000001"]
        assert sum(chunk.is_sorted for chunk in index._chunks) == lookups
    list(index.beginning_with("k"))
    assert not index._chunks[-1].is_sorted  # it is still added to


def test_a_name_that_was_given_again_belongs_to_its_new_owner() -> None:
    driver = Driver()
    driver.run(create("sb-1", name="apple"), c.DeleteSandbox("", b"", "apple"))
    driver.run(create("sb-2", name="apple"))
    assert driver.machine.find_sandbox("app").id == "sb-2"


def test_a_restored_machine_finds_the_same() -> None:
    driver = Driver()
    driver.run(*(create(f"sb-{n}x", name=f"n{n}x") for n in range(20)))
    driver.run(c.DeleteSandbox("", b"", "n19x"))
    view = driver.machine.snapshot_view()
    for machine in (driver.machine, Machine.from_snapshot(encode_snapshot(view))):
        assert machine.find_sandbox("n18").id == machine.find_sandbox("sb-18").id == "sb-18x"
        for prefix in ("n1", "sb-1"):
            with pytest.raises(AmbiguousError, match="10 fit"):  # and not 19, which is DELETED
                machine.find_sandbox(prefix)


def test_very_many_that_fit_are_not_counted() -> None:
    driver = Driver()
    driver.run(*(create(f"sb-{n}", name=f"n{n}") for n in range(1200)))
    with pytest.raises(AmbiguousError, match="1000 or more fit"):
        driver.machine.find_sandbox("sb-")
