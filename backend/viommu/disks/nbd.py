"""A client of the NBD protocol: a block store that another process keeps.

The protocol is that of the NetworkBlockDevice project, with fixed newstyle negotiation, NBD_OPT_GO and simple replies.
"""

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import Any

from viommu.closing import Closing
from viommu.disks.flusher import Flusher
from viommu.endpoints.transfers import Steps

_GREETING = struct.Struct(">8s8sH")  # NBDMAGIC, IHAVEOPT, flags
_OPTION = struct.Struct(">8sII")  # IHAVEOPT, option, length
_OPTION_REPLY = struct.Struct(">QIII")  # magic, option, type, length
_EXPORT = struct.Struct(">HQH")  # NBD_INFO_EXPORT, size, flags
_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_REPLY = struct.Struct(">IIQ")  # magic, error, cookie

_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO = 7
_REP_ACK, _REP_INFO, _REP_ERROR = 1, 3, 1 << 31
_INFO_EXPORT = 0
_REQUEST_MAGIC, _REPLY_MAGIC = 0x2560_9513, 0x6744_6698
_READ_ONLY, _SEND_WRITE_ZEROES, _MULTI_CONN = 1 << 1, 1 << 6, 1 << 8
_NEEDED = _SEND_WRITE_ZEROES | _MULTI_CONN
_LARGEST_DATA = 32 << 20  # that every server takes in one request
_LARGEST_ZEROES = 1 << 30


class _Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    WRITE_ZEROES = 6


class NbdError(OSError):
    """The server does not speak the protocol, or not as it must for us."""


class NbdDisk(Closing):
    """The default export of the server to which `connect` makes a connection: two of them, one for flushes alone.

    Raises `OSError` when a connection ends, and `NbdError`. See `Flusher` for `wake`.
    """

    def __init__(
        self, connect: Callable[[], socket.socket], wake: Callable[[], None] = lambda: None
    ) -> None:
        self._session = _Session(connect())
        try:
            self._flushes = _Session(connect())
        except BaseException:
            self._session.close()
            raise
        self._flusher = Flusher(lambda: self._flushes.ask(_Command.FLUSH), wake)
        self.size = self._session.size

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what is at `offset`."""
        while buffer:
            part = buffer[:_LARGEST_DATA]
            self._session.ask(_Command.READ, offset, len(part))
            self._session.fill(part)
            offset, buffer = offset + len(part), buffer[len(part) :]

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data`. It lasts from the next `flush` on."""
        while data:
            part = data[:_LARGEST_DATA]
            self._session.ask(_Command.WRITE, offset, len(part), part)
            offset, data = offset + len(part), data[len(part) :]

    def zero(self, offset: int, size: int) -> None:
        """Make it zeros, which may take no room in the image."""
        while size:
            part = min(size, _LARGEST_ZEROES)
            self._session.ask(_Command.WRITE_ZEROES, offset, part)
            offset, size = offset + part, size - part

    def flush(self, offset: int = 0, size: int | None = None) -> Steps:  # noqa: ARG002
        """Make what was written last."""
        return self._flusher.flush()

    def close(self) -> None:
        """Tell the server, and end the connections. Any number of times."""
        self._flusher.close()
        self._flushes.close()
        self._session.close()


class _Session(Closing):
    """A connection, which is the session's from now on."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._cookie = 0
        try:
            self.size = self._negotiate()
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        if self._connection.fileno() >= 0:
            with suppress(OSError):  # it may be gone already
                self._send(_Command.DISC, 0, 0)
            self._connection.close()

    def ask(
        self, command: _Command, offset: int = 0, size: int = 0, data: memoryview | None = None
    ) -> None:
        """Send a request and wait for its reply; what data that has is the caller's to take."""
        self._send(command, offset, size)
        if data is not None:
            self._connection.sendall(data)
        magic, error, cookie = self._take(_REPLY)
        if (magic, cookie) != (_REPLY_MAGIC, self._cookie):
            raise NbdError("the NBD server sent something else than a reply")
        if error:  # Linux's numbers
            raise OSError(error, os.strerror(error))

    def _send(self, command: _Command, offset: int, size: int) -> None:
        self._cookie += 1
        self._connection.sendall(
            _REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, offset, size)
        )

    def _negotiate(self) -> int:
        magic, options, flags = self._take(_GREETING)
        if (magic, options) != (b"NBDMAGIC", b"IHAVEOPT") or not flags & _FIXED_NEWSTYLE:
            raise NbdError("this is no NBD server with fixed newstyle negotiation")
        request = struct.pack(">IH", 0, 0)  # of the export without a name, nothing in particular
        self._connection.sendall(
            struct.pack(">I", _FIXED_NEWSTYLE | flags & _NO_ZEROES)
            + _OPTION.pack(b"IHAVEOPT", _OPT_GO, len(request))
            + request
        )
        size, transmission = None, 0
        while True:
            _, _, kind, length = self._take(_OPTION_REPLY)
            payload = self._receive(length)
            if kind == _REP_INFO and payload.startswith(struct.pack(">H", _INFO_EXPORT)):
                _, size, transmission = _EXPORT.unpack(payload)
            elif kind & _REP_ERROR:
                said = payload.decode(errors="replace")
                raise NbdError(f"the NBD server refuses: {said or hex(kind)}")
            elif kind == _REP_ACK:
                break
        if size is None or transmission & (_READ_ONLY | _NEEDED) != _NEEDED:
            raise NbdError(
                "the NBD server offers no disk that can be written, zeroed, and flushed by another connection: "
                "qemu-nbd does from QEMU 7.1 on"
            )
        return int(size)

    def _take(self, shape: struct.Struct) -> tuple[Any, ...]:
        return shape.unpack(self._receive(shape.size))

    def _receive(self, size: int) -> bytes:
        data = bytearray(size)
        self.fill(memoryview(data))
        return bytes(data)

    def fill(self, buffer: memoryview) -> None:
        while buffer:
            count = self._connection.recv_into(buffer, flags=socket.MSG_WAITALL)
            if not count:
                raise ConnectionResetError("the NBD server ended the connection")
            buffer = buffer[count:]
