"""A server of an SMMU and two engines, and what plays QEMU for it, all in the thread of the test."""

import mmap
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from tests.client import CONFIG, Client
from viommu.layouts.test_engine import EngineCommand, UserFrame, offset_of, user_frame
from viommu.server import Server
from viommu.trace import Event, Tracer

BASE = 0x4000_0000
RAM = 4 << 20
COMMAND, MEMORY_SPACE, BUS_MASTER = 0x04, 1 << 1, 1 << 2
FUNCTIONS = (
    SimpleNamespace(name="smmu", model="smmuv3", stream_id=0x08),
    SimpleNamespace(name="engine0", model="test-engine", stream_id=0x10),
    SimpleNamespace(name="engine1", model="test-engine", stream_id=0x18),
)
HALTED, ERROR, RAND48 = EngineCommand.HALTED, EngineCommand.ERROR, EngineCommand.RAND48


class Function(Client):
    """A client on one function, as QEMU is one."""

    def set_bus_master(self, on: bool) -> None:
        value = MEMORY_SPACE | (BUS_MASTER if on else 0)
        self.write(CONFIG, COMMAND, value.to_bytes(2, "little"))

    def get(self, offset: int, size: int = 4) -> int:
        return self.read_int(0, offset, size)

    def put(self, offset: int, value: int, size: int = 4) -> None:
        self.write(0, offset, value.to_bytes(size, "little"))

    def prepare(self, frame: int = 0, **fields: int) -> None:
        """Fill in the frame of an engine but for its command."""
        whole = UserFrame(**{"stride": 1, **fields}).value.to_bytes(128, "little")
        self.write(0, user_frame(frame) + 8, whole[8:])
        self.write(0, user_frame(frame) + 4, whole[4:8])

    def fill(self, size: int, *, frame: int = 0, at: int = BASE, **fields: int) -> None:
        """Prepare a frame of an engine to fill `size` bytes."""
        self.prepare(frame, begin=at, end_incl=at + size - 1, **fields)

    def start(self, frame: int = 0, command: int = RAND48) -> None:
        self.put(user_frame(frame), command)

    def status(self, frame: int = 0) -> EngineCommand:
        return EngineCommand(self.get(user_frame(frame)))

    def field(self, field: Any, frame: int = 0) -> int:
        return self.get(user_frame(frame) + offset_of(field), field.mask.bit_length() // 8)


class Machine:
    """The server, guest RAM in a memfd, and the trace; `connect` plugs a function in."""

    def __init__(
        self,
        directory: Path,
        *,
        msix: bool = False,
        seed: int = 0,
        functions: Any = FUNCTIONS,
        **options: Any,
    ) -> None:
        self.events: list[Event] = []
        tracer = Tracer()
        tracer.subscribe(self.events.append)
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, RAM)
        self.ram = mmap.mmap(self.fd, RAM)
        self.server = Server(functions, directory, tracer=tracer, msix=msix, seed=seed, **options)
        self.directory = directory
        self._clients: list[Client] = []

    def connect(self, name: str, *, shared: bool = True, bus_master: bool = False) -> Function:
        """A client that has mapped guest RAM, or has told of RAM that it keeps to itself."""
        client = Function(self.server.sockets[name], self.server.turn)
        self._clients.append(client)
        client.say_version()
        self.server.turn()
        client.receive()
        client.map(BASE, RAM, self.fd if shared else None)
        if bus_master:
            client.set_bus_master(True)
        return client

    def run(self) -> int:
        """Let the models work until they have nothing to do; returns the number of steps."""
        steps = 0
        while self.server.turn():
            steps += 1
            assert steps < 100_000
        return steps

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def word(self, address: int) -> int:
        value: int = struct.unpack_from("<Q", self.ram, address - BASE)[0]
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        self.server.close()
        self.ram.close()
        os.close(self.fd)


Make = Callable[..., Machine]


def names(events: Sequence[Event], *kinds: str) -> list[str]:
    """The functions of the events of these kinds, in order."""
    return [getattr(event, "function", "") for event in events if event.kind in kinds]
