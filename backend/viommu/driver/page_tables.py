"""VMSAv8-64 stage 1 translation tables of the 4 KiB granule (DDI 0487, D8)."""

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

from viommu.driver.access import Buffer, Memory
from viommu.driver.errors import MappingError
from viommu.layouts.page_tables import LeafDescriptor, TableDescriptor

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
INDEX_BITS = 9
"""log2 of the descriptors in a table of the 4 KiB granule (D8.2)."""
LAST_LEVEL = 3
FIRST_BLOCK_LEVEL = 1
"""The 4 KiB granule has blocks at level 1 (1 GiB) and level 2 (2 MiB) (D8.2)."""
SMALLEST_TABLE = 64
"""A table's base is aligned to its size, and at least to this, bytes (D8.2)."""
MIN_INPUT_BITS, MAX_INPUT_BITS = 25, 48
"""T0SZ is 39 to 16 without small tables and 52-bit addresses (IHI 0070, 5.4, T0SZ)."""
MAIR_ATTRIBUTES = 0xFF
"""CD.MAIR0 with attribute 0 as Normal, write-back, allocate: the only one that descriptors here use (5.4)."""
INNER_SHAREABLE = 3

_VALID = 1
_TABLE = TableDescriptor(valid=True, table=True).value
_ADDRESS = LeafDescriptor.address.mask << LeafDescriptor.address.low


def span(level: int) -> int:
    """The bytes that one descriptor of `level` maps."""
    return 1 << PAGE_SHIFT + INDEX_BITS * (LAST_LEVEL - level)


class Access(NamedTuple):
    """What a mapping lets a transaction do (D8.4). Stage 1 can always be read, at least by privileged transactions.

    `is_global` makes the TLB entry one for every ASID (nG = 0); `accessed` is the access flag AF.
    """

    write: bool = True
    privileged: bool = False
    execute: bool = False
    is_global: bool = False
    accessed: bool = True

    def attributes(self, level: int) -> int:
        """The leaf descriptor at `level` without its output address."""
        return LeafDescriptor(
            valid=True,
            page=level == LAST_LEVEL,
            ap_user=not self.privileged,
            ap_read_only=not self.write,
            sh=INNER_SHAREABLE,
            af=self.accessed,
            ng=not self.is_global,
            pxn=not self.execute,
            xn=not self.execute,
        ).value


READ_WRITE = Access()
READ_ONLY = Access(write=False)


class Mapping(NamedTuple):
    """What one leaf descriptor maps: `size` bytes at `iova` to physical `address`."""

    iova: int
    address: int
    size: int


class _Table:
    """A table, and which of its descriptors point at further ones.

    `mask` wraps an index into it, `live` counts its valid descriptors.
    """

    __slots__ = ("buffer", "children", "level", "live", "mask")

    def __init__(self, buffer: Buffer, index_bits: int, level: int) -> None:
        self.buffer, self.level = buffer, level
        self.mask = (1 << index_bits) - 1
        self.children: dict[int, _Table] = {}
        self.live = 0


class PageTable:
    """One translation table tree: what CD.TTB0, or with `upper` CD.TTB1, points at.

    It translates 2^`input_bits` bytes from address 0 up (with `upper` from 2^64 down) to below 2^`output_bits`.
    Descriptors are stored as whole words, each one after the table that it points at is complete, so that the SMMU may
    walk while a mapping is made. Making a mapping needs no invalidation, because a descriptor that faults is never
    cached. Removing one does, and only after it may `release` give back the tables that went with it.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        input_bits: int = MAX_INPUT_BITS,
        output_bits: int = 48,
        upper: bool = False,
    ) -> None:
        if not MIN_INPUT_BITS <= input_bits <= MAX_INPUT_BITS:
            raise MappingError(
                f"{input_bits} bits of input address: {MIN_INPUT_BITS} to {MAX_INPUT_BITS} are possible"
            )
        self.input_bits, self.output_bits, self.upper = input_bits, output_bits, upper
        self.first = (1 << 64) - (1 << input_bits) if upper else 0
        self._memory = memory
        # Each level resolves nine bits; the start level takes what is left (D8.2).
        levels = -(-(input_bits - PAGE_SHIFT) // INDEX_BITS)
        self.start_level = LAST_LEVEL + 1 - levels
        root_bits = input_bits - PAGE_SHIFT - INDEX_BITS * (levels - 1)
        root_size = max(8 << root_bits, SMALLEST_TABLE)
        buffer = memory.allocate(root_size, root_size)
        self._root = _Table(buffer, root_bits, self.start_level)
        self._retired: list[_Table] = []

    @property
    def root(self) -> int:
        """Physical address of the table at the start level, for CD.TTB0 or CD.TTB1."""
        return self._root.buffer.address

    @property
    def size_field(self) -> int:
        """CD.T0SZ or CD.T1SZ."""
        return 64 - self.input_bits

    @property
    def has_retired_tables(self) -> bool:
        """Whether table descriptors were removed too, so that an invalidation must not be for leaves only."""
        return bool(self._retired)

    def map(
        self,
        iova: int,
        address: int,
        size: int,
        access: Access = READ_WRITE,
        *,
        pages_only: bool = False,
    ) -> None:
        """Map `size` bytes at `iova` to physical `address`, by the largest blocks that alignment allows.

        Nothing changes when it raises `MappingError`: not a multiple of 4 KiB, out of range, or mapped already.
        """
        self._require_free(iova, size, address, address + size)
        end = iova + size
        while iova < end:
            level = LAST_LEVEL if pages_only else self._largest_level(iova, address, end - iova)
            step = span(level)
            low = access.attributes(level)
            # As many descriptors of this level as fit before a larger one can be used.
            count = (self._next_larger(iova, level, end) - iova) // step
            self._install(iova, level, [address + step * i | low for i in range(count)])
            iova, address = iova + step * count, address + step * count

    def map_pages(self, iova: int, frames: Sequence[int], access: Access = READ_WRITE) -> None:
        """Map consecutive pages from `iova` up to the physical page addresses `frames`, in their order.

        Nothing changes when it raises `MappingError`.
        """
        if not frames:
            return
        size = len(frames) * PAGE_SIZE
        self._require_free(iova, size, reduce(or_, frames), max(frames) + PAGE_SIZE)
        low = access.attributes(LAST_LEVEL)
        self._install(iova, LAST_LEVEL, [frame | low for frame in frames])

    def unmap(self, iova: int, size: int) -> list[Mapping]:
        """Remove what is mapped in `size` bytes from `iova`; the mappings removed, one a descriptor.

        The TLB may hold them until it is invalidated. Nothing changes when it raises `MappingError`, because the range
        begins or ends inside a block.
        """
        self._require_range(iova, size)
        removed = self.mappings_of(iova, size)
        for mapping in removed[:1] + removed[-1:]:
            if mapping.iova < iova or mapping.iova + mapping.size > iova + size:
                raise MappingError(
                    f"{iova:#x}+{size:#x} splits the block of {mapping.size:#x} at {mapping.iova:#x}"
                )
        self._remove(self._root, iova, iova + size)
        return removed

    def translate(self, iova: int) -> int | None:
        """The physical address that `iova` maps to, permissions aside; None when it maps to nothing."""
        found = self.mappings_of(iova, 1)
        return found[0].address + iova - found[0].iova if found else None

    def mappings(self) -> list[Mapping]:
        """Every mapping, by ascending IOVA, one a descriptor."""
        return self.mappings_of(self.first, 1 << self.input_bits)

    def mappings_of(self, iova: int, size: int) -> list[Mapping]:
        """What maps any of `size` bytes from `iova`, within what this table translates."""
        return self._leaves(self._root, iova, iova + size)

    def translates(self, iova: int, size: int) -> bool:
        """Whether `size` bytes from `iova` lie in what this table can map."""
        return self.first <= iova and iova + size <= self.first + (1 << self.input_bits)

    def release(self) -> None:
        """Give back the tables that unmapping took out of the tree. Only after the TLB invalidation completed."""
        self._free(self._retired)
        self._retired = []

    def close(self) -> None:
        """Give back every table. Only once no CD points here and the TLB is invalidated."""
        self.release()
        self._free([self._root])

    def _top_block_level(self) -> int:
        return max(self.start_level, FIRST_BLOCK_LEVEL)

    def _largest_level(self, iova: int, address: int, size: int) -> int:
        level = self._top_block_level()
        while level < LAST_LEVEL and (size < span(level) or (iova | address) & span(level) - 1):
            level += 1
        return level

    def _next_larger(self, iova: int, level: int, end: int) -> int:
        """Where the next larger block could begin, else `end`."""
        if level == self._top_block_level():
            return end
        larger = span(level - 1)
        return min((iova // larger + 1) * larger, end)

    def _require_range(self, iova: int, size: int) -> None:
        if (iova | size) & PAGE_SIZE - 1 or size <= 0:
            raise MappingError(f"{iova:#x}+{size:#x} is not whole pages")
        if not self.translates(iova, size):
            raise MappingError(f"{iova:#x}+{size:#x} lies outside {self.input_bits} bits of input")

    def _require_free(self, iova: int, size: int, address_bits: int, address_end: int) -> None:
        self._require_range(iova, size)
        if address_bits & PAGE_SIZE - 1:
            raise MappingError(f"the output address {address_bits:#x} is not a whole page's")
        if address_end > 1 << self.output_bits:
            raise MappingError(f"the output reaches {address_end:#x}, past {self.output_bits} bits")
        for mapping in self.mappings_of(iova, size):
            raise MappingError(f"{mapping.iova:#x}+{mapping.size:#x} is mapped already")

    def _leaves(self, table: _Table, first: int, end: int) -> list[Mapping]:
        """What the leaf descriptors at and below `table` map of `first` to `end`."""
        step, words, children = span(table.level), table.buffer.words, table.children
        base = first & -step
        slot = base // step & table.mask
        if not children:
            run = words[slot : slot - (base - end) // step]
            return [
                Mapping(iova, descriptor & _ADDRESS, step)
                for iova, descriptor in zip(range(base, end, step), run, strict=True)
                if descriptor & _VALID
            ]
        leaves = []
        for place, iova in enumerate(range(base, end, step), slot):
            child = children.get(place)
            if child is not None:
                leaves += self._leaves(child, max(first, iova), min(end, iova + step))
            elif words[place] & _VALID:
                leaves.append(Mapping(iova, words[place] & _ADDRESS, step))
        return leaves

    def _remove(self, table: _Table, first: int, end: int) -> None:
        """Invalidate the leaf descriptors of whole blocks, and take tables that hold nothing else out of the tree."""
        step, words, children = span(table.level), table.buffer.words, table.children
        base = first & -step
        for slot, iova in enumerate(range(base, end, step), base // step & table.mask):
            child = children.get(slot)
            if child is not None:
                if iova < first or iova + step > end:
                    self._remove(child, max(first, iova), min(end, iova + step))
                    if child.live:
                        continue
                # The table goes as it is: nothing finds it from above any more.
                self._retired.append(children.pop(slot))
            elif not words[slot] & _VALID:
                continue
            words[slot] = 0
            table.live -= 1

    def _install(self, iova: int, level: int, descriptors: list[int]) -> None:
        """Store leaf descriptors of one level for consecutive addresses."""
        done, step = 0, span(level)
        while done < len(descriptors):
            table = self._table(iova + done * step, level)
            words = table.buffer.words
            slot = (iova // step + done) & table.mask
            run = descriptors[done : done + table.mask + 1 - slot]
            # One by one and not as a slice: each must reach memory as one 64-bit store, the SMMU may be walking.
            for place, descriptor in enumerate(run, slot):
                words[place] = descriptor
            table.live += len(run)
            done += len(run)

    def _table(self, iova: int, level: int) -> _Table:
        """The table of `level` for `iova`, with the tables above it, made where they are missing."""
        table = self._root
        while table.level < level:
            slot = iova // span(table.level) & table.mask
            child = table.children.get(slot)
            if child is None:
                buffer = self._memory.allocate(PAGE_SIZE, PAGE_SIZE)
                child = _Table(buffer, INDEX_BITS, table.level + 1)
                table.children[slot] = child
                table.buffer.words[slot] = child.buffer.address | _TABLE
                table.live += 1
            table = child
        return table

    def _free(self, tables: list[_Table]) -> None:
        """Give back tables and all that hangs below them."""
        for table in tables:
            self._free(list(table.children.values()))
            self._memory.free(table.buffer)
