"""How many files a daemon may have open."""

import contextlib
import resource


def allow_most() -> None:
    """Raise this process's limit of open files to the most that it is allowed.

    Shells and systemd start programs with 1,024, for the sake of `select`, which nothing here uses.
    A leader has a connection for each agent and client, an agent two files for each sandbox.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
