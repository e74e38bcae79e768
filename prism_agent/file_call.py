"""One call on a sandbox's files: a thread that is the sandbox's user, and what it has open."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

from prism_agent.tree import Tree, become
from prism_common.errors import SandboxGoneError

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class FileCall:
    """Runs blocking work on a `Tree`, a step at a time.

    The thread is this call's own and ends with it: it has given up the agent's rights, and no work
    of another sandbox or of the agent may ever run in it.

    Args:
        root: Descriptor of the sandbox's root directory; the call's from now on.
        uid: The host's user that the sandbox runs as; 0 for an agent without root.
        on_close: Called once when it is closed.
        in_use: Held while the call lasts.
    """

    def __init__(
        self,
        root: int,
        uid: int,
        on_close: Callable[["FileCall"], None],
        in_use: contextlib.AbstractContextManager[None],
    ) -> None:
        self._uid = uid
        self._on_close = on_close
        self._ended = threading.Event()
        self._tree = Tree(root, self._ended.is_set)
        self._executor = ThreadPoolExecutor(1, "prism-files")
        self._became = False
        self._closing: asyncio.Future[None] | None = None
        self._in_use = contextlib.ExitStack()
        self._in_use.enter_context(in_use)

    async def __aenter__(self) -> "FileCall":
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self.end()

    async def run(
        self,
        work: Callable[Concatenate[Tree, _Parameters], _Result],
        *arguments: _Parameters.args,
        **named: _Parameters.kwargs,
    ) -> _Result:
        """Do a step of work in the call's thread.

        Raises:
            SandboxGoneError: The sandbox ended.
        """
        if self._closing is not None:
            raise SandboxGoneError("the sandbox ended")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: self._step(work, *arguments, **named)
        )

    def _step(
        self,
        work: Callable[Concatenate[Tree, _Parameters], _Result],
        *arguments: _Parameters.args,
        **named: _Parameters.kwargs,
    ) -> _Result:
        if self._ended.is_set():
            raise SandboxGoneError("the sandbox ended")
        if not self._became:
            become(self._uid)
            self._became = True
        return work(self._tree, *arguments, **named)

    def end(self) -> "asyncio.Future[None]":
        """Let go of the sandbox after the step under way; the result is set when that is done."""
        if self._closing is None:
            self._ended.set()
            loop = asyncio.get_running_loop()
            # In the thread, and after its last step: nobody else touches what it has open.
            self._closing = loop.run_in_executor(self._executor, self._close)
            self._executor.shutdown(wait=False)
            self._in_use.close()
            self._on_close(self)
        return self._closing

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._tree.close()
