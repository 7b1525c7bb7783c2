"""Context descriptor tables and what a CD says (IHI 0070, 3.3.2 and 5.3, 5.4)."""

from typing import NamedTuple, Protocol

from viommu.driver.access import Buffer, Memory
from viommu.driver.entries import field_mask
from viommu.driver.errors import StreamError
from viommu.driver.page_tables import MAIR_ATTRIBUTES
from viommu.layouts.registers import ADDRESS_SIZES
from viommu.layouts.tables import (
    CD_LEAF_SPLIT,
    ContextDescriptor,
    ContextTableLevel1,
    S1Format,
)

CD_WORDS = ContextDescriptor.size // 8

_WRITE_BACK = 1
_INNER_SHAREABLE = 3
_TG0_4K, _TG1_4K = 0, 2
_EVERYTHING = (1 << 8 * ContextDescriptor.size) - 1
_TTB0 = field_mask(ContextDescriptor, "t0sz", "tg0", "ir0", "or0", "sh0", "tbi0", "had0", "ttb0")
_TTB1 = field_mask(ContextDescriptor, "t1sz", "tg1", "ir1", "or1", "sh1", "tbi1", "had1", "ttb1")


class TranslationTable(Protocol):
    """What CD.TTB0 or CD.TTB1 points at, and how much of the address space it translates."""

    @property
    def root(self) -> int: ...
    @property
    def size_field(self) -> int: ...


class TableRoot(NamedTuple):
    """A table that somebody else made: its physical address, and the bits of input address that it resolves."""

    root: int
    input_bits: int

    @property
    def size_field(self) -> int:
        """CD.T0SZ or CD.T1SZ."""
        return 64 - self.input_bits


def used_bits(value: int) -> int:
    """The bits that the SMMU looks at in a CD that is `value` (5.4)."""
    descriptor = ContextDescriptor(value)
    if not descriptor.valid:
        return field_mask(ContextDescriptor, "valid")
    unused = (_TTB0 if descriptor.epd0 else 0) | (_TTB1 if descriptor.epd1 else 0)
    return _EVERYTHING & ~unused


def invalid_descriptor() -> ContextDescriptor:
    """V = 0: every transaction is aborted and recorded as C_BAD_CD."""
    return ContextDescriptor()


def context_descriptor(
    asid: int,
    output_bits: int,
    lower: TranslationTable | None,
    upper: TranslationTable | None = None,
    *,
    mair: int = MAIR_ATTRIBUTES,
    stall: bool = False,
) -> ContextDescriptor:
    """The CD that translates by `lower` through TTB0 and by `upper` through TTB1.

    A half without a table is switched off (EPD0, EPD1). Faults are recorded (R), and abort (A) or with `stall` wait for
    an answer (S). ASET = 1: only this driver's own commands invalidate the ASID. `mair` is MAIR1 above MAIR0.
    """
    descriptor = ContextDescriptor(
        valid=True,
        ips=ADDRESS_SIZES.index(output_bits),
        aa64=True,
        s=stall,
        r=True,
        a=True,
        aset=True,
        asid=asid,
        epd0=lower is None,
        epd1=upper is None,
        mair0=mair & 0xFFFF_FFFF,
        mair1=mair >> 32,
    )
    if lower is not None:
        descriptor.t0sz, descriptor.tg0, descriptor.ttb0 = lower.size_field, _TG0_4K, lower.root
        descriptor.ir0 = descriptor.or0 = _WRITE_BACK
        descriptor.sh0 = _INNER_SHAREABLE
    if upper is not None:
        descriptor.t1sz, descriptor.tg1, descriptor.ttb1 = upper.size_field, _TG1_4K, upper.root
        descriptor.ir1 = descriptor.or1 = _WRITE_BACK
        descriptor.sh1 = _INNER_SHAREABLE
    return descriptor


class ContextTable:
    """The CDs of one stream: 2^`substream_bits` of them, all invalid until written.

    With `substream_bits` 0 it is one CD. Else `layout` (STE.S1Fmt) says whether it is one table, or a table of tables
    of 64 or 1024 CDs that are made as they are needed.
    """

    def __init__(
        self, memory: Memory, substream_bits: int = 0, layout: S1Format = S1Format.LINEAR
    ) -> None:
        self.substream_bits, self.layout = substream_bits, layout
        self._memory = memory
        # All CDs are in one table unless the format splits them.
        self._split = CD_LEAF_SPLIT.get(layout, substream_bits) if substream_bits else 0
        self._leaves: dict[int, Buffer] = {}
        self._level1: Buffer | None = None
        if substream_bits and layout is not S1Format.LINEAR:
            size = max(ContextTableLevel1.size << max(substream_bits - self._split, 0), 64)
            self._level1 = memory.allocate(size, size)
        else:
            self._leaf(0)

    @property
    def base(self) -> int:
        """STE.S1ContextPtr."""
        return (self._level1 or self._leaves[0]).address

    def has(self, substream_id: int) -> bool:
        """Whether memory holds a CD for this substream."""
        return substream_id >> self._split in self._leaves

    def entry(self, substream_id: int = 0) -> memoryview:
        """The eight words of a substream's CD, made if need be; `StreamError` when the table is too small for it."""
        if not 0 <= substream_id < 1 << self.substream_bits:
            raise StreamError(
                f"substream {substream_id:#x} is outside a table of 2^{self.substream_bits}"
            )
        leaf = self._leaf(substream_id >> self._split)
        place = CD_WORDS * (substream_id & (1 << self._split) - 1)
        return leaf.words[place : place + CD_WORDS]

    def close(self) -> None:
        """Give the memory back. Only once no STE points here and its invalidation completed."""
        for leaf in self._leaves.values():
            self._memory.free(leaf)
        if self._level1 is not None:
            self._memory.free(self._level1)

    def _leaf(self, first: int) -> Buffer:
        leaf = self._leaves.get(first)
        if leaf is None:
            size = ContextDescriptor.size << self._split
            leaf = self._leaves[first] = self._memory.allocate(size, size)
            if self._level1 is not None:
                link = ContextTableLevel1(valid=True, l2_ptr=leaf.address)
                self._level1.words[first] = link.value
        return leaf
