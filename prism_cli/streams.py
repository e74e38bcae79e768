"""Exec streams: bytes both ways, signals, and attaching again where the connection breaks.

The main thread writes what comes, and runs the signal handlers; others read responses, take
requests from an outbox, and read standard input.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

import grpc
from google.protobuf.empty_pb2 import Empty
from prism.sandbox.v1 import sandbox_pb2 as pb

from prism_cli.calls import Stream
from prism_cli.client import FINAL_REASONS, Backoff, Client, Deadline, resume_wait_s
from prism_cli.errors import CliError, LeavingError, UnreachableError, say
from prism_cli.terminal import DetachKeys, LocalTerminal
from prism_common.errors import PrismError
from prism_common.status import RemoteError

FORWARDED_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_READ_BYTES: Final = 64 * 1024
#: Chunks of standard input between the reader and the network: 512 KiB at most.
_STDIN_CHUNKS_MAX: Final = 8
#: Input given to the network this long before it broke has arrived: a connection that answers no
#: keep-alive is torn down sooner.
_INPUT_SETTLED_S: Final = 30.0
#: The command whose reader is gone is told so, if that takes no longer than this.
_SIGPIPE_TIMEOUT_S: Final = 2.0


class _Outbox:
    """Requests of one stream. Signal handlers put into it: SimpleQueue allows that."""

    def __init__(self, kind: Callable[..., Any], first: Any, on_input: Callable[[], None]) -> None:
        self._kind = kind
        self._first = first
        self._on_input = on_input
        self._items: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()

    def put(self, field: str, value: Any) -> None:
        self._items.put((field, value))

    def close(self) -> list[tuple[str, Any]]:
        """End the stream's requests; return what was not sent."""
        unsent = []
        while True:
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                unsent.append(item)
        self._items.put(None)
        return unsent

    def __iter__(self) -> Iterator[Any]:
        yield self._kind(start=self._first)
        while (item := self._items.get()) is not None:
            field, value = item
            if field == "stdin":
                self._on_input()
            yield self._kind(**{field: value})


class ExecSession:
    """One exec, followed to its end over as many connections as that takes.

    Args:
        client: The connection; its timeout bounds the start, and each gap.
        sandbox: Id or exact name.
        start: What to run, or None to attach to `exec_id`.
        exec_id: The exec to attach to.
        after_sequence: Output up to here is not shown again.
        stdin: Send standard input.
        forward_signals: Send signals to the exec; else they end this program only.
        terminal: The terminal that the exec has. With `stdin` it is raw while the exec runs: keys
            are bytes, and signals, which then are not keys, end this program only.
        detach_keys: Ctrl-P Ctrl-Q ends this program, and leaves the exec running.
    """

    def __init__(
        self,
        client: Client,
        sandbox: str,
        start: pb.ExecStart | None,
        *,
        exec_id: str = "",
        after_sequence: int = 0,
        stdin: bool = False,
        forward_signals: bool = True,
        terminal: LocalTerminal | None = None,
        detach_keys: bool = True,
    ) -> None:
        self.exec_id = exec_id
        self._client = client
        self._sandbox = sandbox
        self._start = start
        self._sequence = after_sequence
        self._stdin = stdin
        self._terminal = terminal
        self._raw_terminal = terminal if stdin else None
        self._forward_signals = forward_signals and self._raw_terminal is None
        self._detach_keys = DetachKeys() if self._raw_terminal and detach_keys else None
        self._detaching = False
        self._size_sent: tuple[int, int] | None = None
        self._outbox: _Outbox | None = None
        self._outbox_lock = threading.Lock()
        self._call: Stream[pb.ExecResponse] | None = None
        self._slots = threading.BoundedSemaphore(_STDIN_CHUNKS_MAX)
        self._started = threading.Event()
        self._live = False  # a signal can reach the exec now
        self._input_sent_at: float | None = None
        self._eof_sent = False
        self._patience: Deadline | None = None
        self._late = False

    def run(self) -> pb.ExecExit:
        """Follow the exec; return how it ended.

        Raises:
            RemoteError: The server refused, or the sandbox is gone.
            CliError: The connection stays broken. The exec's end is then not known.
            LeavingError: A signal ended this program and not the exec.
            BrokenPipeError: Nobody reads the output; the exec was told (SIGPIPE).
        """
        if self._stdin:
            threading.Thread(target=self._pump_stdin, daemon=True, name="stdin").start()
        backoff = Backoff()
        with self._signals(), self._terminal_given_back():
            while True:
                before = self._sequence
                try:
                    ended = self._follow()
                except BrokenPipeError:
                    self._tell_broken_pipe()
                    raise
                except (RemoteError, UnreachableError) as error:
                    self._end_stream()
                    if self._sequence > before:
                        backoff, self._patience = Backoff(), None
                    self._wait_to_resume(error, backoff)
                    continue
                finally:
                    self._live = False
                self._end_stream(keep=False)
                return ended

    def start_detached(self) -> str:
        """Start the exec and return its id, without following it."""
        backoff = Backoff()
        with self._signals():
            while not self.exec_id:
                try:
                    for response in self._responses():
                        if response.WhichOneof("response") == "started":
                            self.exec_id = response.started.exec_id
                            break
                    else:
                        raise CliError("the server ended the stream before the exec started")
                except (RemoteError, UnreachableError) as error:
                    self._end_stream()
                    self._wait_to_resume(error, backoff)
        self._end_stream(keep=False)
        return self.exec_id

    # ── One stream ───────────────────────────────────────────────────────────────────────────

    def _follow(self) -> pb.ExecExit:
        for response in self._responses():
            kind = response.WhichOneof("response")
            if kind == "started":
                self.exec_id = response.started.exec_id or self.exec_id
                self._begin()
            elif kind == "output":
                self._write(response.output)
            elif kind == "exit":
                return response.exit
        raise _ended_early(self._client)

    def _responses(self) -> Iterator[pb.ExecResponse]:
        """Open the stream and yield its responses; a start must be answered within the timeout."""
        attaching = bool(self.exec_id)
        call = self._call = self._open()
        watchdog = threading.Timer(self._client.timeout_s, self._give_up, [call])
        watchdog.daemon = True
        if attaching:  # the attach itself carries signals, and a quiet exec sends nothing
            self._begin()
        else:
            watchdog.start()
        try:
            for response in call:
                watchdog.cancel()
                yield response
        except grpc.RpcError as error:
            if self._late:
                raise CliError(
                    f"{self._client.address} did not start it within {self._client.timeout_s:g} s"
                ) from None
            raise self._client.failure(error) from None
        finally:
            watchdog.cancel()

    def _begin(self) -> None:
        """Let input and signals through: the exec runs."""
        self._live = True
        if self._raw_terminal is not None:
            self._raw_terminal.enter_raw()
        self._send_size()
        self._started.set()

    def _send_size(self) -> None:
        """Tell the exec the terminal's size, if it has another one."""
        if self._terminal is None or self._outbox is None or not self._live:
            return
        size = self._terminal.size()
        if size != self._size_sent:
            self._size_sent = size
            self._outbox.put("resize", pb.WindowSize(rows=size[0], columns=size[1]))

    def _open(self) -> Stream[pb.ExecResponse]:
        self._size_sent = None
        if self.exec_id:
            first = pb.AttachStart(
                sandbox=self._sandbox, exec_id=self.exec_id, after_sequence=self._sequence
            )
            outbox = self._replace_outbox(pb.AttachExecRequest, first)
            return self._client.converse(lambda stubs: stubs.sandboxes.AttachExec, outbox)
        if self._start is not None and self._start.HasField("terminal"):
            self._size_sent = (self._start.terminal.rows, self._start.terminal.columns)
        outbox = self._replace_outbox(pb.ExecRequest, self._start)
        return self._client.converse(lambda stubs: stubs.sandboxes.Exec, outbox)

    def _replace_outbox(self, kind: Callable[..., Any], first: Any) -> _Outbox:
        new = _Outbox(kind, first, self._on_input)
        with self._outbox_lock:
            for field, value in self._outbox.close() if self._outbox is not None else ():
                if field not in ("stdin_eof", "resize"):  # both are sent anew
                    new.put(field, value)
            self._outbox = new
            if self._eof_sent:
                new.put("stdin_eof", Empty())
        return new

    def _end_stream(self, keep: bool = True) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if not keep and self._outbox is not None:
            self._outbox.close()

    def _give_up(self, call: Stream[pb.ExecResponse]) -> None:
        self._late = True
        call.cancel()

    def _write(self, output: pb.ExecOutput) -> None:
        """Write a piece of output raw, without what was written before."""
        data = output.data
        if output.sequence:
            if output.sequence <= self._sequence:
                return
            begins = output.sequence - len(data)
            if begins > self._sequence:
                self._say(f"{begins - self._sequence} bytes of older output are no longer kept")
            data = data[max(0, self._sequence - begins) :]
        to_stderr = output.stream == pb.OUTPUT_STREAM_STDERR
        write_all(2 if to_stderr else 1, data)
        self._sequence = output.sequence or self._sequence + len(data)

    # ── A broken connection ──────────────────────────────────────────────────────────────────

    def _wait_to_resume(self, error: RemoteError | UnreachableError, backoff: Backoff) -> None:
        """Wait before the next connection, or raise where there must be none."""
        if isinstance(error, UnreachableError) and not self.exec_id:
            raise error  # nothing was started, and the search for a server had its own time
        self._patience = self._patience or Deadline(self._client.timeout_s)
        wait_s = resume_wait_s(error, backoff)
        if wait_s is None:
            raise self._final(error)
        if wait_s > self._patience.left_s:
            if self.exec_id:
                raise CliError(
                    f"lost the connection to exec {self.exec_id} ({error.message}); how it ended "
                    f"is not known; attach again: {self._attach_line()}"
                )
            raise error
        self._check_input()
        self._client.try_next_address()
        time.sleep(wait_s)

    def _final(self, error: PrismError) -> PrismError:
        """Say what a failure that ends the conversation means for the command."""
        if error.code in FINAL_REASONS:
            what = f"sandbox {self._sandbox} is gone"
        elif self._started.is_set() and self._start is not None:
            what = f"lost exec {self.exec_id}"
        else:
            return error
        error.message = f"{what}, and how the command ended is not known: {error.message}"
        return error

    def _check_input(self) -> None:
        """Refuse to go on where a part of piped input may be missing; warn a person who types.

        No reply says which input arrived.
        """
        if self._input_sent_at is None or not self.exec_id:
            return
        if not _is_terminal(0) and time.monotonic() - self._input_sent_at < _INPUT_SETTLED_S:
            raise CliError(
                "the connection broke while standard input was sent, and a part may be missing; "
                f"exec {self.exec_id} goes on: {self._attach_line()}"
            )
        self._say("the connection broke; the input of the last moments may be missing")

    def _attach_line(self) -> str:
        flags = "-it " if self._raw_terminal is not None else ""
        return f"prismctl sandbox attach {flags}{self._sandbox} {self.exec_id}"

    def _say(self, line: str) -> None:
        """Write a line for people; a raw terminal does not go to its beginning by itself."""
        raw = self._raw_terminal is not None and self._raw_terminal.is_raw
        if raw:
            write_all(2, b"\r")
        say(line)
        if raw:
            write_all(2, b"\r")

    # ── Standard input, signals, pipes ───────────────────────────────────────────────────────

    def _pump_stdin(self) -> None:
        self._started.wait()  # before, a retry of the start could send it twice
        while True:
            self._slots.acquire()
            try:
                data = os.read(0, _READ_BYTES)
            except OSError:
                data = b""  # closed, or a terminal of another process group
            detach = False
            if self._detach_keys is not None:
                kept, detach = self._detach_keys.feed(data)
                if not kept and not detach and data:  # half of the keys
                    self._slots.release()
                    continue
                data = kept
            if detach:
                self._detaching = True
                main = threading.main_thread().ident
                if main is not None:
                    signal.pthread_kill(main, signal.SIGQUIT)
                return
            with self._outbox_lock:
                if self._outbox is None:
                    return
                if not data:
                    self._eof_sent = True
                    self._outbox.put("stdin_eof", Empty())
                    return
                self._outbox.put("stdin", data)

    def _on_input(self) -> None:
        self._input_sent_at = time.monotonic()
        self._slots.release()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        handled = (*FORWARDED_SIGNALS, signal.SIGQUIT)
        of_terminal = (signal.SIGWINCH, signal.SIGCONT) if self._terminal is not None else ()
        before = {number: signal.getsignal(number) for number in (*handled, *of_terminal)}
        for number in handled:
            # nohup stays nohup; the detach keys need SIGQUIT, also where a shell ignored it.
            if number == signal.SIGQUIT or before[number] is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        for number in of_terminal:
            signal.signal(number, self._on_terminal_changed)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _terminal_given_back(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._raw_terminal is not None:
                self._raw_terminal.restore()

    def _on_terminal_changed(self, number: int, _frame: FrameType | None) -> None:
        """Follow a new size; after a stop by a signal the shell has made the terminal its own."""
        if number == signal.SIGCONT and self._raw_terminal is not None and self._live:
            self._raw_terminal.enter_raw()
        self._send_size()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        r"""Pass a signal on; where it cannot reach the exec, it ends this program.

        SIGQUIT (Ctrl-\) always does: it is the way out that leaves the exec running.
        """
        reaches = self._live and self._forward_signals and number != signal.SIGQUIT
        if reaches and self._outbox is not None:
            self._outbox.put("signal", number)
            return
        if self._raw_terminal is not None and self._raw_terminal.is_raw:
            self._raw_terminal.restore()
            write_all(2, b"\n")
        if self.exec_id:
            say(f"exec {self.exec_id} goes on: {self._attach_line()}")
        leaving = LeavingError(number)
        if self._detaching:
            leaving.exit_status = 0
        raise leaving

    def _tell_broken_pipe(self) -> None:
        """End a command whose output nobody reads, as a local pipe would."""
        self._end_stream(keep=False)
        request = pb.SignalExecRequest(
            sandbox=self._sandbox, exec_id=self.exec_id, signal=signal.SIGPIPE
        )
        with suppress(PrismError):  # else it blocks on its output, and ends with the sandbox
            self._client.call(lambda stubs: stubs.sandboxes.SignalExec, request, _SIGPIPE_TIMEOUT_S)


def _ended_early(client: Client) -> RemoteError:
    """Return the failure of a stream that ended without an exit status: as if it broke."""
    from google.rpc import status_pb2

    failure = RemoteError(
        status_pb2.Status(
            code=grpc.StatusCode.UNAVAILABLE.value[0],
            message=f"{client.address} ended the stream before the command ended",
        )
    )
    return failure


def exit_status(ended: pb.ExecExit) -> int:
    """Return the shell's status of an exec: its own, or 128 + the signal that ended it."""
    if ended.signal and not ended.exit_code:
        return 128 + ended.signal
    return ended.exit_code


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes, unbuffered."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            _wait_writable(descriptor)


def _wait_writable(descriptor: int) -> None:
    import select

    select.select([], [descriptor], [])


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False
