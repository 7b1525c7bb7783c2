"""Looking at memory and caches without touching either: it says what a cold SMMU would do."""

from array import array
from collections.abc import Callable

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import ASID, STREAM
from tests.stages_rig import S2_PLAIN, Stages, Table
from viommu.layouts.tables import SteConfig
from viommu.smmu import Access
from viommu.smmu.context import StreamContext
from viommu.smmu.inspection import Inspection, StaleStructure
from viommu.smmu.mappings import Mapped, mapped
from viommu.smmu.tlb import STAGE_2, Tag, World

IOVA, OUT = 0x12_3400_0000, 0x5A_8000_0000
LEAF, S2_LEAF = hw.PLAIN | hw.PAGE, S2_PLAIN | hw.PAGE
GRANULES = (12, 14, 16)


class Rig(Stages):
    """A stage 1 alone, with an inspection."""

    def __init__(self, granule: int = 12) -> None:
        super().__init__()
        self.table = Table(self, granule, 39)
        self.stage_1_only(self.table)
        self.inspection = Inspection(self.smmu)

    def contexts(self) -> dict[Tag, StreamContext]:
        """The domain of the stream, as its tables are in memory."""
        context = self.inspection.stream(STREAM).context
        assert context is not None
        found = dict.fromkeys(context.tags, context)
        if context.stage_1 is not None and context.stage_2 is not None:
            tag = context.stage_2.tag
            found[tag] = StreamContext(None, context.stage_2, (tag,), False)
        return found


@pytest.fixture
def rig() -> Rig:
    return Rig()


# Memory


def test_what_governs_a_stream(rig: Rig) -> None:
    view = rig.inspection.stream(STREAM)
    assert (view.ste_address, view.cd_address) == (hw.STRTAB + 64 * STREAM, rig.cd_address)
    assert view.ste is not None
    assert view.cd is not None
    assert (view.ste.config, view.cd.asid) == (SteConfig.S1_TRANSLATE, ASID)
    assert view.context is not None
    assert view.context.tag == Tag(World.EL1, 0, ASID)
    assert (view.state, view.fault) == ("translate", None)
    assert rig.inspection.stream(STREAM) is view


@pytest.mark.parametrize(
    ("ste", "state"),
    [
        (hw.STE_ABORT, "abort"),
        (hw.STE_BYPASS, "bypass"),
        (0, "C_BAD_STE"),
        (hw.STE_S1 | 0x1000, "F_CD_FETCH"),
    ],
)
def test_every_state_of_a_stream_as_soon_as_memory_has_it(rig: Rig, ste: int, state: str) -> None:
    before = rig.inspection.stream(STREAM)
    rig.put(hw.STRTAB + 64 * STREAM, ste)
    now = rig.inspection.stream(STREAM)
    assert now.state == state
    assert rig.inspection.differing(before, now) == "STE"
    rig.put(rig.cd_address, 0)
    assert rig.inspection.stream(STREAM).state == state


def test_which_structure_made_a_difference(rig: Rig) -> None:
    before = rig.inspection.stream(STREAM)
    rig.put(hw.STRTAB + 64 * STREAM + 24, 0xFFFF_F000)  # S2TTB: nothing here
    same = rig.inspection.stream(STREAM)
    assert same is not before
    assert rig.inspection.differing(before, same) is None
    rig.put(rig.cd_address, 0)
    now = rig.inspection.stream(STREAM)
    assert now.state == "C_BAD_CD"
    assert rig.inspection.differing(before, now) == "CD"


def test_a_stream_beyond_the_table(rig: Rig) -> None:
    view = rig.inspection.stream(0x1000)
    assert (view.state, view.ste, view.ste_address) == ("C_BAD_STREAMID", None, None)


def test_the_walk_of_an_address_with_each_descriptor(rig: Rig) -> None:
    leaf = rig.table.map(IOVA, OUT | LEAF)
    walk = rig.inspection.walk(Access(STREAM), IOVA + 0x123)
    assert walk.fault is None
    assert walk.descriptors[-1] == (leaf, OUT | LEAF, 3, 1)
    assert len(walk.descriptors) == 3
    assert walk.entry is not None
    assert walk.entry.slot & ~0xFFF == OUT
    rig.put(leaf, 0)
    walk = rig.inspection.walk(Access(STREAM), IOVA)
    assert (walk.entry, walk.fault, len(walk.descriptors)) == (None, "F_TRANSLATION", 3)


def test_looking_leaves_no_trace(rig: Rig) -> None:
    """Not in the caches, not in the event queue, not in memory: not even the access flag is set."""
    rig.stage_1_only(rig.table, cd=hw.HA)
    rig.table.map(IOVA, (OUT | LEAF) & ~hw.AF)
    before = bytes(rig.ram), len(rig.smmu.tlb), len(rig.smmu.configuration)
    access = Access(STREAM)
    view = rig.inspection.stream(STREAM)
    assert rig.inspection.translate(view, access, IOVA, 64) == (array("Q", (OUT, 64)), None)
    runs, fault = rig.inspection.translate(view, access, IOVA, 8192)
    assert (list(runs), fault) == ([OUT, 4096], "F_TRANSLATION")
    rig.inspection.walk(access, IOVA)
    rig.inspection.walk(access, 0)
    assert (bytes(rig.ram), len(rig.smmu.tlb), len(rig.smmu.configuration)) == before
    assert rig.events() == []


# The TLB


@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("level", [2, 3])
def test_entries_that_memory_no_longer_has(granule: int, level: int) -> None:
    rig = Rig(granule)
    size = 1 << rig.table.shift(level)
    kind = hw.PLAIN | (hw.PAGE if level == 3 else hw.BLOCK)
    leaves = [rig.table.map(n * size, OUT + n * size | kind, level=level) for n in range(3)]
    rig.go(0, min(3 * size, 1 << 21))
    for n in range(3):
        rig.go(n * size)
    contexts = rig.contexts()
    assert list(rig.inspection.stale_translations(contexts)) == []
    assert list(rig.inspection.stale_translations(contexts)) == []
    rig.put(leaves[1], 0)
    rig.put(leaves[2], OUT | kind)
    found = list(rig.inspection.stale_translations(contexts))
    assert [(each.iova, 1 << each.entry.shift, each.now) for each in found] == [
        (size, size, "F_TRANSLATION"),
        (2 * size, size, OUT),
    ]
    assert {each.tag.asid for each in found} == {ASID}
    assert list(rig.inspection.stale_translations({})) == []
    for n in (1, 2):
        rig.put(leaves[n], OUT + n * size | kind)
    assert list(rig.inspection.stale_translations(contexts)) == []


@pytest.mark.parametrize(
    ("change", "now"),
    [
        (lambda leaf: leaf | hw.READ_ONLY, "less permission"),
        (lambda leaf: leaf & ~hw.USER, "F_PERMISSION"),
        (lambda leaf: leaf & ~hw.AF, "F_ACCESS"),
        (lambda leaf: leaf | 1 << 55, None),  # a bit for software
    ],
)
def test_permissions_that_memory_has_taken_away(
    rig: Rig, change: Callable[[int], int], now: str | None
) -> None:
    place = rig.table.map(IOVA, OUT | LEAF)
    rig.go(IOVA, write=True)
    rig.put(place, change(OUT | LEAF))
    found = [each.now for each in rig.inspection.stale_translations(rig.contexts())]
    assert found == ([] if now is None else [now])


def test_permissions_that_memory_has_granted_are_not_stale(rig: Rig) -> None:
    leaf = OUT | LEAF | hw.PXN | hw.UXN
    place = rig.table.map(IOVA, leaf | hw.READ_ONLY)
    rig.go(IOVA)
    rig.put(place, leaf)
    assert list(rig.inspection.stale_translations(rig.contexts())) == []


def test_a_table_that_is_taken_out(rig: Rig) -> None:
    rig.table.map(IOVA, OUT | LEAF)
    rig.go(IOVA)
    contexts = rig.contexts()
    assert list(rig.inspection.stale_translations(contexts)) == []
    rig.put(rig.table.base + (IOVA >> rig.table.shift(1)) * 8, 0)
    assert [each.iova for each in rig.inspection.stale_translations(contexts)] == [IOVA]


@pytest.mark.parametrize("stage", [1, 2])
def test_nested_entries_depend_on_both_stages(stage: int) -> None:
    rig = Rig()
    first, second = Table(rig, 12, 39, offset=rig.OFFSET), Table(rig, 12, 40)
    ipa = 0x34_5000
    places = [first.map(IOVA, ipa | LEAF), second.map(ipa, OUT | S2_LEAF)]
    rig.nested(first, second, vmid=9)
    rig.go(IOVA)
    contexts = rig.contexts()
    assert list(rig.inspection.stale_translations(contexts)) == []
    rig.put(places[stage - 1], 0)
    found = {each.tag.asid: each.now for each in rig.inspection.stale_translations(contexts)}
    expected = {ASID: "F_TRANSLATION"}
    assert found == (expected if stage == 1 else expected | {STAGE_2: "F_TRANSLATION"})


def test_the_upper_half(rig: Rig) -> None:
    address = (1 << 64) - 0x5000
    rig.put(rig.cd_address, hw.CD_PLAIN, rig.low, rig.high)
    rig.forget()
    place = rig.map(address, OUT | LEAF)
    rig.go(address)
    assert list(rig.inspection.stale_translations(rig.contexts())) == []
    rig.put(place, 0)
    (stale,) = rig.inspection.stale_translations(rig.contexts())
    assert stale.iova == address & (1 << 56) - 1


# The configuration cache


def test_structures_that_memory_no_longer_has(rig: Rig) -> None:
    rig.table.map(IOVA, OUT | LEAF)
    rig.go(IOVA)
    assert list(rig.inspection.stale_structures()) == []
    cd = rig.get(rig.cd_address)
    rig.put(rig.cd_address, cd ^ 1 << 48)  # the ASID
    assert list(rig.inspection.stale_structures()) == [StaleStructure("CD", STREAM, 0)]
    rig.put(hw.STRTAB + 64 * STREAM, hw.STE_ABORT)
    assert list(rig.inspection.stale_structures()) == [StaleStructure("STE", STREAM, None)]
    rig.forget()
    assert list(rig.inspection.stale_structures()) == []


# What a domain maps


@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("stage", [1, 2])
def test_everything_that_a_stage_maps(granule: int, stage: int) -> None:
    rig = Rig(granule)
    table = Table(rig, granule, 40)
    size = 1 << granule
    plain = LEAF if stage == 1 else S2_LEAF
    for iova, address in ((0, OUT), (size, OUT + 8 * size), (5 << 32, OUT + size)):
        table.map(iova, address | plain)
    block = 1 << table.shift(2)
    table.map(7 << 32, OUT | (plain & ~2), level=2)
    if stage == 1:
        rig.stage_1_only(table)
    else:
        rig.stage_2_only(table)
    context = rig.inspection.stream(STREAM).context
    assert context is not None
    found = list(mapped(rig.memory, context))
    assert sorted(each for each in found if each.iova is not None) == [
        Mapped(0, OUT, size),
        Mapped(size, OUT + 8 * size, size),
        Mapped(5 << 32, OUT + size, size),
        Mapped(7 << 32, OUT, block),
    ]
    tables = [each.address for each in found if each.iova is None]
    assert tables[0] == table.base
    assert len(tables) == len(set(tables)) > 1


def test_a_table_that_points_at_itself_comes_to_an_end(rig: Rig) -> None:
    for index in range(512):
        rig.put(rig.table.base + 8 * index, rig.table.base | hw.TABLE)
    context = rig.inspection.stream(STREAM).context
    assert context is not None
    assert len(list(mapped(rig.memory, context))) == 1
