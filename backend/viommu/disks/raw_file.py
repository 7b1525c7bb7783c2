"""A raw image, or a block device, as a block store."""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from viommu.closing import Closing
from viommu.disks.flusher import Flusher
from viommu.endpoints.transfers import Steps

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
# The bytes of an image that QEMU locks to say that it writes, and that no other may (block/file-posix.c there).
_WRITES, _ALONE = 101, 201
_FLOCK = struct.Struct("@hhqqi")  # type, whence, start, length, process


class RawFile(Closing):
    """A raw image or a block device. Raises `OSError` when it cannot be opened.

    With `size` it is made, sparse, when it is not there yet. What is written is the kernel's until `flush`. Nobody else
    who locks images as QEMU does, another server included, can write to it meanwhile. See `Flusher` for `wake`.
    """

    def __init__(
        self, path: Path, size: int | None = None, *, wake: Callable[[], None] = lambda: None
    ) -> None:
        flags = os.O_RDWR | (0 if size is None else os.O_CREAT)
        self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        self._flusher = Flusher(lambda: os.fdatasync(self._descriptor), wake)
        try:
            self._lock(path)
            self.size = os.lseek(self._descriptor, 0, os.SEEK_END)
            if self.size == 0 and size is not None:
                os.truncate(self._descriptor, size)
                self.size = size
        except BaseException:
            self.close()
            raise
        self._fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

    def _lock(self, path: Path) -> None:
        """Lock what a QEMU that wrote would lock, then see whether somebody else has locked it."""
        try:
            for byte in (_WRITES, _ALONE):
                self._byte_lock(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
            found = [
                self._byte_lock(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte)
                for byte in (_WRITES, _ALONE)
            ]
        except OSError:
            return  # not every file system has locks
        if found != [fcntl.F_UNLCK, fcntl.F_UNLCK]:
            raise OSError(errno.EBUSY, "in use by another program: end that first", os.fspath(path))

    def _byte_lock(self, command: int, kind: int, byte: int) -> int:
        """Returns what kind of lock is in the way, or was set."""
        wanted = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        answer = fcntl.fcntl(self._descriptor, command, wanted)
        return int(_FLOCK.unpack(answer)[0])

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; what lies beyond a file that has shrunk is an `OSError`."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer], offset)
            if not count:
                raise OSError(f"the file ends at {offset:#x}")
            offset, buffer = offset + count, buffer[count:]

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data`, by the page cache."""
        while data:
            count = os.pwrite(self._descriptor, data, offset)
            offset, data = offset + count, data[count:]

    def zero(self, offset: int, size: int) -> None:
        """Punch a hole, where the file system can."""
        if self._fallocate(self._descriptor, _KEEP_SIZE | _PUNCH_HOLE, offset, size):
            self.write(offset, memoryview(bytes(size)))

    def flush(self, offset: int = 0, size: int | None = None) -> Steps:  # noqa: ARG002
        """As fdatasync(2) does, for the whole file."""
        return self._flusher.flush()

    def close(self) -> None:
        """Close the file, once."""
        self._flusher.close()
        os.close(self._descriptor)
