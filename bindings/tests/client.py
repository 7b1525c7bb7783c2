"""The client side of vfio-user, as little of it as the tests need, over a real socket.

Message layouts: the vfio-user specification (QEMU's docs/interop/vfio-user.rst).
"""

import array
import enum
import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

HEADER = struct.Struct("<HHIII")  # message id, command, size of the message, flags, errno
FLAG_REPLY, FLAG_NO_REPLY, FLAG_ERROR = 1, 1 << 4, 1 << 5
IRQ_DATA_EVENTFD, IRQ_ACTION_TRIGGER = 1 << 2, 1 << 5
IRQ_DATA_NONE, IRQ_ACTION_MASK, IRQ_ACTION_UNMASK = 1 << 0, 1 << 3, 1 << 4
CONFIG = 7


class Command(enum.IntEnum):
    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DEVICE_RESET = 13


class RegionInfo(NamedTuple):
    flags: int
    size: int


class Client:
    """One connection.

    `serve` is called between a request and its reply, so that a server in the same thread can
    work. An error reply is raised as OSError, a closed connection as ConnectionError.
    """

    def __init__(self, path: Path, serve: Callable[[], object] = lambda: None) -> None:
        self.serve = serve
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(os.fspath(path))
        self._message_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        self._message_id = self._message_id + 1 & 0xFFFF
        size = HEADER.size + len(payload)
        header = HEADER.pack(self._message_id, command, size, flags, 0)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([header + payload], rights)

    def receive(self) -> bytes:
        header = self._exactly(HEADER.size)
        message_id, _, size, flags, error = HEADER.unpack(header)
        payload = self._exactly(size - HEADER.size)
        if flags & FLAG_ERROR:
            raise OSError(error, os.strerror(error))
        assert flags & FLAG_REPLY, "the server answers with a reply"
        assert message_id == self._message_id, "the reply belongs to the request"
        return payload

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise ConnectionError("the server closed the connection")
            data += part
        return data

    def request(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        self.send(command, payload, fds)
        self.serve()
        return self.receive()

    def say_version(self, major: int = 0) -> None:
        capabilities = {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20}
        text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
        self.send(Command.VERSION, struct.pack("<HH", major, 0) + text)

    def read(self, region: int, offset: int, length: int) -> bytes:
        reply = self.request(Command.REGION_READ, struct.pack("<QII", offset, region, length))
        assert len(reply) == 16 + length
        return reply[16:]

    def read_int(self, region: int, offset: int, length: int) -> int:
        return int.from_bytes(self.read(region, offset, length), "little")

    def write(self, region: int, offset: int, data: bytes) -> None:
        access = struct.pack("<QII", offset, region, len(data))
        self.request(Command.REGION_WRITE, access + data)

    def post(self, region: int, offset: int, data: bytes) -> None:
        """A write without a reply, as QEMU does it to memory BARs."""
        access = struct.pack("<QII", offset, region, len(data))
        self.send(Command.REGION_WRITE, access + data, flags=FLAG_NO_REPLY)

    def map(
        self, iova: int, size: int, fd: int | None = None, offset: int = 0, rights: int = 3
    ) -> None:
        payload = struct.pack("<IIQQQ", 32, rights, offset, iova, size)
        self.request(Command.DMA_MAP, payload, [] if fd is None else [fd])

    def unmap(self, iova: int, size: int) -> None:
        self.request(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, iova, size))

    def set_eventfds(self, index: int, eventfds: Sequence[int], start: int = 0) -> None:
        flags = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER
        payload = struct.pack("<IIIII", 20, flags, index, start, len(eventfds))
        self.request(Command.DEVICE_SET_IRQS, payload, eventfds)

    def mask(self, index: int, masked: bool) -> None:
        """Mask vector 0, or unmask it: QEMU does the latter when it lets go of the pin."""
        flags = IRQ_DATA_NONE | (IRQ_ACTION_MASK if masked else IRQ_ACTION_UNMASK)
        self.request(Command.DEVICE_SET_IRQS, struct.pack("<IIIII", 20, flags, index, 0, 1))

    def region_info(self, region: int) -> RegionInfo:
        payload = struct.pack("<IIIIQQ", 32, 0, region, 0, 0, 0)
        reply = self.request(Command.DEVICE_GET_REGION_INFO, payload)
        _, flags, _, _, size, _ = struct.unpack_from("<IIIIQQ", reply)
        return RegionInfo(flags, size)

    def irq_count(self, index: int) -> int:
        reply = self.request(Command.DEVICE_GET_IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0))
        count: int = struct.unpack("<IIII", reply)[3]
        return count

    def reset(self) -> None:
        self.request(Command.DEVICE_RESET)
