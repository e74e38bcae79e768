"""How many files a daemon may have open."""

import contextlib
import resource


def allow_most() -> None:
    """Raise this process's limit of open files to the most that it is allowed.

    Shells and systemd start programs with 1,024, for the sake of `select`, which nothing here uses.
    A leader has a connection for each agent and client, an agent two files for each sandbox.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Where the kernel's own bound (fs.nr_open) has been lowered since, it stays as it is.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
