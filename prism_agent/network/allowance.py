"""What a client may ask for: so many a second, and some that it has saved up."""

import time


class Allowance:
    """See the module.

    Args:
        rate: A second.
        most: That can be saved up; as many there are in the beginning.
    """

    def __init__(self, rate: float, most: float) -> None:
        self._rate, self._most = rate, most
        self._left, self._time_s = most, time.monotonic()

    def take(self) -> bool:
        """Take one, if there is one."""
        now_s = time.monotonic()
        self._left = min(self._most, self._left + (now_s - self._time_s) * self._rate)
        self._time_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True
