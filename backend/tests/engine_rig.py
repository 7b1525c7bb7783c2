"""A test engine over plain guest memory, and the accesses that software makes to it."""

import random
from typing import Any

from viommu.endpoints.pattern import PAGE
from viommu.endpoints.port import DmaAttributes, DmaFault, DmaPort, Transfer
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.layouts.test_engine import (
    EngineCommand,
    PrivilegedFrame,
    UserFrame,
    offset_of,
    privileged_frame,
    user_frame,
)
from viommu.memory import GuestMemory
from viommu.trace import Event, Tracer

BASE = 0x4000_0000
MEMCPY, RAND48, SUM64 = EngineCommand.MEMCPY, EngineCommand.RAND48, EngineCommand.SUM64
HALTED, ERROR = EngineCommand.HALTED, EngineCommand.ERROR
MISCONFIGURED = EngineCommand.FRAME_MISCONFIGURED


class RecordingPort(DmaPort):
    """A port without an SMMU that keeps a record; the pages in `holes` do not translate."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory, stream_id=0x10)
        self.bus_master = True
        self.holes: set[int] = set()
        self.seen: list[tuple[int, int, bool, int | None, DmaAttributes]] = []

    def begin(
        self,
        iova: int,
        size: int,
        *,
        write: bool,
        substream_id: int | None = None,
        attributes: DmaAttributes = DmaAttributes(),  # noqa: B008 – as the original has it
    ) -> Transfer:
        for page in range(iova & -PAGE, iova + size, PAGE):
            if page in self.holes:
                if page <= iova:
                    raise DmaFault(iova, 0, "a hole")
                size = page - iova
                break
        self.seen.append((iova, size, write, substream_id, attributes))
        return super().begin(
            iova, size, write=write, substream_id=substream_id, attributes=attributes
        )


class Machine:
    """An engine, its RAM, and the accesses that software makes."""

    def __init__(self, size: int = 1 << 20, order: random.Random | None = None) -> None:
        self.ram = bytearray(size)
        self.memory = GuestMemory()
        self.memory.add_region(BASE, size, memoryview(self.ram))
        self.port = RecordingPort(self.memory)
        self.events: list[Event] = []
        tracer = Tracer()
        tracer.subscribe(self.events.append)
        self.engine = SmmuTestEngine(self.port, order=order, tracer=tracer)
        self.interrupts: list[int] = []
        self.engine.interrupt = self._interrupt
        self.connected = True

    def _interrupt(self, vector: int) -> bool:
        self.interrupts.append(vector)
        return self.connected

    def get(self, field: Any, frame: int = 0) -> int:
        """A field, read with accesses of at most 8 bytes."""
        base = (
            privileged_frame(frame)
            if field in PrivilegedFrame.fields.values()
            else user_frame(frame)
        )
        size: int = max(1, field.mask.bit_length() // 8)
        mask: int = field.mask
        return self.engine.read(0, base + offset_of(field), size) & mask

    def start(self, command: int, frame: int = 0, **fields: int) -> int:
        """Fill the frame in, write `cmd` and read it back, as the drivers do."""
        privileged = {
            name: fields.pop(name)
            for name in ("substreamid", "downstream_port_index", "streamid")
            if name in fields
        }
        for name, value in privileged.items():
            field = PrivilegedFrame.fields[name]
            self.engine.write(0, privileged_frame(frame) + offset_of(field), 4, value)
        user = UserFrame(**{"stride": 1, **fields})
        for offset in range(8, 128, 8):
            if offset != offset_of(UserFrame.count_of_transactions_launched):
                self.engine.write(
                    0, user_frame(frame) + offset, 8, user.value >> 8 * offset & 2**64 - 1
                )
        self.engine.write(0, user_frame(frame) + 4, 4, user.value >> 32 & 2**32 - 1)
        self.engine.write(0, user_frame(frame), 4, command)
        return self.get(UserFrame.cmd, frame)

    def run(self, command: int, frame: int = 0, **fields: int) -> int:
        """Start and step to the end."""
        self.start(command, frame, **fields)
        self.drain()
        return self.get(UserFrame.cmd, frame)

    def drain(self) -> int:
        steps = 0
        while self.engine.busy:
            self.engine.step()
            steps += 1
            assert steps < 1_000_000
        assert self.port.in_flight == 0
        return steps

    def fill(self, seed: int = 1) -> None:
        self.ram[:] = random.Random(seed).randbytes(len(self.ram))


def span(start: int, size: int) -> dict[str, int]:
    return {"begin": BASE + start, "end_incl": BASE + start + size - 1}
