"""A block of stage 1 over pages of stage 2 is kept in pieces, and still invalidated by any of its addresses.

Software invalidates a block by one address (DDI 0487, D8), as Linux does with one command for each block.
"""

import pytest

from tests.smmu_rig import (
    AF,
    ASID,
    BASE,
    BLOCK,
    CD_PLAIN,
    EPD1,
    PAGE,
    PLAIN,
    STE_NESTED,
    STREAM,
    STRTAB,
    TABLE,
    Rig,
)
from viommu.smmu import Access, Features, TransactionAborted
from viommu.smmu.tlb import VALID, Entry, Tag, Tlb, World

VMID = 5
S2AP = 3 << 6
BLOCK_IPA = 0x4000_0000
IOVA = 0x60_0000_0000


@pytest.fixture
def rig() -> Rig:
    """Two pages of stage 2, far apart in a block of 2 MiB of stage 1; the rig's RAM is where it is in both stages."""
    rig = Rig(Features())
    stage_2, below, pages = rig.alloc(4096), rig.alloc(4096), rig.alloc(4096)
    rig.put(stage_2 + 8 * 1, below | TABLE)
    rig.put(stage_2 + 8 * 2, BASE | S2AP | AF | BLOCK)
    rig.put(below, pages | TABLE)
    for index in (0, 300):
        rig.put(pages + 8 * index, BASE + 0x10_0000 + index * 4096 | S2AP | AF | PAGE)
    fields = VMID | 25 << 32 | 1 << 38 | 5 << 48 | 1 << 51 | 1 << 58
    rig.put(STRTAB + 64 * STREAM, STE_NESTED | rig.cd_address, 0, fields, stage_2)
    table, level_1, level_2 = rig.low, rig.alloc(4096), rig.alloc(4096)
    rig.put(rig.cd_address, CD_PLAIN | EPD1, table)
    rig.put(table + 8 * (IOVA >> 39), level_1 | TABLE)
    rig.put(level_1 + 8 * (IOVA >> 30 & 511), level_2 | TABLE)
    rig.leaf = level_2  # type: ignore[attr-defined]
    rig.put(level_2, BLOCK_IPA | PLAIN | BLOCK)
    rig.submit((3 | STREAM << 32, 0))
    return rig


def reach(rig: Rig, page: int) -> int | None:
    try:
        translation = rig.smmu.translate(Access(STREAM), IOVA + page * 4096, 4)
    except TransactionAborted:
        return None
    rig.smmu.retire(translation)
    return translation.runs[0]


@pytest.mark.parametrize(
    "command",
    [
        (0x12 | VMID << 32 | ASID << 48, IOVA | 1),
        (0x12 | VMID << 32 | ASID << 48, IOVA + 300 * 4096),
        (0x13 | VMID << 32, IOVA + 77 * 4096),
        # By range, of 4 KiB granules: two of them, or one and TTL 2; without a TTL that would be reserved.
        (0x12 | VMID << 32 | ASID << 48 | 1 << 12, IOVA | 1 << 10),
        (0x12 | VMID << 32 | ASID << 48, IOVA | 1 << 10 | 2 << 8),
    ],
)
def test_every_piece_goes(rig: Rig, command: tuple[int, int]) -> None:
    pages = (0, 300)
    assert [reach(rig, page) for page in pages] == [BASE + 0x10_0000 + p * 4096 for p in pages]
    rig.put(rig.leaf, 0)  # type: ignore[attr-defined]
    assert None not in [reach(rig, page) for page in pages], "nothing was cached"
    rig.submit(command, (0x46, 0))
    assert [reach(rig, page) for page in pages] == [None, None]


def test_what_is_beside_the_block_stays(rig: Rig) -> None:
    assert reach(rig, 0) is not None
    rig.put(rig.leaf, 0)  # type: ignore[attr-defined]
    rig.submit((0x12 | VMID << 32 | ASID << 48, IOVA + (2 << 20)), (0x46, 0))
    assert reach(rig, 0) is not None


PAGE_ENTRY = Entry(12, BASE | VALID)


def test_what_is_known_of_pieces_takes_room() -> None:
    """A guest can have as many wholes as it likes, each of which leaves no piece."""
    old, busy = Tag(World.EL1, 1, 0), Tag(World.EL1, 2, 0)
    tlb = Tlb(capacity=4096)
    tlb.insert(old, 0, PAGE_ENTRY)
    tlb.insert(busy, 1 << 40, PAGE_ENTRY)
    for number in range(100):
        tlb.insert(busy, number << 25, Entry(21, BASE | VALID), whole=25)
        tlb.forget(busy, number << 25)
    assert old not in tlb.tags(), "the oldest had to go"
    tlb.invalidate_range(World.EL1, 2, 0, 0, 1 << 40, (21, 25))
    assert tlb.tags() == [busy]
    tlb.invalidate_all()
    tlb.insert(old, 0, PAGE_ENTRY)
    for _ in range(2000):
        tlb.insert(busy, 0, Entry(21, BASE | VALID), whole=25)
        tlb.invalidate_range(World.EL1, 2, 0, 0, 1 << 25, (21, 25))
    assert tlb.tags() == [old], "what has gone takes none"


def test_a_space_that_is_empty_is_none() -> None:
    tlb = Tlb()
    for vmid in range(10):
        tlb.insert(Tag(World.EL1, vmid, 0), 0, Entry(21, BASE | VALID))
        tlb.forget(Tag(World.EL1, vmid, 0), 0)
    assert tlb.tags() == []
