"""An SMMU over a few MiB of RAM, programmed with raw 64-bit words.

Nothing here comes from `viommu.layouts`: a wrong bit there must show. Bit positions are facts of IHI 0070 and of
DDI 0487, as Linux's `arm-smmu-v3.h` and QEMU's `smmuv3-internal.h` have them too.
"""

import struct
from collections.abc import Iterable
from typing import Final

from viommu.memory import GuestMemory
from viommu.smmu import Access, Features, Smmu, TransactionAborted, Translation
from viommu.trace import Tracer

BASE: Final = 0x8000_0000
RAM: Final = 4 << 20
STREAM: Final = 0x10
ASID: Final = 7

STRTAB: Final = BASE
COMMANDS: Final = BASE + 0x2_0000
EVENTS: Final = BASE + 0x3_0000
FREE: Final = BASE + 0x4_0000

# Register offsets.
IDR0, IDR1, IDR3, IDR5, IIDR, AIDR = 0x0, 0x4, 0xC, 0x14, 0x18, 0x1C
CR0, CR0ACK, CR1, CR2, GBPA, IRQ_CTRL, IRQ_CTRLACK = 0x20, 0x24, 0x28, 0x2C, 0x44, 0x50, 0x54
GERROR, GERRORN = 0x60, 0x64
GERROR_IRQ_CFG0, GERROR_IRQ_CFG1, GERROR_IRQ_CFG2 = 0x68, 0x70, 0x74
STRTAB_BASE, STRTAB_BASE_CFG = 0x80, 0x88
CMDQ_BASE, CMDQ_PROD, CMDQ_CONS = 0x90, 0x98, 0x9C
EVENTQ_BASE, EVENTQ_PROD, EVENTQ_CONS = 0xA0, 0x1_00A8, 0x1_00AC
EVENTQ_IRQ_CFG0, EVENTQ_IRQ_CFG1, EVENTQ_IRQ_CFG2 = 0xB0, 0xB8, 0xBC

SMMUEN, EVENTQEN, CMDQEN = 1 << 0, 1 << 2, 1 << 3

# STE, first word: V and Config.
STE_ABORT, STE_BYPASS, STE_S1, STE_S2, STE_NESTED = 0x1, 0x9, 0xB, 0xD, 0xF

# CD, first word.
TG0_4K, TG1_4K = 0 << 6, 2 << 22
EPD0, EPD1, ENDI, CD_V = 1 << 14, 1 << 30, 1 << 15, 1 << 31
AFFD, WXN, TBI0, TBI1, PAN, AA64 = 1 << 35, 1 << 36, 1 << 38, 1 << 39, 1 << 40, 1 << 41
HD, HA, STALL, RECORD, ABORT = 1 << 42, 1 << 43, 1 << 44, 1 << 45, 1 << 46
CD_PLAIN: Final = 16 | 16 << 16 | TG1_4K | CD_V | 5 << 32 | AA64 | RECORD | ABORT | ASID << 48
"""48 bits in and out on both halves, 4 KiB, faults recorded."""

# Descriptors.
TABLE, PAGE, BLOCK = 0x3, 0x3, 0x1
USER, READ_ONLY, AF, NG = 1 << 6, 1 << 7, 1 << 10, 1 << 11
PXN, UXN = 1 << 53, 1 << 54
PLAIN: Final = USER | AF | NG
"""Readable and writable by everybody, not global."""


def word(value: int) -> int:
    return value & (1 << 64) - 1


STAGE_1 = Features(
    stage_2=False,
    hyp=False,
    granules=(12,),
    httu=0,
    stall_model="terminate",
    hierarchical_disable=False,
    stage_2_execute=False,
    stage_2_write_back=False,
    break_before_make_level=0,
    range_invalidation=False,
    permission_overrides=False,
    attribute_overrides=False,
    ats=False,
    pri=False,
    atos=False,
)
"""The least that a driver can live with: stage 1 with 4 KiB pages, and faults that terminate."""


class Rig:
    """The SMMU enabled, stream `STREAM` translated by a CD with empty tables in both halves."""

    def __init__(
        self,
        features: Features | None = None,
        *,
        ram: int = RAM,
        cd: int = CD_PLAIN,
        on: int = SMMUEN | EVENTQEN | CMDQEN,
        tracer: Tracer | None = None,
    ) -> None:
        self.ram = bytearray(ram)
        self.memory = GuestMemory()
        self.memory.add_region(BASE, ram, memoryview(self.ram))
        self.interrupts = 0
        self.smmu = Smmu(self.memory, features or STAGE_1, tracer, self._interrupted)
        self._free = FREE
        self.event_log2 = self.command_log2 = 5
        self.cd_address = self.alloc(64)
        self.low = self.alloc(4096)
        self.high = self.alloc(4096)
        self.put(self.cd_address, cd, self.low, self.high)
        self.put(STRTAB + 64 * STREAM, STE_S1 | self.cd_address)
        self.program()
        self.write(CR0, on)
        self.read_events = 0

    def _interrupted(self) -> None:
        self.interrupts += 1

    def program(self) -> None:
        """All registers but the enables: a linear table of 2^8 streams, queues of 2^5 entries."""
        self.write64(STRTAB_BASE, STRTAB)
        self.write(STRTAB_BASE_CFG, 8)
        self.write(CR2, 1 << 1)
        self.write64(CMDQ_BASE, COMMANDS | self.command_log2)
        self.write64(EVENTQ_BASE, EVENTS | self.event_log2)

    # RAM

    def alloc(self, size: int, align: int = 4096) -> int:
        address = -(-self._free // align) * align
        self._free = address + size
        assert self._free <= BASE + len(self.ram)
        return address

    def put(self, address: int, *words: int) -> None:
        struct.pack_into(f"<{len(words)}Q", self.ram, address - BASE, *words)

    def get(self, address: int) -> int:
        return int.from_bytes(self.ram[address - BASE : address - BASE + 8], "little")

    # Registers

    def read(self, offset: int) -> int:
        return self.smmu.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.smmu.write(offset, 4, value)

    def read64(self, offset: int) -> int:
        return self.smmu.read(offset, 8)

    def write64(self, offset: int, value: int) -> None:
        self.smmu.write(offset, 8, value)

    # Queues

    def submit(self, *commands: tuple[int, int]) -> None:
        """Put commands into the queue, tell the SMMU, and let it run until it has nothing to do."""
        size = 1 << self.command_log2
        position = self.read(CMDQ_PROD)
        for low, high in commands:
            self.put(COMMANDS + (position & size - 1) * 16, low, high)
            position = (position + 1) & (2 * size - 1)
        self.write(CMDQ_PROD, position)
        self.run()

    def run(self) -> None:
        """Let the SMMU consume what it can."""
        for _ in range(100):
            if not self.smmu.step():
                return
        raise AssertionError("the command queue does not come to an end")

    @property
    def consumed(self) -> bool:
        """Every command was consumed."""
        mask = (2 << self.command_log2) - 1
        return not (self.read(CMDQ_PROD) ^ self.read(CMDQ_CONS)) & mask

    def events(self) -> list[bytes]:
        """The records that came since the last call. EVENTQ_CONS follows."""
        size = 1 << self.event_log2
        records = []
        cons = self.read(EVENTQ_CONS)
        while (self.read(EVENTQ_PROD) ^ cons) & (2 * size - 1):
            start = EVENTS - BASE + (cons & size - 1) * 32
            records.append(bytes(self.ram[start : start + 32]))
            cons = cons & 1 << 31 | (cons + 1) & (2 * size - 1)
        self.write(EVENTQ_CONS, cons)
        return records

    # Tables

    def map(self, address: int, leaf: int, *, level: int = 3, tables: int = 0) -> int:
        """Write the descriptor `leaf` for `address` at `level`, with the tables above it. Returns where it lies.

        `tables` are attribute bits of the table descriptors on the way that this call makes.
        """
        table = self.high if address >> 55 & 1 else self.low
        for depth in range(level):
            entry = table + (address >> 39 - 9 * depth & 511) * 8
            if not self.get(entry) & 1:
                self.put(entry, self.alloc(4096) | TABLE | tables)
            table = self.get(entry) & 0xFFFF_FFFF_F000
        entry = table + (address >> 39 - 9 * level & 511) * 8
        self.put(entry, leaf)
        return entry

    def context(self, cd: int, low: int | None = None, high: int | None = None) -> None:
        """Replace the CD of `STREAM`, and make the SMMU forget the old one and its translations."""
        self.put(self.cd_address, cd, self.low if low is None else low, high or self.high)
        self.forget()

    def forget(self) -> None:
        """CMD_CFGI_ALL, CMD_TLBI_NSNH_ALL, CMD_SYNC."""
        self.submit((0x04, 31), (0x30, 0), (0x46, 0))

    # Transactions

    def begin(self, address: int, size: int = 1, *, access: Access | None = None) -> Translation:
        return self.smmu.translate(access or Access(STREAM), address, size)

    def go(
        self,
        address: int,
        size: int = 1,
        *,
        stream: int = STREAM,
        substream: int | None = None,
        write: bool = False,
        privileged: bool = False,
        instruction: bool = False,
    ) -> list[tuple[int, int]]:
        """The physical ranges of one transaction, adjacent ones as one. It is over when this returns."""
        access = Access(stream, substream, write, privileged, instruction)
        translation = self.begin(address, size, access=access)
        self.smmu.retire(translation)
        ranges: list[tuple[int, int]] = []
        for start, length in zip(translation.runs[::2], translation.runs[1::2], strict=True):
            if ranges and sum(ranges[-1]) == start:
                ranges[-1] = ranges[-1][0], ranges[-1][1] + length
            else:
                ranges.append((start, length))
        assert sum(length for _, length in ranges) == translation.size
        return ranges

    def physical(self, address: int, **access: bool | int) -> int:
        """Where one byte goes."""
        (run,) = self.go(address, 1, **access)  # type: ignore[arg-type]
        return run[0]

    def fault(self, address: int = 0, **access: bool | int) -> bytes | None:
        """The record of a transaction that must be aborted; None when it is silent."""
        self.events()
        try:
            runs = self.go(address, 1, **access)  # type: ignore[arg-type]
        except TransactionAborted:
            records = self.events()
            assert len(records) <= 1
            return records[0] if records else None
        raise AssertionError(f"{address:#x} went through to {runs}")


def record(*words: int) -> bytes:
    """An event record of four words; those left out are 0."""
    return struct.pack("<4Q", *words, *(0,) * (4 - len(words)))


def number(event: bytes | None) -> int | None:
    """The event number of a record."""
    return None if event is None else event[0]


def configuration_record(event: int, *, stream: int = STREAM, fetch: int = 0) -> bytes:
    """The record of a configuration error without a SubstreamID."""
    return record(event | stream << 32, 0, 0, fetch)


RNW, IND, PNU = 1 << 35, 1 << 34, 1 << 33
CLASS_TT, CLASS_IN = 1 << 40, 2 << 40


def translation_record(
    event: int, address: int, *, second: int = RNW | CLASS_IN, fetch: int = 0
) -> bytes:
    """The record of a fault of translation at stage 1; a read unless `second` says otherwise."""
    return record(event | STREAM << 32, second, address, fetch)


def words(data: bytes) -> Iterable[int]:
    return struct.unpack(f"<{len(data) // 8}Q", data)
