"""The TLB: what the SMMU remembers of translations until software invalidates it (3.17, 4.4).

Pages are kept in rows: one row holds, as slots (see `viommu.hot`), what one last-level table can map, so that a run
of pages is looked up and moved at once. Blocks are kept one by one. The model forgets an entry when a command says so
or when it is full; it never notices by itself that a table changed, so a missing invalidation shows.

Translations of stage 1, and of both stages together, are kept under their input address and ASID; translations of
stage 2 alone under the IPA and `STAGE_2`. What stage 1 maps by one descriptor and stage 2 by several smaller ones is
kept in fragments, and one invalidation of any address of it takes all of them (DDI 0487, TLB maintenance).
"""

from array import array
from collections.abc import Collection, Iterator
from enum import IntEnum
from typing import NamedTuple

GLOBAL = -1
"""The ASID under which global entries are kept. Those of the other ASID set (CD.ASET) are kept under `GLOBAL_SET_1`."""
GLOBAL_SET_1 = -3
STAGE_2 = -2
"""The ASID under which translations of IPAs are kept."""

VALID = 1 << 0
PRIV_READ = 1 << 1
PRIV_WRITE = 1 << 2
PRIV_EXECUTE = 1 << 3
USER_READ = 1 << 4
USER_WRITE = 1 << 5
USER_EXECUTE = 1 << 6
CLEAN = 1 << 7
"""A write that the slot forbids is allowed to make the descriptor dirty: walk again before refusing it (HTTU)."""
DEVICE = 1 << 8
"""Stage 2 says Device memory."""
"""Flags of a slot, below the address."""

FLAGS = (1 << 12) - 1
OUTPUT = (1 << 52) - (1 << 12)
"""The two parts of a slot."""
_BLOCK_WEIGHT = 32
# A block in a dict takes about as much memory as this many slots.
_HALF = 1 << 55
KEY_MASK = 2 * _HALF - 1
"""Addresses are told apart by bits 55:0: what is above is the sign, or a tag that TBI ignores."""
_PAGE_SHIFTS = (12, 14, 16)


class World(IntEnum):
    """StreamWorld: the translation regime that an entry belongs to (3.3.3)."""

    EL1 = 0
    EL2 = 1
    EL2_E2H = 2


class Tag(NamedTuple):
    """What a translation belongs to."""

    world: World
    vmid: int
    asid: int


class Entry(NamedTuple):
    """A mapping of 2^shift bytes by one slot, whose address bits below `shift` are 0."""

    shift: int
    slot: int


class _Space:
    """The entries of one tag: rows by page size and place, blocks by size and place.

    `broken` has the sizes and places of what was mapped as a whole by stage 1 and is kept in fragments.
    """

    __slots__ = ("blocks", "broken", "page_shifts", "rows")

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], array[int]] = {}
        self.blocks: dict[tuple[int, int], int] = {}
        self.broken: set[tuple[int, int]] = set()
        # The page sizes that rows have had; one, but for odd guests.
        self.page_shifts: tuple[int, ...] = ()

    def weight(self) -> int:
        rows = sum(len(row) for row in self.rows.values())
        return rows + (len(self.blocks) + len(self.broken)) * _BLOCK_WEIGHT


class Tlb:
    """All cached translations. `capacity` bounds their memory, in slots of 8 bytes."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._capacity = capacity
        self._used = 0
        self._spaces: dict[Tag, _Space] = {}

    def __len__(self) -> int:
        """The number of valid entries."""
        return sum(
            len(space.blocks) + sum(bool(slot) for row in space.rows.values() for slot in row)
            for space in self._spaces.values()
        )

    # What it holds, for who looks on

    def tags(self) -> list[Tag]:
        """What there are entries of."""
        return list(self._spaces)

    def count(self, tag: Tag) -> int:
        """How many entries there are of `tag`."""
        return sum(len(row) - row.count(0) for _, _, row in self.rows(tag))

    def entries(self, tag: Tag) -> Iterator[tuple[int, Entry]]:
        """The entries of `tag`, each with the address that it maps, of which there are bits 55:0."""
        for first, shift, row in self.rows(tag):
            for index, slot in enumerate(row):
                if slot:
                    yield first + (index << shift), Entry(shift, slot)

    def rows(self, tag: Tag) -> "Iterator[tuple[int, int, array[int]]]":
        """The entries of `tag` in rows: the first address, log2 of the bytes of each, and their slots.

        A block is a row of one.
        """
        space = self._spaces.get(tag)
        if space is not None:
            for (shift, place), row in list(space.rows.items()):
                yield place << (2 * shift - 3), shift, row
            for (shift, place), slot in list(space.blocks.items()):
                yield place << shift, shift, array("Q", (slot,))

    # Look-up and insertion

    def row(self, tag: Tag, address: int) -> "tuple[int, array[int]] | None":
        """The row of `tag` that has a page at `address`, with log2 of its page size."""
        space = self._spaces.get(tag)
        if space is None:
            return None
        address &= KEY_MASK
        for shift in space.page_shifts:
            row = space.rows.get((shift, address >> (2 * shift - 3)))
            if row is not None and row[address >> shift & len(row) - 1]:
                return shift, row
        return None

    def block(self, tag: Tag, address: int) -> Entry | None:
        """The block of `tag` that covers `address`, if there is one."""
        space = self._spaces.get(tag)
        if space is None or not space.blocks:
            return None
        address &= KEY_MASK
        for shift in _BLOCK_SHIFTS:
            slot = space.blocks.get((shift, address >> shift))
            if slot is not None:
                return Entry(shift, slot)
        return None

    def find(self, tag: Tag, address: int) -> Entry | None:
        """The entry of `tag` that maps `address`, page or block."""
        found = self.row(tag, address)
        if found is None:
            return self.block(tag, address)
        shift, row = found
        return Entry(shift, row[(address & KEY_MASK) >> shift & len(row) - 1])

    def insert(
        self, tag: Tag, address: int, entry: Entry, *, whole: int = 0
    ) -> "array[int] | None":
        """Remember that `entry` maps what `address` lies in. Returns the row when it is a page.

        `whole` is log2 of the bytes that stage 1 maps there, when `entry` is but a fragment of them.
        """
        address &= KEY_MASK
        row = self._insert(tag, address, entry)
        if whole > entry.shift:
            broken, key = self._spaces[tag].broken, (whole, address >> whole)
            if key not in broken:
                broken.add(key)
                self._used += _BLOCK_WEIGHT  # who comes next makes room
        return row

    def _insert(self, tag: Tag, address: int, entry: Entry) -> "array[int] | None":
        if entry.shift not in _PAGE_SHIFTS:
            self._insert_block(tag, (entry.shift, address >> entry.shift), entry.slot)
            return None
        key = entry.shift, address >> (2 * entry.shift - 3)
        space = self._spaces.get(tag)
        row = None if space is None else space.rows.get(key)
        if row is None:
            entries = 1 << (entry.shift - 3)
            self._make_room(entries)
            row = array("Q", bytes(entries * 8))
            space = self._spaces.setdefault(tag, _Space())
            space.rows[key] = row
            if entry.shift not in space.page_shifts:
                space.page_shifts += (entry.shift,)
        row[address >> entry.shift & len(row) - 1] = entry.slot
        return row

    def _insert_block(self, tag: Tag, key: tuple[int, int], slot: int) -> None:
        self._make_room(_BLOCK_WEIGHT)
        space = self._spaces.setdefault(tag, _Space())
        if key in space.blocks:
            self._used -= _BLOCK_WEIGHT
        space.blocks[key] = slot

    def forget(self, tag: Tag, address: int) -> None:
        """Drop the entry of `tag` that maps `address`."""
        space = self._spaces.get(tag)
        if space is not None:
            self._forget(space, address & KEY_MASK)
            self._tidy(tag, space)

    def _forget(self, space: _Space, address: int) -> None:
        for shift in space.page_shifts:
            row = space.rows.get((shift, address >> (2 * shift - 3)))
            if row is not None:
                row[address >> shift & len(row) - 1] = 0
        if space.blocks:
            for shift in _BLOCK_SHIFTS:
                if space.blocks.pop((shift, address >> shift), None) is not None:
                    self._used -= _BLOCK_WEIGHT

    def _make_room(self, entries: int) -> None:
        # Evicting is always allowed: oldest space first.
        while self._used + entries > self._capacity and self._spaces:
            self._drop(next(iter(self._spaces)))
        self._used += entries

    def _drop(self, tag: Tag) -> None:
        self._used -= self._spaces.pop(tag).weight()

    # Invalidation

    def invalidate_all(self) -> None:
        """Everything: reset."""
        self._spaces.clear()
        self._used = 0

    def invalidate_world(self, world: World) -> None:
        """Every entry of a StreamWorld, of both stages (CMD_TLBI_NSNH_ALL, CMD_TLBI_EL2_ALL)."""
        for tag in [t for t in self._spaces if t.world is world]:
            self._drop(tag)

    def invalidate_vmid(self, world: World, vmid: int, *, stage_2: bool = False) -> None:
        """Every stage 1 entry of the VMID, global ones too (CMD_TLBI_NH_ALL).

        With `stage_2` those of stage 2 as well (CMD_TLBI_S12_VMALL).
        """
        for tag in [t for t in self._spaces if t.world is world and t.vmid == vmid]:
            if stage_2 or tag.asid != STAGE_2:
                self._drop(tag)

    def invalidate_asid(self, world: World, vmid: int, asid: int) -> None:
        """Every entry of the ASID that is not global (CMD_TLBI_NH_ASID)."""
        tag = Tag(world, vmid, asid)
        if tag in self._spaces:
            self._drop(tag)

    def invalidate_address(self, world: World, vmid: int, asid: int | None, address: int) -> None:
        """The entries that map one byte (CMD_TLBI_NH_VA, _VAA, _S2_IPA and those of EL2).

        With an ASID, global entries too; `asid` None is every ASID. `STAGE_2` is for IPAs, and leaves entries of both
        stages alone, as the architecture allows (4.4.3).
        """
        address &= KEY_MASK
        for tag, space in list(self._of(world, vmid, asid)):
            self._forget(space, address)
            if space.broken:
                for shift in _ALL_SHIFTS:
                    if (shift, address >> shift) in space.broken:
                        self._clear_whole(space, (shift, address >> shift))
            self._tidy(tag, space)

    def invalidate_range(
        self,
        world: World,
        vmid: int,
        asid: int | None,
        address: int,
        size: int,
        shifts: Collection[int],
    ) -> None:
        """`invalidate_address` of every byte of a range, for entries whose log2 of bytes is one of `shifts`.

        A range does not reach from the lower half of the address space into the upper one, nor beyond it (4.4.1.1).
        """
        first = address & KEY_MASK
        last = min(first + size - 1, first | _HALF - 1)
        for tag, space in list(self._of(world, vmid, asid)):
            self._clear(space, first, last, shifts)
            for shift, place in list(space.broken):
                if shift in shifts and first >> shift <= place <= last >> shift:
                    self._clear_whole(space, (shift, place))
            self._tidy(tag, space)

    def _clear_whole(self, space: _Space, key: tuple[int, int]) -> None:
        """Drop all fragments of what stage 1 maps as a whole."""
        shift, place = key
        if key in space.broken:
            space.broken.remove(key)
            self._used -= _BLOCK_WEIGHT
        self._clear(space, place << shift, (place + 1 << shift) - 1, _ALL_SHIFTS)

    def _clear(self, space: _Space, first: int, last: int, shifts: Collection[int]) -> None:
        for shift in shifts:
            if shift in space.page_shifts:
                span = 2 * shift - 3
                for place in _within(space.rows, shift, first >> span, last >> span):
                    _clear_slots(space.rows[shift, place], place << span, shift, first, last)
            elif space.blocks:
                for place in _within(space.blocks, shift, first >> shift, last >> shift):
                    del space.blocks[shift, place]
                    self._used -= _BLOCK_WEIGHT

    def _tidy(self, tag: Tag, space: _Space) -> None:
        if not space.blocks and not space.rows:
            self._drop(tag)

    def _of(self, world: World, vmid: int, asid: int | None) -> Iterator[tuple[Tag, _Space]]:
        for tag, space in self._spaces.items():
            if tag.world is not world or tag.vmid != vmid:
                continue
            if tag.asid == STAGE_2 or asid == STAGE_2:
                wanted = tag.asid == asid
            else:
                wanted = asid is None or tag.asid in (asid, GLOBAL, GLOBAL_SET_1)
            if wanted:
                yield tag, space


def _within(
    entries: Collection[tuple[int, int]], shift: int, low: int, high: int
) -> Collection[int]:
    """The places from `low` to `high` at which there is an entry of `shift`."""
    if high - low < len(entries):
        return [place for place in range(low, high + 1) if (shift, place) in entries]
    return [place for size, place in entries if size == shift and low <= place <= high]


def _clear_slots(row: "array[int]", start: int, shift: int, first: int, last: int) -> None:
    """Empty the slots of a row from `start` on that map a byte from `first` to `last`."""
    low = max(first - start, 0) >> shift
    high = min((last - start >> shift) + 1, len(row))
    row[low:high] = array("Q", bytes(8 * (high - low)))


_BLOCK_SHIFTS = tuple(
    sorted({granule + levels * (granule - 3) for granule in _PAGE_SHIFTS for levels in (1, 2)})
)
"""log2 of the bytes that a block of level 2, and of level 1, maps, for every granule."""
_ALL_SHIFTS = _PAGE_SHIFTS + _BLOCK_SHIFTS
