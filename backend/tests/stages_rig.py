"""An SMMU with everything, and tables of any granule for both stages, in raw 64-bit words."""

from dataclasses import replace

from tests import smmu_rig as hw
from tests.smmu_rig import CD_PLAIN, Rig
from viommu.smmu import Access, Features, Stalled, TransactionStalled

STREAM, ASID = hw.STREAM, hw.ASID
SYNC = (0x46, 0)

# STE, second word.
MEV, S1STALLD, STRW_EL2 = 1 << 19, 1 << 27, 2 << 30
# STE, third word.
S2AA64, S2ENDI, S2AFFD, S2PTW = 1 << 51, 1 << 52, 1 << 53, 1 << 54
S2HD, S2HA, S2S, S2R = 1 << 55, 1 << 56, 1 << 57, 1 << 58
S2TG = {12: 0 << 46, 14: 2 << 46, 16: 1 << 46}
PS_48, PS_52 = 5 << 48, 6 << 48
# CD, first word, by log2 of the granule.
TG0 = {12: 0 << 6, 14: 2 << 6, 16: 1 << 6}
TG1 = {12: 2 << 22, 14: 1 << 22, 16: 3 << 22}

# Stage 2 descriptors.
S2_READ, S2_WRITE = 1 << 6, 1 << 7
S2_NORMAL = 0xF << 2
S2_PLAIN = S2_READ | S2_WRITE | S2_NORMAL | hw.AF
DBM = 1 << 51

S2_FAULT, TT_READ = 1 << 39, 1 << 44
CLASS_CD, CLASS_TT, CLASS_IN = 0, hw.CLASS_TT, hw.CLASS_IN
RNW, IND, PNU = hw.RNW, hw.IND, hw.PNU


def stage_2_record(
    event: int, address: int, ipa: int, *, second: int = RNW | CLASS_IN, first: int = 0
) -> bytes:
    """The record of a fault of stage 2; a read unless `second` says otherwise."""
    return hw.record(event | STREAM << 32 | first, second | S2_FAULT, address, ipa & ~0xFFF)


def high_word(address: int) -> int:
    """An address as a descriptor of a 64 KiB granule has it: bits 51:48 at 15:12."""
    return address & 0xFFFF_FFFF_0000 | address >> 36 & 0xF000


class Table:
    """The tables of one stage. `offset` is added to the physical addresses that are written into them."""

    def __init__(
        self,
        rig: Rig,
        granule: int = 12,
        input_bits: int = 48,
        *,
        start: int | None = None,
        offset: int = 0,
    ) -> None:
        self.rig, self.granule, self.input_bits, self.offset = rig, granule, input_bits, offset
        if start is None:
            start = 4 - -(-(input_bits - granule) // (granule - 3))
        self.start = start
        size = 8 << (input_bits - self.shift(start))
        self.base = rig.alloc(size, max(size, 64))

    @property
    def pointer(self) -> int:
        """What goes into TTB0, TTB1 or S2TTB."""
        return self.base + self.offset

    def shift(self, level: int) -> int:
        """log2 of what a descriptor of `level` covers."""
        return self.granule + (self.granule - 3) * (3 - level)

    def map(self, address: int, leaf: int, *, level: int = 3, tables: int = 0) -> int:
        """Write `leaf` for `address` at `level`, and the tables above it with the bits `tables`. Returns where."""
        table = self.base
        index = (address & (1 << self.input_bits) - 1) >> self.shift(self.start)
        for depth in range(self.start, level):
            entry = table + index * 8
            if not self.rig.get(entry) & 1:
                below = self.rig.alloc(1 << self.granule, 1 << self.granule)
                self.rig.put(entry, below + self.offset | hw.TABLE | tables)
            table = self.rig.get(entry) & (1 << 48) - (1 << self.granule)
            table -= self.offset
            index = address >> self.shift(depth + 1) & (1 << self.granule - 3) - 1
        self.rig.put(table + index * 8, leaf)
        return table + index * 8


class Stages(Rig):
    """The stream of the rig with an STE of any kind. `OFFSET` is what IPAs of RAM are above physical addresses."""

    OFFSET = 1 << 38

    def __init__(
        self, features: Features | None = None, *, ram: int = 16 << 20, on: int = 0xD
    ) -> None:
        super().__init__(features or Features(), ram=ram, on=on)

    def ste(self, *words: int, stream: int = STREAM) -> None:
        """Write an STE and make the SMMU forget everything."""
        self.put(hw.STRTAB + 64 * stream, *words, *(0,) * (8 - len(words)))
        self.forget()

    @staticmethod
    def stage_2_words(table: Table, bits: int = S2R | PS_48, vmid: int = 0) -> tuple[int, int]:
        """The third and fourth word of an STE whose stage 2 is `table`."""
        sl0 = (2 if table.granule == 12 else 3) - table.start
        t0sz = 64 - table.input_bits
        return vmid | t0sz << 32 | sl0 << 38 | S2TG[table.granule] | S2AA64 | bits, table.pointer

    def stage_2_only(
        self, table: Table, bits: int = S2R | PS_48, *, vmid: int = 0, second: int = 0
    ) -> None:
        self.ste(hw.STE_S2, second, *self.stage_2_words(table, bits, vmid))

    def nested(
        self,
        table_1: Table,
        table_2: Table,
        *,
        cd: int = 0,
        bits: int = S2R | PS_48,
        vmid: int = 0,
        second: int = 0,
        identity: bool = True,
    ) -> None:
        """Stage 1 by `table_1` on `table_2`, which maps RAM at `OFFSET` unless `identity` is off."""
        if identity:
            shift = table_2.shift(2)
            for address in range(hw.BASE, hw.BASE + len(self.ram), 1 << shift):
                table_2.map(
                    address + table_1.offset,
                    address & -(1 << shift) | S2_PLAIN | hw.BLOCK,
                    level=2,
                )
        self.put(self.cd_address, self.cd_word(table_1) | cd, table_1.pointer)
        pointer = self.cd_address + table_1.offset
        self.ste(hw.STE_NESTED | pointer, second, *self.stage_2_words(table_2, bits, vmid))

    @staticmethod
    def cd_word(table: Table) -> int:
        """The first word of a CD with `table` as its lower half and no upper one."""
        word = CD_PLAIN & ~0x3F & ~(3 << 6) | hw.EPD1
        return word | 64 - table.input_bits | TG0[table.granule]

    def stage_1_only(self, table: Table, *, cd: int = 0, ips: int = 5, second: int = 0) -> None:
        word = self.cd_word(table) & ~(7 << 32) | ips << 32
        self.put(self.cd_address, word | cd, table.pointer, 0)
        self.ste(hw.STE_S1 | self.cd_address, second)

    def stall(self, address: int, size: int = 1, **access: bool | int) -> Stalled:
        """A transaction that must stall."""
        try:
            self.begin(address, size, access=Access(STREAM, **access))  # type: ignore[arg-type]
        except TransactionStalled as held:
            return held.stalled
        raise AssertionError(f"{address:#x} went through")


def everything_but(**features: object) -> Features:
    """All features, but for those that are named."""
    return replace(Features(), **features)  # type: ignore[arg-type]
