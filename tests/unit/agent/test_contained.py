"""What runtimes have in common."""

from pathlib import Path

from prism_agent.journal import Journal
from prism_agent.runtime.contained import START_LOG, Contained
from tests.unit.agent.test_journal import make


def test_what_was_said_at_a_start_is_read_from_its_end_however_long_it_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    record = make("sb-1")
    contained = Contained(journal, None)
    assert contained.explain(record) == "it said nothing"
    log = journal.directory("sb-1") / START_LOG
    log.parent.mkdir(parents=True)
    log.write_bytes(b"short\n")
    assert contained.explain(record) == "short"
    # A taken-over kernel of a sandbox has it open; to read all of it would take the agent's memory.
    with log.open("r+b") as file:
        file.truncate(1 << 40)
        file.seek(0, 2)
        file.write(b"the end\n")
    assert contained.explain(record).lstrip("\0") == "the end"
    journal.close()
