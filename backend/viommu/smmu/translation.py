"""A transaction's way through the SMMU: configuration, TLB, walk, permissions (IHI 0070, 3.3.3 and 3.4)."""

from array import array

from viommu import hot
from viommu.layouts.records import EventType
from viommu.memory import BusError, GuestMemory
from viommu.smmu.configuration import Bypass, Configuration
from viommu.smmu.faults import Access, Fault, translation_fault
from viommu.smmu.tlb import Block, Tlb
from viommu.smmu.walk import Leaf, Regime, TableBase, needed_flags, select_base, walk

MAX_RANGE = 1 << 21
"""The most bytes that one translation covers."""


class Translation:
    """Where a range of input addresses goes: `runs` (address, length, …) of `size` bytes together."""

    __slots__ = ("access", "iova", "runs", "size")

    def __init__(self, access: Access, iova: int, runs: "array[int]", size: int) -> None:
        self.access, self.iova, self.runs, self.size = access, iova, runs, size


class Translator:
    """Translates ranges with the caches that it owns. It raises `Fault` and records nothing."""

    def __init__(
        self,
        memory: GuestMemory,
        configuration: Configuration,
        tlb: Tlb,
        output_address_bits: int,
    ) -> None:
        self._memory = memory
        self._configuration = configuration
        self._tlb = tlb
        self._output_address_bits = output_address_bits

    def translate(self, access: Access, iova: int, size: int) -> Translation:
        """Translate `size` bytes from `iova`, or as many as go through before the first fault.

        Raises `Fault` when not even the first byte does. The rest of a range is a transaction of its own: its fault is
        raised, and recorded, when somebody asks for it.
        """
        size = min(size, MAX_RANGE, (1 << 64) - iova)
        regime = self._configuration.lookup(access)
        if regime is Bypass:
            return self.bypass(access, iova, size)
        runs: array[int] = array("Q")
        done = 0
        try:
            while done < size:
                done += self._translate_some(regime, access, iova + done, size - done, runs)
        except Fault as fault:
            if not done:
                raise (fault if regime.record_faults else _unrecorded(fault)) from None
        return Translation(access, iova, runs, done)

    def bypass(self, access: Access, iova: int, size: int) -> Translation:
        """An address that no stage translates must fit the output address size (3.4)."""
        limit = 1 << self._output_address_bits
        if iova >= limit:
            raise translation_fault(EventType.F_ADDR_SIZE, access, iova)
        size = min(size, MAX_RANGE, limit - iova)
        return Translation(access, iova, array("Q", (iova, size)), size)

    def _translate_some(
        self, regime: Regime, access: Access, address: int, size: int, runs: "array[int]"
    ) -> int:
        """Cover part of the range with one row of pages or one block; returns its bytes."""
        base = select_base(regime, access, address)
        need = needed_flags(access)
        granule = base.granule
        for tag in (base.tag, base.global_tag):
            row = self._tlb.row(tag, address)
            if row is not None:
                first = address >> granule & len(row) - 1
                if row[first]:
                    return self._collect(row, first, granule, need, access, address, size, runs)
            block = self._tlb.block(tag, address)
            if block is not None:
                return _use_block(block, need, access, address, size, runs)
        return self._fill(regime, base, need, access, address, size, runs)

    def _collect(
        self,
        row: "array[int]",
        first: int,
        granule: int,
        need: int,
        access: Access,
        address: int,
        size: int,
        runs: "array[int]",
    ) -> int:
        offset = address & (1 << granule) - 1
        wanted = (offset + size + (1 << granule) - 1) >> granule
        count = min(len(row) - first, wanted)
        covered = hot.collect(row, first, count, need, granule, offset, size, runs)
        if not covered:
            raise translation_fault(EventType.F_PERMISSION, access, address)
        return covered

    def _fill(
        self,
        regime: Regime,
        base: TableBase,
        need: int,
        access: Access,
        address: int,
        size: int,
        runs: "array[int]",
    ) -> int:
        leaf = walk(self._memory, regime, base, access, address)
        tag = base.global_tag if leaf.is_global else base.tag
        granule = base.granule
        if leaf.shift > granule:
            block = Block(leaf.shift, leaf.slot)
            self._tlb.insert_block(tag, address, block)
            return _use_block(block, need, access, address, size, runs)
        row = self._tlb.row_for_filling(tag, address)
        first = address >> granule & len(row) - 1
        row[first] = leaf.slot
        # The neighbours in the same table that say the same come along, as far as the range goes.
        last = first + ((address & (1 << granule) - 1) + size - 1 >> granule)
        count = min(len(row) - 1, last) - first + 1
        if count > 1:
            self._fill_neighbours(row, leaf, first + 1, count - 1, granule)
        return self._collect(row, first, granule, need, access, address, size, runs)

    def _fill_neighbours(
        self, row: "array[int]", leaf: Leaf, first: int, count: int, granule: int
    ) -> None:
        page = (1 << granule) - 1
        try:
            descriptors = self._memory.view(leaf.table, len(row) * 8).cast("Q")
        except BusError:
            return  # a table across two regions: each page is walked on its own
        try:
            hot.fill(
                descriptors,
                row,
                first,
                count,
                leaf.mask,
                leaf.expected,
                hot.ADDRESS_MASK >> 4 & ~page,
                leaf.slot & page,
            )
        finally:
            descriptors.release()


def _unrecorded(fault: Fault) -> Fault:
    """What CD.R = 0 makes of a fault: the four of translation proper lose their record, no other does (5.4)."""
    record = fault.record
    if record is not None and EventType.F_TRANSLATION <= record.event <= EventType.F_PERMISSION:
        return Fault(None)
    return fault


def _use_block(
    block: Block, need: int, access: Access, address: int, size: int, runs: "array[int]"
) -> int:
    if block.slot & need != need:
        raise translation_fault(EventType.F_PERMISSION, access, address)
    inside = (1 << block.shift) - 1
    part = min(size, inside + 1 - (address & inside))
    start = (block.slot & hot.ADDRESS_MASK & ~inside) | address & inside
    if runs and runs[-2] + runs[-1] == start:
        runs[-1] += part
    else:
        runs.extend((start, part))
    return part
