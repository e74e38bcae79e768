"""The files of a fake sandbox: a real directory, and what a hostile one might answer."""

import contextlib
import os
import stat
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from google.rpc import status_pb2
from prism.sandbox.v1 import sandbox_pb2 as pb
from prism.sandbox.v1 import sandbox_pb2_grpc

from prism_common import errors

_CHUNK = 1 << 20


class FakeFiles(sandbox_pb2_grpc.SandboxServiceServicer):
    """File calls of every sandbox, on one directory. `_begin` and `_abort` are the server's."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fake-files-")
        self.root = Path(self._directory.name)
        (self.root / "workspace").mkdir()
        #: Entries that a listing has beside those that are there, by path.
        self.hostile: dict[str, list[pb.FileInfo]] = {}
        #: For each read or write to come: after how many bytes it fails, and how.
        self.file_breaks: deque[tuple[int, errors.PrismError | status_pb2.Status]] = deque()
        #: A write waits for it after each message, if it is set.
        self.write_gate: threading.Event | None = None
        #: Writes that ended without being complete.
        self.writes_cut = 0

    def close_files(self) -> None:
        if self.write_gate is not None:
            self.write_gate.set()
        self._directory.cleanup()

    def inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _begin(self, method: str, request: Any, context: Any) -> None:
        raise NotImplementedError

    def _abort(self, context: Any, failure: errors.PrismError | status_pb2.Status) -> None:
        raise NotImplementedError

    def _try(self, context: Any, path: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except FileNotFoundError:
            self._abort(
                context, errors.NotFoundError(f"{path!r}: no such file", reason="FILE_NOT_FOUND")
            )
        except OSError as error:
            self._abort(
                context, errors.WrongStateError(f"{path!r}: {error.strerror}", reason="FILE_WRONG")
            )

    def _info(self, path: str) -> pb.FileInfo:
        status = os.lstat(self.inside(path))
        kind = {
            stat.S_IFREG: pb.FILE_TYPE_REGULAR,
            stat.S_IFDIR: pb.FILE_TYPE_DIRECTORY,
            stat.S_IFLNK: pb.FILE_TYPE_SYMLINK,
        }.get(stat.S_IFMT(status.st_mode), pb.FILE_TYPE_OTHER)
        info = pb.FileInfo(
            path=path, type=kind, size_bytes=status.st_size, mode=stat.S_IMODE(status.st_mode)
        )
        info.modify_time.FromNanoseconds(status.st_mtime_ns)
        if kind == pb.FILE_TYPE_SYMLINK:
            info.link_target = os.readlink(self.inside(path))
        return info

    def StatFile(self, request: Any, context: Any) -> pb.FileInfo:
        self._begin("StatFile", request, context)
        found: pb.FileInfo = self._try(context, request.path, lambda: self._info(request.path))
        return found

    def ListFiles(self, request: Any, context: Any) -> pb.ListFilesResponse:
        self._begin("ListFiles", request, context)
        path = request.path.rstrip("/")
        names = self._try(context, path, lambda: sorted(os.listdir(self.inside(path))))
        files = [self._info(f"{path}/{name}") for name in names]
        return pb.ListFilesResponse(files=files + self.hostile.get(path, []))

    def ReadFile(self, request: Any, context: Any) -> Iterator[pb.ReadFileResponse]:
        self._begin("ReadFile", request, context)
        left, how = self.file_breaks.popleft() if self.file_breaks else (-1, None)
        data = self._try(context, request.path, self.inside(request.path).read_bytes)
        for first in range(0, len(data), _CHUNK):
            if how is not None and first >= left:
                self._abort(context, how)
            yield pb.ReadFileResponse(data=data[first : first + _CHUNK])

    def WriteFile(self, request_iterator: Any, context: Any) -> pb.FileInfo:
        first = next(request_iterator)
        self._begin("WriteFile", first, context)
        left, how = self.file_breaks.popleft() if self.file_breaks else (-1, None)
        data = bytearray(first.data)
        try:
            for request in request_iterator:
                data += request.data
                if self.write_gate is not None:
                    self.write_gate.wait(20)
                if how is not None and len(data) > left:
                    self._abort(context, how)
        except Exception:
            with self._changing():
                self.writes_cut += 1
            raise
        path = self.inside(first.path)

        def place() -> None:
            path.write_bytes(data)
            path.chmod(first.mode or 0o644)
            if first.HasField("modify_time"):
                os.utime(path, ns=(first.modify_time.ToNanoseconds(),) * 2)

        self._try(context, first.path, place)
        return self._info(first.path)

    def _changing(self) -> contextlib.AbstractContextManager[None]:
        """Whoever waits for a change looks again after it."""
        raise NotImplementedError

    def MakeDirectory(self, request: Any, context: Any) -> pb.FileInfo:
        self._begin("MakeDirectory", request, context)
        path = self.inside(request.path)

        def make() -> None:
            if not path.is_dir():
                path.mkdir(parents=request.parents)
                path.chmod(request.mode or 0o755)

        self._try(context, request.path, make)
        return self._info(request.path)

    def MakeLink(self, request: Any, context: Any) -> pb.FileInfo:
        self._begin("MakeLink", request, context)
        path = self.inside(request.path)
        path.unlink(missing_ok=True)
        self._try(context, request.path, lambda: path.symlink_to(request.target))
        return self._info(request.path)
