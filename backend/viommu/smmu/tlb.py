"""The TLB: what the SMMU remembers of translations until software invalidates it (3.17, 4.4).

Pages are kept in rows: one row holds, as slots (see `viommu.hot`), what one last-level table can map, so that a run
of pages is looked up and moved at once. Blocks are kept one by one. The model forgets an entry when a command says so
or when it is full; it never notices by itself that a table changed, so a missing invalidation shows.
"""

from array import array
from typing import NamedTuple

from viommu.layouts.tables import StreamWorld

GLOBAL = -1
"""The ASID under which global entries are kept."""

VALID = 1 << 0
PRIV_READ = 1 << 1
PRIV_WRITE = 1 << 2
PRIV_EXECUTE = 1 << 3
USER_READ = 1 << 4
USER_WRITE = 1 << 5
USER_EXECUTE = 1 << 6
"""Flags of a slot, below the address."""

FLAGS = (1 << 12) - 1
_BLOCK_WEIGHT = 32
# A block in a dict takes about as much memory as this many slots.
KEY_MASK = (1 << 56) - 1
"""Addresses are told apart by bits 55:0: what is above is the sign, or a tag that TBI ignores."""


def _block_shifts(granule: int) -> tuple[int, int]:
    """log2 of the bytes that a block of level 2, and of level 1, maps."""
    stride = granule - 3
    return granule + stride, granule + 2 * stride


class Tag(NamedTuple):
    """What a translation belongs to. `granule` is log2 of bytes."""

    world: StreamWorld
    vmid: int
    asid: int
    granule: int


class Block(NamedTuple):
    """One entry that maps 2^shift bytes; its slot's low address bits are 0."""

    shift: int
    slot: int


class Space:
    """The entries of one tag."""

    __slots__ = ("blocks", "rows")

    def __init__(self) -> None:
        self.rows: dict[int, array[int]] = {}
        self.blocks: dict[tuple[int, int], int] = {}


class Tlb:
    """All cached translations. `capacity` bounds their memory, in slots of 8 bytes."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        self._capacity = capacity
        self._used = 0
        self._spaces: dict[Tag, Space] = {}

    def __len__(self) -> int:
        """The number of valid entries."""
        return sum(
            len(space.blocks) + sum(bool(slot) for row in space.rows.values() for slot in row)
            for space in self._spaces.values()
        )

    def row(self, tag: Tag, address: int) -> "array[int] | None":
        """The row of `tag` that covers `address`, if there is one."""
        space = self._spaces.get(tag)
        if space is None:
            return None
        return space.rows.get((address & KEY_MASK) >> (2 * tag.granule - 3))

    def row_for_filling(self, tag: Tag, address: int) -> "array[int]":
        """The row of `tag` that covers `address`, made when it is missing."""
        row = self.row(tag, address)
        if row is None:
            entries = 1 << (tag.granule - 3)
            self._make_room(entries)
            row = array("Q", bytes(entries * 8))
            space = self._spaces.setdefault(tag, Space())
            space.rows[(address & KEY_MASK) >> (2 * tag.granule - 3)] = row
        return row

    def block(self, tag: Tag, address: int) -> Block | None:
        """The block of `tag` that covers `address`, if there is one."""
        space = self._spaces.get(tag)
        if space is None or not space.blocks:
            return None
        address &= KEY_MASK
        for shift in _block_shifts(tag.granule):
            slot = space.blocks.get((shift, address >> shift))
            if slot is not None:
                return Block(shift, slot)
        return None

    def insert_block(self, tag: Tag, address: int, block: Block) -> None:
        """Remember that `block` maps what `address` lies in."""
        self._make_room(_BLOCK_WEIGHT)
        space = self._spaces.setdefault(tag, Space())
        key = block.shift, (address & KEY_MASK) >> block.shift
        if key in space.blocks:
            self._used -= _BLOCK_WEIGHT
        space.blocks[key] = block.slot

    def _make_room(self, entries: int) -> None:
        # Evicting is always allowed: oldest space first.
        while self._used + entries > self._capacity and self._spaces:
            self._drop(next(iter(self._spaces)))
        self._used += entries

    def _drop(self, tag: Tag) -> None:
        space = self._spaces.pop(tag)
        self._used -= len(space.blocks) * _BLOCK_WEIGHT
        self._used -= len(space.rows) << (tag.granule - 3)

    def invalidate_all(self) -> None:
        """CMD_TLBI_NSNH_ALL, and reset."""
        self._spaces.clear()
        self._used = 0

    def invalidate_vmid(self, world: StreamWorld, vmid: int) -> None:
        """CMD_TLBI_NH_ALL: every stage 1 entry of the VMID, global ones too."""
        for tag in [t for t in self._spaces if t.world is world and t.vmid == vmid]:
            self._drop(tag)

    def invalidate_asid(self, world: StreamWorld, vmid: int, asid: int) -> None:
        """CMD_TLBI_NH_ASID: every entry of the ASID that is not global."""
        for tag in [t for t in self._spaces if t[:3] == (world, vmid, asid)]:
            self._drop(tag)

    def invalidate_address(
        self, world: StreamWorld, vmid: int, asid: int | None, address: int
    ) -> None:
        """CMD_TLBI_NH_VA, and with no `asid` CMD_TLBI_NH_VAA: the entries that map `address`, global ones too."""
        address &= KEY_MASK
        for tag, space in list(self._spaces.items()):
            if tag.world is not world or tag.vmid != vmid:
                continue
            if asid is not None and tag.asid not in (asid, GLOBAL):
                continue
            row = space.rows.get(address >> (2 * tag.granule - 3))
            if row is not None:
                row[address >> tag.granule & len(row) - 1] = 0
            for shift in _block_shifts(tag.granule):
                if space.blocks.pop((shift, address >> shift), None) is not None:
                    self._used -= _BLOCK_WEIGHT
            if not space.blocks and not space.rows:
                del self._spaces[tag]
