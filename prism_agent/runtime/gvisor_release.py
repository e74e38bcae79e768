"""Which runsc is used: one that is new enough, wherever it lies."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Final

#: The oldest that was seen to work. Debian 12's, of 2022, has no statx: coreutils break in it.
OLDEST: Final = 20240729
#: Names a runsc that is to be used, and no other.
VARIABLE: Final = "PRISM_RUNSC"
#: Where deploy/fetch_gvisor.sh puts it.
_PLACES: Final = ("/usr/local/lib/prism/runsc", "~/.local/lib/prism/runsc")
_TIMEOUT_S: Final = 10.0
_HOW: Final = "deploy/fetch_gvisor.sh gets one"


class NoRunscError(Exception):
    """There is none that can be used; the text says why, for people."""


@dataclass(frozen=True, slots=True)
class Runsc:
    """One that is new enough."""

    path: str
    version: str


def find_runsc() -> Runsc:
    """Return the first that is new enough: $PRISM_RUNSC alone, or of PATH and our own places.

    Raises:
        NoRunscError: There is none.
    """
    named = os.environ.get(VARIABLE)
    places = [named] if named else [shutil.which("runsc") or "", *_PLACES]
    refusals: list[str] = []
    for place in places:
        path = os.path.expanduser(place)
        if path and (named or os.access(path, os.X_OK)):
            try:
                return _check(path)
            except NoRunscError as refusal:
                refusals.append(f"{VARIABLE}: {refusal}" if named else str(refusal))
    if refusals:
        raise NoRunscError("; ".join(refusals))
    raise NoRunscError(f"runsc is not installed: {_HOW}")


def _check(path: str) -> Runsc:
    try:
        done = subprocess.run(  # noqa: S603
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NoRunscError(f"{path} does not run: {error}") from None
    said = done.stdout.strip().splitlines()
    match = re.match(r"runsc version (\S*?(\d{8})\S*)", said[0]) if said else None
    if match is None:
        shown = said[0] if said else "nothing"
        raise NoRunscError(f"{path} does not say its release, but {shown!r}: {_HOW}")
    if int(match[2]) < OLDEST:
        raise NoRunscError(f"{path} is of release {match[1]}; {OLDEST} or later is needed: {_HOW}")
    return Runsc(path, match[1])
