"""What the reconciler has done: the edge performs these, and tells what came of them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _OfOne:
    """What is to be done with one sandbox."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class _WithGrace(_OfOne):
    """The same, where its processes are asked to end before they are killed."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class Start(_OfOne):
    """Make it, or make it again with its files."""


@dataclass(frozen=True, slots=True)
class Stop(_WithGrace):
    """SIGTERM, the grace period, SIGKILL; keep the files."""


@dataclass(frozen=True, slots=True)
class Pause(_OfOne):
    """Freeze its processes."""


@dataclass(frozen=True, slots=True)
class Resume(_OfOne):
    """Thaw its processes."""


@dataclass(frozen=True, slots=True)
class Delete(_WithGrace):
    """Stop it if it runs, and leave nothing of it."""


@dataclass(frozen=True, slots=True)
class Hurry(_WithGrace):
    """Shorten the grace period of the stop under way."""


@dataclass(frozen=True, slots=True)
class Update(_OfOne):
    """The deadline changed: keep it, and set the timer anew."""


@dataclass(frozen=True, slots=True)
class Resize(_OfOne):
    """What it may use changed: keep that, and hold it to it if it has processes."""


@dataclass(frozen=True, slots=True)
class Report(_OfOne):
    """Tell the leader how it is."""


@dataclass(frozen=True, slots=True)
class Forget(_OfOne):
    """Drop its record: the leader knows that nothing is left."""


Action = Start | Stop | Pause | Resume | Delete | Hurry | Update | Resize | Report | Forget
