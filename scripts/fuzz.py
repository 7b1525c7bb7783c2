"""The fuzz target: bytes become a session of a hostile guest with an SMMU, a DMA master and a function that is slow.

A session writes registers, tables and queue entries, starts, moves and ends DMA, translated by the SMMU or by the
function, asks for translations and for pages, and lets invalidations wait. Nothing but an abort or a stall may come
out, guest memory outside the regions stays as it was, and what is in flight ends.
"""

import struct
import sys
from array import array
from collections.abc import Callable
from contextlib import suppress

import atheris

with atheris.instrument_imports(include=["viommu"]):
    from viommu.endpoints.ats import ATS_CAPABILITY, ATS_ENABLE
    from viommu.endpoints.pasid import PASID_CAPABILITY, PasidService
    from viommu.endpoints.port import DmaAttributes, DmaFault, DmaPort, DmaStalled, Transfer
    from viommu.endpoints.pri import CAPACITY, PRI_CAPABILITY, PRI_ENABLE
    from viommu.layouts.commands import Opcode
    from viommu.layouts.registers import Register
    from viommu.memory import GuestMemory
    from viommu.smmu import (
        Access,
        AtsStatus,
        Features,
        InvalidateRequest,
        PageRequest,
        PageResponse,
        Smmu,
        TransactionAborted,
        Translation,
    )
    from viommu.smmu.ats_port import INVALIDATE_QUEUE_DEPTH

BASE, SIZE, MARGIN = 0x4000_0000, 0x1_0000, 0x1000
STREAM, SLOW_STREAM = 0x10, 0x11
STRTAB, COMMANDS, EVENTS, PAGES, TABLES = (
    BASE + offset for offset in (0, 0x4000, 0x6000, 0x7000, 0x8000)
)
CANARY = b"\xc5" * MARGIN
PROFILES = (
    Features(vatos=True, endpoint_pasid=True),
    Features(output_address_bits=52, caching="hostile", stall_max=2, vatos=True),
    Features(stall_model="stall", caching="none", vatos=True, endpoint_pasid=True),
    Features(
        output_address_bits=32,
        stream_id_bits=5,
        substream_id_bits=8,
        asid_bits=8,
        vmid_bits=8,
        vatos=True,
        endpoint_pasid=True,
    ),
)
REGISTERS = [int(register) for register in Register]
OPCODES = [int(opcode) for opcode in Opcode]
# The stage 2 of an STE: VMID 9, 4 KiB pages from level 1 on, AArch64, faults recorded, 32 bits in.
STAGE_2 = 9 | 32 << 32 | 1 << 38 | 1 << 51 | 1 << 58
# A CD: TTB0 alone, of 39 bits in 4 KiB pages, AArch64, faults recorded, ASID 7.
CONTEXT = 25 | 1 << 30 | 1 << 31 | 1 << 41 | 1 << 45 | 1 << 46 | 7 << 48
ENABLED = {
    ATS_CAPABILITY: struct.pack("<HH", 0, ATS_ENABLE),
    PRI_CAPABILITY: struct.pack("<HHII", PRI_ENABLE, 0, CAPACITY, 16),
    PASID_CAPABILITY: struct.pack("<HH", 0, 7),
}
"""The body of each capability with everything on."""


class SlowFunction:
    """A function that answers an invalidation when it is told to."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []

    def invalidate(self, request: InvalidateRequest, complete: Callable[[], None]) -> None:
        assert not request.address & request.size - 1, "an Invalidate Request is not aligned"
        self.pending.append(complete)

    def page_response(self, response: PageResponse) -> None:
        assert 0 <= response.prg_index < 512, "a response for no group"


class Session:
    """A guest that knows where things are, which gets it deep into the model, and otherwise does as the bytes say."""

    def __init__(self, data: bytes) -> None:
        self._data = atheris.FuzzedDataProvider(data)
        self._host = bytearray(CANARY + bytes(SIZE) + CANARY)
        self._ram = memoryview(self._host)[MARGIN : MARGIN + SIZE]
        memory = GuestMemory()
        memory.add_region(BASE, SIZE, self._ram)
        self._features = features = PROFILES[self._below(len(PROFILES))]
        self._smmu = Smmu(memory, features)
        self._port = DmaPort(memory, STREAM, self._smmu)
        self._port.bus_master = True
        if features.endpoint_pasid:
            self._port.pasid = PasidService(features.substream_id_bits)
        self._slow = SlowFunction()
        self._smmu.connect(SLOW_STREAM, self._slow)
        self._held: list[Transfer] = []
        self._passing: list[Translation] = []
        self._attach()
        self._bring_up()

    def _bring_up(self) -> None:
        write = self._smmu.write
        write(Register.STRTAB_BASE, 8, STRTAB)
        write(Register.STRTAB_BASE_CFG, 4, 8)
        write(Register.CMDQ_BASE, 8, COMMANDS | 4)
        write(Register.EVENTQ_BASE, 8, EVENTS | 4)
        write(Register.PRIQ_BASE, 8, PAGES | 4)
        write(Register.CR0, 4, 0b1111 | self._below(2) << 4)  # ATSCHK or not
        for capability in self._port.capabilities:
            capability.written(ENABLED[capability.id])

    def run(self) -> None:
        actions = (
            self._poke,
            self._describe,
            self._map,
            self._command,
            self._invalidate,
            self._register,
            self._recover,
            self._begin,
            self._end,
            self._pass,
            self._ask,
            self._ask_for_page,
            self._ask_by_register,
            self._answer,
            self._configure,
            self._reset,
        )
        while self._data.remaining_bytes() > 2:
            actions[self._below(len(actions))]()
            assert len(self._smmu.ats_port) <= 2 * INVALIDATE_QUEUE_DEPTH
        while self._held or self._passing:
            self._end()
        while self._slow.pending:
            self._slow.pending.pop()()
        self._smmu.step()
        while self._slow.pending:  # of the commands that have waited
            self._slow.pending.pop()()
            self._smmu.step()
        assert len(self._smmu.in_flight) == 0, "something stays in flight"
        assert len(self._smmu.ats_port) == 0, "an invalidation stays unanswered"
        assert self._host[:MARGIN] == CANARY, "written below guest RAM"
        assert self._host[-MARGIN:] == CANARY, "written above guest RAM"

    # Numbers

    def _below(self, end: int) -> int:
        return int(self._data.ConsumeIntInRange(0, end - 1))

    def _some(self) -> bool:
        return bool(self._data.ConsumeBool())

    def _word(self) -> int:
        return self._below(1 << 64)

    def _near(self) -> int:
        """A word that points into RAM, with bits of its own below and above."""
        inside = TABLES + (self._below(32) << 10)
        return inside | self._below(0x1000) | self._word() << 52 & (1 << 64) - 1

    def _any(self) -> int:
        return self._near() if self._some() else self._word()

    def _address(self) -> int:
        """Where a DMA may go: into the few pages that tables map, or anywhere."""
        return self._below(1 << 14) if self._some() else self._word() >> self._below(64)

    def _stream(self) -> int:
        return (STREAM, SLOW_STREAM, STREAM, self._below(1 << 32))[self._below(4)]

    def _substream(self) -> int | None:
        return self._below(1 << 20) & (-1 if self._some() else 3) if self._some() else None

    def _store(self, place: int, *words: int) -> None:
        start = place - BASE
        self._ram[start : start + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)

    # Memory

    def _poke(self) -> None:
        self._store(BASE + self._below(SIZE // 8) * 8, self._any())

    def _attach(self) -> None:
        """Both streams translate, by one set of tables."""
        for stream in (STREAM, SLOW_STREAM):
            self._store(STRTAB + 64 * stream, *self._stream_entry())
        self._store(TABLES, *self._context())
        self._map()

    def _stream_entry(self) -> tuple[int, ...]:
        """A legal STE: stage 1, stage 2 or both, with ATS or without."""
        config, eats = 5 + self._below(3), self._below(4)
        stalls = 1 << 57 if self._features.stall_model == "stall" else 0
        return 1 | config << 1 | TABLES, eats << 28, STAGE_2 | stalls, TABLES + 0x5000

    def _context(self) -> tuple[int, ...]:
        """A legal CD."""
        stalls = 1 << 44 if self._features.stall_model == "stall" else 0
        return CONTEXT | stalls, TABLES + 0x1000, 0, 0

    def _describe(self) -> None:
        """An STE, or the CD at the beginning of TABLES: legal but for a bit, or valid and otherwise wild."""
        if self._some():
            place, words = STRTAB + 64 * (STREAM + self._below(2)), self._stream_entry()
            valid = 1 | self._below(8) << 1
        else:
            place, words, valid = TABLES, self._context(), 1 << 31 | 1 << 41 | 1 << 46
        if self._some():
            changed = self._below(4)
            words = tuple(
                word ^ 1 << self._below(64) if index == changed else word
                for index, word in enumerate(words)
            )
        else:
            words = self._any() | valid, *(self._any() for _ in range(3))
        self._store(place, *words)

    def _map(self) -> None:
        """A page of either stage among the first four, by tables that both share; stage 2 has RAM at itself too."""
        first, second, third, of_stage_2 = (TABLES + 0x1000 * n for n in (1, 2, 3, 5))
        self._store(first, second | 3)
        self._store(second, third | 3)
        self._store(of_stage_2, second | 3, BASE | 0x4FD)
        legal = TABLES + 0x4000 | 0x47F | self._below(2) << 7
        page = legal ^ 1 << self._below(64) if self._some() else legal
        self._store(third + 8 * self._below(4), page)

    # The guest's driver

    def _submit(self, first: int, second: int) -> None:
        produced = self._smmu.read(Register.CMDQ_PROD, 4)
        self._store(COMMANDS + (produced & 15) * 16, first, second)
        self._smmu.write(Register.CMDQ_PROD, 4, (produced + 1) & 31)

    def _command(self) -> None:
        opcode = OPCODES[self._below(len(OPCODES))]
        flags = self._word() & 0xFFFF_FF00 if self._some() else 0
        second = self._word() if self._some() else self._below(64)
        self._submit(flags | opcode | self._stream() << 32, second)

    def _invalidate(self) -> None:
        """CMD_ATC_INV for one of the functions, and the CMD_SYNC that waits for its answer."""
        substream = self._substream()
        flags = 0 if substream is None else substream << 12 | 1 << 11
        stream = STREAM + self._below(2)
        place = self._address() & ~0xFFF | self._below(53)
        self._submit(Opcode.CMD_ATC_INV | flags | stream << 32, place)
        self._submit(Opcode.CMD_SYNC, 0)

    def _register(self) -> None:
        offset = REGISTERS[self._below(len(REGISTERS))]
        if self._some():
            offset = self._below(0x4_0020) - 16
        size = (1, 2, 4, 8)[self._below(4)]
        self._smmu.write(offset, size, self._word())
        self._smmu.read(offset, size)

    def _recover(self) -> None:
        """What a driver does about errors and full queues."""
        read, write = self._smmu.read, self._smmu.write
        self._store(COMMANDS, *(Opcode.CMD_SYNC, 0) * 16)
        write(Register.GERRORN, 4, read(Register.GERROR, 4))
        write(Register.EVENTQ_CONS, 4, read(Register.EVENTQ_PROD, 4))
        write(Register.PRIQ_CONS, 4, read(Register.PRIQ_PROD, 4))
        write(Register.CR0, 4, 0b1111 | self._below(2) << 4)

    def _ask_by_register(self) -> None:
        """An address translation operation of either group."""
        group = (Register.GATOS_CTRL, Register.VATOS_CTRL)[self._below(2)]
        substream = self._substream()
        sid = self._stream() | (0 if substream is None else substream << 32 | 1 << 52)
        self._smmu.write(Register.VATOS_SEL, 4, 9 if self._some() else self._word())
        self._smmu.write(group + 0x08, 8, sid)
        self._smmu.write(group + 0x10, 8, self._address() & ~0xFFF | self._below(0x1000))
        self._smmu.write(group, 4, 1)
        assert self._smmu.read(group, 4) == 0, "RUN stays"
        self._smmu.read(group + 0x18, 8)

    def _reset(self) -> None:
        """The SMMU is reset while DMA goes on, and comes up again."""
        self._smmu.reset()
        self._bring_up()

    def _configure(self) -> None:
        """Write to the control bits of a capability, as config space lets them through."""
        capabilities = self._port.capabilities
        capability = capabilities[self._below(len(capabilities))]
        wanted = self._data.ConsumeBytes(len(capability.body)).ljust(len(capability.body), b"\0")
        masks = zip(capability.body, wanted, capability.writable, strict=True)
        capability.written(bytes(old & ~mask | new & mask for old, new, mask in masks))

    # The functions

    def _begin(self) -> None:
        flags = self._below(32)
        with suppress(DmaFault, DmaStalled):
            self._held.append(
                self._port.begin(
                    self._address(),
                    self._below(1 << 16) + 1,
                    write=bool(flags & 1),
                    substream_id=self._substream(),
                    attributes=DmaAttributes(*(bool(flags & 1 << bit) for bit in range(1, 5))),
                )
            )

    def _end(self) -> None:
        if self._passing:
            self._smmu.retire(self._passing.pop(0))
        if not self._held:
            return
        with self._held.pop(0) as transfer:
            buffer = bytearray(transfer.size)
            # No memory is there, or it was begun as a write.
            with suppress(DmaFault, ValueError):
                transfer.read_into(buffer)

    def _pass(self) -> None:
        """A Translated transaction of a function that makes up its translations."""
        ranges = array("Q")
        for _ in range(self._below(3) + 1):
            ranges.extend((self._any(), self._below(1 << 22) + 1))
        with suppress(TransactionAborted):
            access = Access(self._stream(), self._substream(), self._some())
            self._passing.append(self._smmu.translated(access, ranges))

    def _ask(self) -> None:
        """A Translation Request."""
        access = Access(self._stream(), self._substream(), False, self._some(), self._some())
        answer = self._smmu.ats_translate(
            access, self._address(), self._below(1 << 10), no_write=self._some()
        )
        if answer.status is AtsStatus.SUCCESS:
            assert answer.size >= 4096, "a translation of less than a page"
            assert not answer.address & answer.size - 1, "a translation is not aligned"
            assert not answer.address >> self._features.output_address_bits, "beyond the OAS"

    def _ask_for_page(self) -> None:
        self._smmu.page_request(
            PageRequest(
                self._stream(),
                self._substream(),
                self._word(),
                self._below(512),
                *(self._some() for _ in range(5)),
            )
        )

    def _answer(self) -> None:
        """The slow function answers an invalidation, or twice; or the time of all of them is over."""
        if not self._slow.pending or self._below(8) == 0:
            self._smmu.give_up()
        else:
            pending = self._slow.pending
            complete = pending.pop(self._below(len(pending)))
            complete()
            if self._some():
                complete()
        self._smmu.step()


def one_input(data: bytes) -> None:
    Session(data).run()


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
