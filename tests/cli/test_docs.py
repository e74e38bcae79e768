"""docs/cli.md says what `prismctl` has."""

import re
from pathlib import Path

import typer

from prism_cli.main import app
from tests.cli.test_words import walk

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_has_every_command_with_its_words_and_an_example_of_its_help() -> None:
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| `(.+)` \|$", PAGE.read_text(), re.MULTILINE)
    root = typer.main.get_command(app)
    assert [row[0] for row in rows] == [" ".join(path) for path in walk(root)]
    for words, what, example in rows:
        command = root
        for word in words.split():
            command = command.commands[word]  # type: ignore[attr-defined]
        text = command.help or ""
        assert " ".join(text.split()).startswith(what), words
        assert example.startswith(f"prismctl {words}")
        assert f"  {example}\n" in f"{text}\n", words
