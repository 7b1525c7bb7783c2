"""The three caching policies: what a driver's missing invalidation does with each (IHI 0070, 3.21, 4.3)."""

from dataclasses import replace

import pytest

from tests import smmu_rig as hw
from tests.stages_rig import PS_48, S2_PLAIN, S2R, STREAM, SYNC, Stages, Table, everything_but
from viommu.smmu import Features, TransactionAborted

LEAF = hw.PLAIN | hw.PAGE
OUT = 0x5A_8000_0000
POLICIES = ("none", "normal", "hostile")


def policy(caching: str) -> tuple[Stages, Table]:
    rig = Stages(everything_but(caching=caching))
    table = Table(rig, 12, 48)
    rig.stage_1_only(table)
    return rig, table


@pytest.mark.parametrize("caching", POLICIES)
def test_an_unmapped_page(caching: str) -> None:
    rig, table = policy(caching)
    place = table.map(0x1000, OUT | LEAF)
    rig.physical(0x1000)
    rig.put(place, 0)
    if caching == "none":
        assert rig.fault(0x1000) == hw.translation_record(0x10, 0x1000)
    else:
        assert rig.physical(0x1000) == OUT
    rig.submit((0x12 | 7 << 48, 0x1000), SYNC)
    assert rig.fault(0x1000) == hw.translation_record(0x10, 0x1000)


@pytest.mark.parametrize("caching", POLICIES)
def test_a_page_that_was_never_accessed(caching: str) -> None:
    """Its neighbour was: a hostile TLB has it."""
    rig, table = policy(caching)
    places = {page: table.map(page << 12, OUT + (page << 12) | LEAF) for page in (0, 3, 5, 511)}
    places[9] = table.map(9 << 12, OUT | LEAF | hw.READ_ONLY)
    rig.physical(0x5000)
    assert len(rig.smmu.tlb) == {"none": 1, "normal": 1, "hostile": 4}[caching]
    for place in places.values():
        rig.put(place, 0)
    for page in (0, 3, 511):
        if caching == "hostile":
            assert rig.physical(page << 12) == OUT + (page << 12)
        else:
            assert hw.number(rig.fault(page << 12)) == 0x10
    assert hw.number(rig.fault(0x9000)) == 0x10  # another kind of page is not guessed


@pytest.mark.parametrize("caching", POLICIES)
def test_what_a_table_does_not_map_is_never_cached(caching: str) -> None:
    rig, table = policy(caching)
    table.map(0x1000, OUT | LEAF)
    rig.physical(0x1000)
    for _ in range(2):
        assert hw.number(rig.fault(0x2000)) == 0x10
    table.map(0x2000, OUT | LEAF)
    assert rig.physical(0x2000) == OUT


@pytest.mark.parametrize("caching", POLICIES)
def test_a_valid_ste_that_is_changed(caching: str) -> None:
    rig, table = policy(caching)
    table.map(0x1000, OUT | LEAF)
    rig.physical(0x1000)
    rig.put(hw.STRTAB + 64 * STREAM, 0)
    if caching == "none":
        assert rig.fault(0x1000) == hw.configuration_record(0x04)
    else:
        assert rig.physical(0x1000) == OUT
    rig.submit((0x03 | STREAM << 32, 1), SYNC)
    assert rig.fault(0x1000) == hw.configuration_record(0x04)


@pytest.mark.parametrize("caching", POLICIES)
@pytest.mark.parametrize("command", [(0x03, 1), (0x04, 0), (0x04, 31), (0x05, 1), (0x06, 0)])
def test_a_bad_ste_or_cd_that_is_mended(caching: str, command: tuple[int, int]) -> None:
    """Software has to say so, whatever it was before (5.2.1): a hostile SMMU remembers that it was bad."""
    for structure, event in (("ste", 0x04), ("cd", 0x0A)):
        rig, table = policy(caching)
        table.map(0x1000, OUT | LEAF)
        place = hw.STRTAB + 64 * STREAM if structure == "ste" else rig.cd_address
        word = rig.get(place)
        rig.put(place, word & ~1 if structure == "ste" else word & ~hw.CD_V)
        assert rig.fault(0x1000) == hw.configuration_record(event)
        rig.put(place, word)
        if caching == "hostile":
            assert rig.fault(0x1000) == hw.configuration_record(event)
        else:
            assert rig.physical(0x1000) == OUT
        rig.submit((command[0] | STREAM << 32, command[1]), SYNC)
        enough = structure == "cd" or command[0] in (0x03, 0x04)
        if enough or caching != "hostile":
            assert rig.physical(0x1000) == OUT
        else:
            assert rig.fault(0x1000) == hw.configuration_record(event)


@pytest.mark.parametrize("caching", POLICIES)
@pytest.mark.parametrize("level_2", [False, True])
def test_a_new_stream_beside_one_that_works(caching: str, level_2: bool) -> None:
    """Its STE lay there, invalid, when its neighbour's was read: without CMD_CFGI_STE it may stay so."""
    rig, table = policy(caching)
    table.map(0x1000, OUT | LEAF)
    rig.write(hw.CR0, 0xC)
    streams = hw.STRTAB
    if level_2:
        level_1, streams = rig.alloc(4096), rig.alloc(4096)
        rig.put(level_1, streams | 7)
        rig.put(streams + 64 * STREAM, hw.STE_S1 | rig.cd_address)
        rig.write64(hw.STRTAB_BASE, level_1)
        rig.write(hw.STRTAB_BASE_CFG, 1 << 16 | 6 << 6 | 8)
    rig.write(hw.CR0, 0xD)
    for stream in (STREAM + 1, STREAM + 4):
        rig.forget()
        rig.put(streams + 64 * stream, 0)
        assert rig.physical(0x1000) == OUT
        rig.put(streams + 64 * stream, hw.STE_BYPASS)
        if caching == "hostile" and stream == STREAM + 1:
            expected = hw.configuration_record(0x04, stream=stream)
            assert rig.fault(0x1000, stream=stream) == expected
            rig.submit((0x03 | stream << 32, 1), SYNC)
        assert rig.physical(0x1000, stream=stream) == 0x1000


@pytest.mark.parametrize("caching", POLICIES)
def test_a_new_substream_beside_one_that_works(caching: str) -> None:
    rig, table = policy(caching)
    table.map(0x1000, OUT | LEAF)
    cds = rig.alloc(8 * 64, 512)
    rig.put(cds + 64, rig.cd_word(table), table.pointer)
    rig.ste(hw.STE_S1 | cds | 3 << 59)
    for substream in (2, 5):
        rig.forget()
        assert rig.physical(0x1000, substream=1) == OUT
        rig.put(cds + 64 * substream, rig.cd_word(table), table.pointer)
        if caching == "hostile" and substream == 2:
            assert hw.number(rig.fault(0x1000, substream=substream)) == 0x0A
            rig.submit((0x05 | STREAM << 32 | substream << 12, 1), SYNC)
        assert rig.physical(0x1000, substream=substream) == OUT
    # Nothing is read beyond a table, however small.
    rig.ste(hw.STE_S1 | cds + 64 | 0 << 59)
    assert rig.physical(0x1000) == OUT
    assert set(rig.smmu.configuration._contexts) == {(STREAM, 0)}


def test_reading_ahead_stays_within_the_tables() -> None:
    """What lies beyond the stream table or the CD table is not read, not even where it lies in memory."""
    rig, table = policy("hostile")
    rig.write(hw.CR0, 0xC)
    rig.write(hw.STRTAB_BASE_CFG, 1)  # two streams
    rig.write(hw.CR0, 0xD)
    for stream in range(4):
        rig.put(hw.STRTAB + 64 * stream, hw.STE_S1 | rig.cd_address)
    table.map(0x1000, OUT | LEAF)
    assert rig.physical(0x1000, stream=1) == OUT
    assert set(rig.smmu.configuration._stes) == {0, 1}


@pytest.mark.parametrize("caching", POLICIES)
def test_a_failed_fetch_is_never_remembered(caching: str) -> None:
    rig, table = policy(caching)
    table.map(0x1000, OUT | LEAF)
    word = rig.get(hw.STRTAB + 64 * STREAM)
    rig.put(hw.STRTAB + 64 * STREAM, hw.STE_S1 | 0x7000_0000)
    rig.forget()
    assert hw.number(rig.fault(0x1000)) == 0x09
    rig.memory.add_region(0x7000_0000, 64, memoryview(bytearray(64)))
    assert hw.number(rig.fault(0x1000)) == 0x0A
    rig.ste(word)
    assert rig.physical(0x1000) == OUT


@pytest.mark.parametrize("caching", POLICIES)
def test_a_smaller_stage_2_block_of_a_table_that_is_taken_away(caching: str) -> None:
    """S2_IPA alone is no more than half of an unmap: the combination stays, except where nothing is kept."""
    rig = Stages(everything_but(caching=caching))
    first, second = Table(rig, 12, 39, offset=rig.OFFSET), Table(rig, 12, 40)
    rig.nested(first, second, bits=S2R | PS_48, vmid=3)
    ipa = 0x12_3400_0000
    first.map(0x1000, ipa | LEAF)
    place = second.map(ipa, OUT | S2_PLAIN | hw.PAGE)
    rig.physical(0x1000)
    rig.put(place, 0)
    rig.submit((0x2A | 3 << 32, ipa), SYNC)
    if caching == "none":
        assert hw.number(rig.fault(0x1000)) == 0x10
    else:
        assert rig.physical(0x1000) == OUT
    rig.submit((0x10 | 3 << 32, 0), SYNC)
    assert hw.number(rig.fault(0x1000)) == 0x10


def test_without_caches_nothing_is_ever_stale() -> None:
    """Any change shows at once, and nobody has to say it."""
    rig = Stages(replace(Features(), caching="none"))
    table = Table(rig, 12, 48)
    cd = rig.cd_word(table)
    rig.stage_1_only(table)
    for step in range(20):
        place = table.map(0x1000, OUT + (step << 12) | LEAF)
        assert rig.physical(0x1000) == OUT + (step << 12)
        rig.put(rig.cd_address, cd & ~hw.CD_V)
        assert hw.number(rig.fault(0x1000)) == 0x0A
        rig.put(rig.cd_address, cd)
        rig.put(hw.STRTAB + 64 * STREAM, hw.STE_BYPASS)
        assert rig.physical(0x1000) == 0x1000
        rig.put(hw.STRTAB + 64 * STREAM, hw.STE_S1 | rig.cd_address)
        rig.put(place, 0)
        with pytest.raises(TransactionAborted):
            rig.physical(0x1000)
        rig.events()
