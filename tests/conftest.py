"""For all tests: the system's own tools (ip, nft) are found where a user's PATH lacks them.

And signals do what they do by default, also where a shell that started the tests with & ignores
some: an ignored signal is inherited by all that tests start.
"""

import os
import signal

import hypothesis

os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

# How long one example takes says more of what else the machine does.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")
