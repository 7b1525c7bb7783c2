"""The guest's serial console, as a stream of bytes that pexpect searches."""

import re
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pexpect import EOF, TIMEOUT
from pexpect.socket_pexpect import SocketSpawn

_CHUNK = 1 << 16
_LOG_LIMIT = 8 << 20

_PANIC = b"Kernel panic - not syncing"
# The kernel's own lines begin with a time (and the caller, if so configured); a file or a
# command's output may well contain the same words.
_STAMP = r"\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? "
_STAMP_BEFORE = re.compile(_STAMP.encode() + rb"\Z")
_PANIC_LINE = re.compile(_STAMP + _PANIC.decode())
_FIRST_SIGN = re.compile(
    _STAMP + r"((?:BUG: |Internal error: |Unable to handle |Oops: |Kernel panic - ).*)"
)
_ANYTHING = re.compile(rb".+", re.DOTALL)


if TYPE_CHECKING:
    _BytesSpawn = SocketSpawn[bytes]
else:
    _BytesSpawn = SocketSpawn


class ConsoleClosed(Exception):
    """QEMU closed its end of the console."""


class ConsoleTimeout(Exception):
    """Nothing that was waited for appeared in time."""


class PanicSeen(Exception):
    """The guest's kernel said that it panicked."""


class _Stream(_BytesSpawn):
    """pexpect on a socket; keeps what it reads, and takes a QEMU that died for an end."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, maxread=_CHUNK)
        self.log = bytearray()
        self.listeners: list[Callable[[bytes], None]] = []

    def read_nonblocking(self, size: int = 1, timeout: float | None = None) -> bytes:
        try:
            data = super().read_nonblocking(size, max(timeout or 0, 0))
        except BlockingIOError:
            raise TIMEOUT("nothing to read") from None
        except ConnectionError:
            self.flag_eof = True
            raise EOF("connection lost") from None
        self.keep(data)
        return data

    def keep(self, data: bytes) -> None:
        self.log += data
        if len(self.log) > 2 * _LOG_LIMIT:
            del self.log[:-_LOG_LIMIT]
        for listener in tuple(self.listeners):
            listener(data)


class Console:
    """One end of the guest's console: `connection` is a stream socket, which the caller closes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = _Stream(connection)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, data: bytes) -> None:
        """Send bytes to the guest; raises `ConsoleClosed`."""
        try:
            self._connection.sendall(data)
        except ConnectionError:
            raise ConsoleClosed from None

    def wait_for(self, *patterns: bytes, timeout: float) -> tuple[int, bytes]:
        """Wait for the first of `patterns`; returns its index and the bytes before it.

        `timeout` is in seconds. Raises `ConsoleTimeout`, `ConsoleClosed` or `PanicSeen`.
        """
        deadline = time.monotonic() + timeout
        before = b""
        while True:
            try:
                left = max(deadline - time.monotonic(), 0)
                index = self._stream.expect_exact([*patterns, _PANIC], timeout=left)
            except TIMEOUT:
                raise ConsoleTimeout from None
            except EOF:
                raise ConsoleClosed from None
            before += self._stream.before or b""
            if index < len(patterns):
                return index, before
            if _STAMP_BEFORE.search(before[-40:]):
                raise PanicSeen
            before += _PANIC

    def receive(self, timeout: float) -> bytes:
        """Take whatever comes within `timeout` seconds, and at once what is already there.

        Raises `ConsoleTimeout` when that is nothing, and `ConsoleClosed`.
        """
        try:
            self._stream.expect([_ANYTHING], timeout=timeout)
        except TIMEOUT:
            raise ConsoleTimeout from None
        except EOF:
            raise ConsoleClosed from None
        data = self._stream.after
        assert isinstance(data, bytes)
        return data

    def drain(self, timeout: float) -> None:
        """Read into the log until the stream ends, or for `timeout` seconds."""
        if self._connection.fileno() < 0:
            return
        deadline = time.monotonic() + timeout
        try:
            while True:
                self.receive(max(deadline - time.monotonic(), 0))
        except (ConsoleTimeout, ConsoleClosed):
            return

    def note(self, line: str) -> None:
        """Write a line into the log, as if the console had shown it."""
        self._stream.keep(line.encode(errors="replace") + b"\n")

    def listen(self, listener: Callable[[bytes], None]) -> Callable[[], None]:
        """Call `listener` with what the console shows from now on. Returns the function that ends it."""
        self._stream.listeners.append(listener)
        return lambda: self._stream.listeners.remove(listener)

    def text(self) -> str:
        """What the console has shown (the last megabytes of it), lines ended by LF."""
        return normalise(bytes(self._stream.log))

    def panic_reason(self) -> str | None:
        """The kernel's first line about the oops or panic; None if it did not panic."""
        text = self.text()
        if not _PANIC_LINE.search(text):
            return None
        sign = _FIRST_SIGN.search(text)
        return sign[1] if sign else None


def normalise(data: bytes) -> str:
    """Decode console bytes; the serial driver's CR LF becomes LF."""
    return data.decode(errors="replace").replace("\r\n", "\n")
