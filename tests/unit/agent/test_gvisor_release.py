"""Which runsc is used, and what is said of one that is not."""

from pathlib import Path

import pytest

from prism_agent.runtime import gvisor_release
from prism_agent.runtime.gvisor_release import NoRunscError, find_runsc


def fake(path: Path, says: str) -> Path:
    """Write a program that says what a runsc says of itself."""
    path.write_text(f"#!/bin/sh\n[ $1 = --version ] && printf '%s' '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(gvisor_release.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(gvisor_release, "_PLACES", (str(tmp_path / "own" / "runsc"),))
    (tmp_path / "bin").mkdir()
    (tmp_path / "own").mkdir()


def test_none_is_said_with_what_gets_one() -> None:
    with pytest.raises(NoRunscError, match=r"not installed: deploy/fetch_gvisor\.sh gets one"):
        find_runsc()


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("runsc version 0.0~20240729.0\nspec: 1.2.0\n", "0.0~20240729.0"),
        ("runsc version release-20250312.0\nspec: 1.1.0-rc.1\n", "release-20250312.0"),
    ],
)
def test_one_that_is_new_enough_is_taken(tmp_path: Path, says: str, version: str) -> None:
    path = fake(tmp_path / "bin" / "runsc", says)
    assert find_runsc() == gvisor_release.Runsc(str(path), version)


def test_an_old_one_is_refused_by_its_version(tmp_path: Path) -> None:
    fake(tmp_path / "bin" / "runsc", "runsc version 0.0~20221219.0\n")
    with pytest.raises(NoRunscError, match=r"0\.0~20221219\.0; 20240729 or later is needed"):
        find_runsc()


def test_an_old_one_on_the_path_does_not_hide_a_fetched_one(tmp_path: Path) -> None:
    fake(tmp_path / "bin" / "runsc", "runsc version 0.0~20221219.0\n")
    fetched = fake(tmp_path / "own" / "runsc", "runsc version 0.0~20240729.0\n")
    assert find_runsc().path == str(fetched)


def test_the_one_that_is_named_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path / "own" / "runsc", "runsc version 0.0~20240729.0\n")
    monkeypatch.setenv(gvisor_release.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(NoRunscError, match=r"PRISM_RUNSC: .*nowhere does not run"):
        find_runsc()


@pytest.mark.parametrize("says", ["", "crun version 1.8\n", "runsc version VERSION_MISSING\n"])
def test_one_that_does_not_say_its_release_is_refused(tmp_path: Path, says: str) -> None:
    fake(tmp_path / "bin" / "runsc", says)
    with pytest.raises(NoRunscError, match="does not say its release"):
        find_runsc()
