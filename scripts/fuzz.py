"""The fuzz target: bytes become a session of a hostile guest with an SMMU and a DMA master.

A session writes registers, tables and queue entries, and starts, moves and ends DMA. Nothing but an abort or a stall
may come out, guest memory outside the regions stays as it was, and what is in flight ends.
"""

import sys
from contextlib import suppress

import atheris

with atheris.instrument_imports(include=["viommu"]):
    from viommu.endpoints.port import DmaAttributes, DmaFault, DmaPort, DmaStalled, Transfer
    from viommu.layouts.registers import Register
    from viommu.memory import GuestMemory
    from viommu.smmu import Features, Smmu

BASE, SIZE, MARGIN = 0x4000_0000, 0x1_0000, 0x1000
STREAM = 0x10
STRTAB, COMMANDS, EVENTS, TABLES = BASE, BASE + 0x4000, BASE + 0x6000, BASE + 0x8000
CANARY = b"\xc5" * MARGIN
PROFILES = (
    Features(),
    Features(output_address_bits=52, caching="hostile", stall_max=2),
    Features(stall_model="stall", caching="none"),
)
REGISTERS = [int(register) for register in Register]


class Session:
    """A guest that knows where things are, which gets it deep into the model, and otherwise does as the bytes say."""

    def __init__(self, data: bytes) -> None:
        self._data = atheris.FuzzedDataProvider(data)
        self._host = bytearray(CANARY + bytes(SIZE) + CANARY)
        self._ram = memoryview(self._host)[MARGIN : MARGIN + SIZE]
        memory = GuestMemory()
        memory.add_region(BASE, SIZE, self._ram)
        self._smmu = Smmu(memory, PROFILES[self._data.ConsumeIntInRange(0, len(PROFILES) - 1)])
        self._port = DmaPort(memory, STREAM, self._smmu)
        self._port.bus_master = True
        self._held: list[Transfer] = []
        write = self._smmu.write
        write(Register.STRTAB_BASE, 8, STRTAB)
        write(Register.STRTAB_BASE_CFG, 4, 8)
        write(Register.CMDQ_BASE, 8, COMMANDS | 4)
        write(Register.EVENTQ_BASE, 8, EVENTS | 4)
        write(Register.CR0, 4, 0b1101)

    def run(self) -> None:
        actions = (
            self._poke,
            self._describe,
            self._command,
            self._register,
            self._begin,
            self._end,
        )
        while self._data.remaining_bytes() > 2:
            actions[self._data.ConsumeIntInRange(0, len(actions) - 1)]()
        while self._held:
            self._end()
        self._smmu.step()
        assert len(self._smmu.in_flight) == 0, "something stays in flight"
        assert self._host[:MARGIN] == CANARY, "written below guest RAM"
        assert self._host[-MARGIN:] == CANARY, "written above guest RAM"

    def _word(self) -> int:
        return int(self._data.ConsumeIntInRange(0, (1 << 64) - 1))

    def _near(self) -> int:
        """A word that points into RAM, with bits of its own below and above."""
        inside = TABLES + (self._data.ConsumeIntInRange(0, 31) << 10)
        low = int(self._data.ConsumeIntInRange(0, 0xFFF))
        return int(inside) | low | self._word() << 52 & (1 << 64) - 1

    def _poke(self) -> None:
        place = self._data.ConsumeIntInRange(0, SIZE // 8 - 1) * 8
        value = self._near() if self._data.ConsumeBool() else self._word()
        self._ram[place : place + 8] = value.to_bytes(8, "little")

    def _describe(self) -> None:
        """An STE of our stream, or the CD at the beginning of TABLES: valid, and otherwise wild."""
        if self._data.ConsumeBool():
            place, first = STREAM * 64, 1 | self._data.ConsumeIntInRange(4, 7) << 1 | TABLES
        else:
            place, first = TABLES - BASE, self._word() | 1 << 31 | 1 << 41 | 1 << 46
        words = [
            first,
            *(self._near() if self._data.ConsumeBool() else self._word() for _ in range(3)),
        ]
        for index, word in enumerate(words):
            start = place + index * 8
            self._ram[start : start + 8] = word.to_bytes(8, "little")

    def _command(self) -> None:
        produced = self._smmu.read(Register.CMDQ_PROD, 4)
        place = COMMANDS - BASE + (produced & 15) * 16
        opcodes = (0x03, 0x04, 0x05, 0x06, 0x10, 0x12, 0x2A, 0x30, 0x44, 0x45, 0x46)
        opcode = opcodes[self._data.ConsumeIntInRange(0, len(opcodes) - 1)]
        entry = (self._word() & ~0xFF | opcode).to_bytes(8, "little") + self._word().to_bytes(
            8, "little"
        )
        self._ram[place : place + 16] = entry
        self._smmu.write(Register.CMDQ_PROD, 4, (produced + 1) & 31)

    def _register(self) -> None:
        offset = REGISTERS[self._data.ConsumeIntInRange(0, len(REGISTERS) - 1)]
        if self._data.ConsumeBool():
            offset = self._data.ConsumeIntInRange(-16, 0x2_0010)
        size = (1, 2, 4, 8)[self._data.ConsumeIntInRange(0, 3)]
        self._smmu.write(offset, size, self._word())
        self._smmu.read(offset, size)

    def _begin(self) -> None:
        flags = self._data.ConsumeIntInRange(0, 15)
        address = self._word() >> self._data.ConsumeIntInRange(0, 63)
        with suppress(DmaFault, DmaStalled):
            self._held.append(
                self._port.begin(
                    address,
                    self._data.ConsumeIntInRange(1, 1 << 16),
                    write=bool(flags & 1),
                    substream_id=self._data.ConsumeIntInRange(0, 0xF_FFFF) if flags & 8 else None,
                    attributes=DmaAttributes(bool(flags & 2), bool(flags & 4)),
                )
            )

    def _end(self) -> None:
        if not self._held:
            return
        with self._held.pop(0) as transfer:
            buffer = bytearray(transfer.size)
            # No memory is there, or it was begun as a write.
            with suppress(DmaFault, ValueError):
                transfer.read_into(buffer)


def one_input(data: bytes) -> None:
    Session(data).run()


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
