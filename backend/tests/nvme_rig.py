"""An NVMe controller over plain guest memory, and what a driver does with it, in raw words of the specification.

Nothing here comes from `viommu.layouts`: a wrong bit there must show.
"""

import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.engine_rig import BASE, RecordingPort
from viommu.endpoints.nvme.controller import NvmeController
from viommu.endpoints.nvme.store import BlockStore, RamDisk
from viommu.memory import GuestMemory
from viommu.trace import Event, Tracer

PAGE, BLOCK = 4096, 512
CAP, VS, INTMS, INTMC, CC, CSTS, AQA, ASQ, ACQ = 0x0, 0x8, 0xC, 0x10, 0x14, 0x1C, 0x24, 0x28, 0x30
RDY, CFS = 1, 2
ENABLE = 1 | 6 << 16 | 4 << 20
ADMIN_ENTRIES, IO_ENTRIES = 32, 64

DELETE_SQ, CREATE_SQ, GET_LOG, DELETE_CQ, CREATE_CQ, IDENTIFY = 0, 1, 2, 4, 5, 6
ABORT, SET_FEATURES, GET_FEATURES, ASYNC_EVENT = 8, 9, 10, 12
FLUSH, WRITE, READ, COMPARE, WRITE_ZEROES, DATASET = 0, 1, 2, 5, 8, 9

BLOCK_TYPE, BUCKET, SEGMENT, LAST, KEYED, TRANSPORT = 0x00, 0x10, 0x20, 0x30, 0x40, 0x50
SGL, SGL_AND_METADATA_SGL = 0x40, 0x80
"""Flags of a command."""

ASQ_AT, ACQ_AT = BASE, BASE + 0x1000
DATA = BASE + 0x10_0000


class Completion(NamedTuple):
    """`status` is status code type and status code; `dnr` Do Not Retry."""

    command_id: int
    status: int
    result: int
    sq_id: int
    sq_head: int
    dnr: bool


def command(
    opcode: int,
    *dwords: int,
    nsid: int = 0,
    prp1: int = 0,
    prp2: int = 0,
    cid: int = 0,
    flags: int = 0,
) -> bytes:
    """A submission queue entry; `dwords` are those from 10 on."""
    head = struct.pack("<BBHIQQQQ", opcode, flags, cid, nsid, 0, 0, prp1, prp2)
    return head + struct.pack("<6I", *dwords, *(0,) * (6 - len(dwords)))


def descriptor(kind: int, address: int, size: int) -> bytes:
    """An SGL descriptor."""
    return struct.pack("<QI3xB", address, size, kind)


def block(address: int, size: int) -> bytes:
    """A Data Block descriptor."""
    return descriptor(BLOCK_TYPE, address, size)


class Queue:
    """A pair of queues as a driver has it."""

    def __init__(self, rig: "NvmeRig", queue_id: int, sq: int, cq: int, entries: int) -> None:
        self._rig, self.id, self.sq, self.cq, self.entries = rig, queue_id, sq, cq, entries
        self.tail = self.head = 0
        self._phase = 1
        self._next = 0

    def put(self, entry: bytes) -> int:
        """Write an entry with a Command Identifier of our own, which is returned; no doorbell."""
        cid, self._next = self._next, (self._next + 1) & 0xFFFF
        self._rig.write(self.sq + 64 * self.tail, entry[:2] + cid.to_bytes(2, "little") + entry[4:])
        self.tail = (self.tail + 1) % self.entries
        return cid

    def ring(self, tail: int | None = None) -> None:
        self._rig.doorbell(2 * self.id, self.tail if tail is None else tail)

    def completions(self, *, ring: bool = True) -> list[Completion]:
        """What has come since the last call."""
        found = []
        while True:
            raw = self._rig.read(self.cq + 16 * self.head, 16)
            result, _, sq_head, sq_id, cid, status = struct.unpack("<IIHHHH", raw)
            if status & 1 != self._phase:
                break
            found.append(
                Completion(cid, status >> 1 & 0x7FF, result, sq_id, sq_head, bool(status >> 15))
            )
            self.head += 1
            if self.head == self.entries:
                self.head, self._phase = 0, 1 - self._phase
        if found and ring:
            self._rig.doorbell(2 * self.id + 1, self.head)
        return found

    def do_later(self, opcode: int, *dwords: int, nsid: int = 0, prp1: int = 0) -> None:
        """One command, whose completion nobody looks at yet."""
        self.put(command(opcode, *dwords, nsid=nsid, prp1=prp1))
        self.ring()
        self._rig.drain()

    def do(
        self,
        opcode: int,
        *dwords: int,
        nsid: int = 0,
        prp1: int = 0,
        prp2: int = 0,
        flags: int = 0,
    ) -> Completion:
        """One command, to its end."""
        cid = self.put(command(opcode, *dwords, nsid=nsid, prp1=prp1, prp2=prp2, flags=flags))
        self.ring()
        self._rig.drain()
        (completion,) = self.completions()
        assert completion.command_id == cid
        return completion

    def do_sgl(self, opcode: int, blocks: int, sgl1: bytes, *, flags: int = SGL) -> Completion:
        """A command for the first blocks, to its end, with the first descriptor of its SGL."""
        first, second = struct.unpack("<QQ", sgl1)
        return self.do(opcode, 0, 0, blocks - 1, nsid=1, prp1=first, prp2=second, flags=flags)


class NvmeRig:
    """The controller enabled, with an admin queue; `io` makes a pair of I/O queues."""

    def __init__(
        self,
        store: BlockStore | None = None,
        *,
        ram: int = 4 << 20,
        enable: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ram = bytearray(ram)
        memory = GuestMemory()
        memory.add_region(BASE, ram, memoryview(self.ram))
        self.port = RecordingPort(memory)
        self.store = store or RamDisk(1 << 20)
        self.events: list[Event] = []
        tracer = Tracer()
        tracer.subscribe(self.events.append)
        self.nvme = NvmeController(self.port, self.store, tracer=tracer, clock=clock)
        self.interrupts: list[int] = []
        self.nvme.interrupt = self._interrupt
        if enable:
            self.enable()

    def _interrupt(self, vector: int) -> bool:
        self.interrupts.append(vector)
        return True

    def enable(self) -> None:
        self.set(AQA, ADMIN_ENTRIES - 1 | ADMIN_ENTRIES - 1 << 16)
        self.set(ASQ, ASQ_AT, 8)
        self.set(ACQ, ACQ_AT, 8)
        self.write(ACQ_AT, bytes(16 * ADMIN_ENTRIES))
        self.set(CC, ENABLE)
        self.admin = Queue(self, 0, ASQ_AT, ACQ_AT, ADMIN_ENTRIES)

    def io(self, queue_id: int = 1, *, cq: int | None = None, entries: int = IO_ENTRIES) -> Queue:
        """A pair of I/O queues; interrupts by the vector of the same number."""
        sq_at, cq_at = (BASE + 0x1_0000 * part + 0x2000 * queue_id for part in (4, 8))
        self.write(cq_at, bytes(16 * entries))
        size = entries - 1 << 16
        done = self.admin.do(CREATE_CQ, queue_id | size, 3 | queue_id << 16, prp1=cq_at)
        assert done.status == 0
        done = self.admin.do(CREATE_SQ, queue_id | size, 1 | queue_id << 16, prp1=sq_at)
        assert done.status == 0
        return Queue(self, queue_id, sq_at, cq_at, entries)

    # What software does

    def write(self, address: int, data: bytes) -> None:
        self.ram[address - BASE : address - BASE + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        return bytes(self.ram[address - BASE : address - BASE + size])

    def get(self, offset: int, size: int = 4) -> int:
        return self.nvme.read(0, offset, size)

    def set(self, offset: int, value: int, size: int = 4) -> None:
        self.nvme.write(0, offset, size, value)

    def doorbell(self, index: int, value: int) -> None:
        self.set(0x1000 + 4 * index, value)

    def drain(self) -> int:
        """Step until nothing is left to do; how often."""
        steps = 0
        while self.nvme.busy:
            self.nvme.step()
            steps += 1
            assert steps < 100_000
        return steps
