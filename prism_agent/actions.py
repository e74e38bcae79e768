"""What the reconciler has done: the edge performs these, and tells what came of them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Start:
    """Make it, or make it again with its files."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGTERM, the grace period, SIGKILL; keep the files."""

    sandbox_id: str
    grace_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Freeze its processes."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Thaw its processes."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Stop it if it runs, and leave nothing of it."""

    sandbox_id: str
    grace_s: float


@dataclass(frozen=True, slots=True)
class Hurry:
    """Shorten the grace period of the stop under way."""

    sandbox_id: str
    grace_s: float


@dataclass(frozen=True, slots=True)
class Update:
    """The deadline changed: keep it, and set the timer anew."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class Resize:
    """What it may use changed: keep that, and hold it to it if it has processes."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the leader how it is."""

    sandbox_id: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop its record: the leader knows that nothing is left."""

    sandbox_id: str


Action = Start | Stop | Pause | Resume | Delete | Hurry | Update | Resize | Report | Forget
