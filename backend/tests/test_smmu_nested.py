"""Stage 1 on stage 2: every fetch through stage 2, sizes, permissions, and whose fault it is (IHI 0070, 3.4, 7.3)."""

from itertools import product

import pytest

from tests import smmu_rig as hw
from tests.stages_rig import (
    CLASS_CD,
    CLASS_TT,
    IND,
    PNU,
    PS_48,
    RNW,
    S2_NORMAL,
    S2_PLAIN,
    S2_READ,
    S2_WRITE,
    S2PTW,
    S2R,
    TT_READ,
    Stages,
    Table,
    everything_but,
    high_word,
    stage_2_record,
)
from viommu.smmu import TransactionAborted

OUT = 0x5A_8000_0000
IPA = 0x12_3400_0000
LEAF = hw.PLAIN | hw.PAGE
S2_LEAF = S2_PLAIN | hw.PAGE


def alternating(rig: Stages, *, cd: int = 0, bits: int = S2R | PS_48) -> tuple[Table, Table]:
    """Stage 1 with its tables at `OFFSET`, on a stage 2 that maps RAM there, both of 4 KiB."""
    first, second = Table(rig, 12, 39, offset=rig.OFFSET), Table(rig, 12, 40)
    rig.nested(first, second, cd=cd, bits=bits)
    return first, second


# Sizes

LEVELS = {12: (1, 2, 3), 14: (2, 3), 16: (2, 3)}
COMBINATIONS = [
    (g1, l1, g2, l2)
    for g1, g2 in product(LEVELS, LEVELS)
    for l1, l2 in product(LEVELS[g1], LEVELS[g2])
]


@pytest.mark.parametrize(("granule_1", "level_1", "granule_2", "level_2"), COMBINATIONS)
def test_every_size_on_every_size(
    granule_1: int, level_1: int, granule_2: int, level_2: int
) -> None:
    rig = Stages()
    first = Table(rig, granule_1, 42, offset=rig.OFFSET)
    second = Table(rig, granule_2, 44)
    rig.nested(first, second)
    shift_1, shift_2 = first.shift(level_1), second.shift(level_2)
    kind_1 = hw.PAGE if level_1 == 3 else hw.BLOCK
    kind_2 = hw.PAGE if level_2 == 3 else hw.BLOCK
    address, ipa = 3 << 36, 5 << 40
    output = 7 << 42
    first.map(address, ipa | hw.PLAIN | kind_1, level=level_1)
    inside = (1 << shift_1) - 0x1_2345 if shift_1 > 16 else (1 << shift_1) - 0x345
    second.map(ipa, output | S2_PLAIN | kind_2, level=level_2)
    place = (ipa + inside) & -(1 << shift_2)
    if place != ipa:
        second.map(place, output + (3 << 36) | S2_PLAIN | kind_2, level=level_2)
        output_inside = output + (3 << 36) + ((ipa + inside) & (1 << shift_2) - 1)
    else:
        output_inside = output + inside
    for _ in range(2):
        assert rig.physical(address + 0x10) == output + 0x10
        assert rig.physical(address + inside) == output_inside
    # What the smaller of the two maps goes in one piece, and no further.
    piece = 1 << min(shift_1, shift_2)
    assert rig.go(address, min(piece, 1 << 21)) == [(output, min(piece, 1 << 21))]
    if shift_2 < shift_1 and place != ipa + piece:
        gap = ipa + piece
        expected = stage_2_record(0x10, address + piece, gap)
        assert rig.fault(address + piece) == expected


def test_52_bit_ipas_and_outputs() -> None:
    rig = Stages(everything_but(output_address_bits=52))
    first = Table(rig, 16, 52, offset=rig.OFFSET)
    second = Table(rig, 16, 52)
    rig.nested(first, second, cd=3 << 32, bits=S2R | 6 << 48)  # IPS 5 | 3 = 7: as 6
    ipa, output = 0x9_8765_4321_0000, 0xA_1234_5678_0000
    first.map(0xF_0000_0000_0000, high_word(ipa) | LEAF)
    second.map(ipa, high_word(output) | S2_LEAF)
    assert rig.physical(0xF_0000_0000_4567) == output + 0x4567


# Permissions and attributes of both stages


def test_permissions_are_those_that_both_stages_give() -> None:
    rig = Stages()
    first, second = alternating(rig)
    for ap, s2ap, xn in product(range(4), range(4), range(4)):
        index = ap << 4 | s2ap << 2 | xn
        address, ipa = index << 12, IPA + (index << 12)
        first.map(address, ipa | ap << 6 | hw.AF | hw.NG | hw.PAGE)
        second.map(ipa, OUT | s2ap << 6 | xn << 53 | S2_NORMAL | hw.AF | hw.PAGE)
        for privileged, write, fetch in product((False, True), repeat=3):
            first_allows = privileged or bool(ap & 1) or (fetch and not write)
            if write:
                first_allows = (privileged or bool(ap & 1)) and not ap & 2
            elif fetch and privileged:
                first_allows = ap != 1  # writable by EL0: never executed by EL1
            if write:
                second_allows = bool(s2ap & 2)
            elif fetch:
                second_allows = {0: True, 1: not privileged, 2: False, 3: privileged}[xn]
            else:
                second_allows = bool(s2ap & 1)
            attributes = hw.CLASS_IN | (0 if write else RNW) | (PNU if privileged else 0)
            attributes |= IND if fetch and not write else 0
            for _ in range(2):
                try:
                    rig.go(address, privileged=privileged, write=write, instruction=fetch)
                    assert first_allows
                    assert second_allows
                except TransactionAborted:
                    (found,) = rig.events()
                    if not first_allows:  # stage 1 comes first
                        expected = hw.translation_record(0x13, address, second=attributes)
                    else:
                        assert not second_allows
                        expected = stage_2_record(0x13, address, ipa, second=attributes)
                    assert found == expected, (ap, s2ap, xn, privileged, write, fetch)


def test_each_stage_says_itself_whether_its_faults_are_recorded() -> None:
    for r1, r2 in product((0, 1), repeat=2):
        rig = Stages()
        first, _ = alternating(rig, bits=PS_48 | r2 * S2R)
        word = rig.cd_word(first) & ~hw.RECORD | r1 * hw.RECORD
        rig.put(rig.cd_address, word)
        rig.forget()
        first.map(0x1000, IPA | LEAF)
        assert (rig.fault(0x1000) is not None) == bool(r2)
        assert (rig.fault(0x2000) is not None) == bool(r1)


# Faults of a walk, one after the other


def broken(rig: Stages, second: Table, place: int, leaf: int) -> None:
    """Change what stage 2 says of the page of RAM at `place`: all of its 2 MiB by pages."""
    region = place & -(1 << 21)
    entry = second.map(region + rig.OFFSET, 0, level=2)
    rig.put(entry, 0)
    for page in range(region, region + (1 << 21), 1 << 12):
        second.map(page + rig.OFFSET, page | S2_LEAF)
    second.map(place + rig.OFFSET, leaf)
    rig.forget()


BROKEN = {
    "translation": (0x10, 0),
    "address size": (0x11, 1 << 44 | S2_LEAF),
    "access": (0x12, S2_LEAF & ~hw.AF),
    "permission": (0x13, S2_LEAF & ~S2_READ),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("write", [False, True])
def test_stage_2_fault_of_a_table_of_stage_1(what: str, level: int, write: bool) -> None:
    event, leaf = BROKEN[what]
    rig = Stages()
    first, second = alternating(rig, bits=S2R | 4 << 48)
    address = 0x40_2000
    first.map(address, IPA | LEAF)
    second.map(IPA, (OUT & (1 << 40) - 1) | S2_LEAF)
    table = first.base
    for depth in range(1, level):
        table = (rig.get(table + (address >> 39 - 9 * depth & 511) * 8) & ~0xFFF) - rig.OFFSET
    entry = table + (address >> 39 - 9 * level & 511) * 8
    assert rig.physical(address, write=write) == OUT & (1 << 40) - 1
    broken(rig, second, table, leaf | (table if 1 < leaf < 1 << 44 else 0))
    attributes = CLASS_TT | (0 if write else RNW) | (TT_READ if event == 0x13 else 0)
    expected = stage_2_record(event, address, entry + rig.OFFSET, second=attributes)
    assert rig.fault(address, write=write) == expected
    # Other attributes of the transaction are told too, though the fetch is a privileged read of data.
    expected = stage_2_record(event, address, entry + rig.OFFSET, second=attributes | PNU)
    assert rig.fault(address, write=write, privileged=True) == expected


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("structure", ["CD", "L1CD"])
def test_stage_2_fault_of_a_context_descriptor(what: str, structure: str) -> None:
    event, leaf = BROKEN[what]
    rig = Stages()
    first, second = alternating(rig, bits=S2R | 4 << 48)
    words = rig.stage_2_words(second, S2R | 4 << 48)
    level_1, leaf_table = rig.alloc(4096), rig.alloc(4096)
    rig.put(level_1, leaf_table + rig.OFFSET | 1)
    rig.put(leaf_table + 64, rig.cd_word(first), first.pointer)
    pointer = level_1 + rig.OFFSET | 1 << 4 | 10 << 59
    rig.ste(hw.STE_NESTED | pointer, 0, *words)
    first.map(0x1000, IPA | LEAF)
    second.map(IPA, (OUT & (1 << 40) - 1) | S2_LEAF)
    assert rig.physical(0x1000, substream=1) == OUT & (1 << 40) - 1
    page, place = (leaf_table, leaf_table + 64) if structure == "CD" else (level_1, level_1)
    broken(rig, second, page, leaf | (page if 1 < leaf < 1 << 44 else 0))
    ssv = 1 << 11 | 1 << 12
    expected = stage_2_record(
        event, 0x7654_3210, place + rig.OFFSET, second=CLASS_CD | RNW, first=ssv
    )
    assert rig.fault(0x7654_3210, substream=1) == expected
    # Nothing of it was cached: once stage 2 is mended, the CD is found.
    broken(rig, second, page, page | S2_LEAF)
    rig.submit((0x28, 0), (0x46, 0))
    assert rig.physical(0x1000, substream=1) == OUT & (1 << 40) - 1


def test_external_aborts_tell_where_the_fetch_went() -> None:
    rig = Stages()
    first, second = alternating(rig)
    first.map(0x1000, IPA | LEAF)
    nowhere = 0x7000_0000
    head = 0x0B | hw.STREAM << 32
    # The tables of stage 2, when they map the output.
    second.map(IPA, nowhere | hw.TABLE, level=2)
    expected = hw.record(head, RNW | hw.CLASS_IN | 1 << 39, 0x1000, nowhere)
    assert rig.fault(0x1000) == expected
    # The descriptor of stage 1: its physical address.
    first.map(0x20_0000, (5 << 30) | hw.TABLE, level=2)
    second.map(5 << 30, nowhere | S2_LEAF)
    rig.forget()
    expected = hw.record(head, RNW | CLASS_TT, 0x20_1000, nowhere + 8)
    assert rig.fault(0x20_1000) == expected
    # The tables of stage 2, when they map a table of stage 1.
    second.map(5 << 30, nowhere | hw.TABLE, level=2)
    rig.forget()
    expected = hw.record(head, RNW | CLASS_TT | 1 << 39, 0x20_1000, nowhere)
    assert rig.fault(0x20_1000) == expected
    # And of the CD, both ways.
    second.map(7 << 30, nowhere | S2_LEAF)
    rig.ste(hw.STE_NESTED | 7 << 30, 0, *rig.stage_2_words(second))
    assert rig.fault(0x1000) == hw.configuration_record(0x09, fetch=nowhere)
    second.map(7 << 30, nowhere | hw.TABLE, level=2)
    rig.forget()
    expected = hw.record(head, RNW | CLASS_CD | 1 << 39, 0x1000, nowhere)
    assert rig.fault(0x1000) == expected


def test_an_ipa_beyond_ips_is_a_fault_of_stage_1_and_one_beyond_s2t0sz_of_stage_2() -> None:
    rig = Stages()
    first, second = Table(rig, 12, 39, offset=rig.OFFSET), Table(rig, 12, 40)
    rig.nested(first, second)
    word = rig.cd_word(first) & ~(7 << 32) | 3 << 32  # 42 bits
    rig.put(rig.cd_address, word)
    rig.forget()
    first.map(0x1000, 1 << 42 | LEAF)
    first.map(0x2000, 1 << 41 | LEAF)
    assert rig.fault(0x1000) == hw.translation_record(0x11, 0x1000)
    assert rig.fault(0x2000) == stage_2_record(0x10, 0x2000, 1 << 41)
    assert rig.fault(1 << 39) == hw.translation_record(0x10, 1 << 39)
    # The same of a table, and of a CD's pointer.
    first.map(0x20_0000, 1 << 42 | hw.TABLE, level=2)
    first.map(0x40_0000, 1 << 41 | hw.TABLE, level=2)
    assert rig.fault(0x20_0000) == hw.translation_record(0x11, 0x20_0000)
    expected = stage_2_record(0x10, 0x40_1000, 1 << 41 | 8, second=RNW | CLASS_TT)
    assert rig.fault(0x40_1000) == expected
    rig.ste(hw.STE_NESTED | 1 << 41, 0, *rig.stage_2_words(second))
    assert rig.fault(0) == stage_2_record(0x10, 0, 1 << 41, second=RNW | CLASS_CD)


@pytest.mark.parametrize("fwb", [0, 1 << 25])
def test_s2ptw_refuses_tables_and_cds_in_device_memory(fwb: int) -> None:
    rig = Stages()
    first, second = alternating(rig, bits=S2R | PS_48 | S2PTW)
    words = rig.stage_2_words(second, S2R | PS_48 | S2PTW)
    rig.ste(hw.STE_NESTED | rig.cd_address + rig.OFFSET, fwb, *words)
    first.map(0x1000, IPA | LEAF)
    second.map(IPA, OUT | S2_READ | S2_WRITE | hw.AF | hw.PAGE)  # the data may be a device
    assert rig.physical(0x1000) == OUT
    for attributes in range(16):
        # With FWB MemAttr[2] alone tells, else MemAttr[3:2].
        device = not attributes & (4 if fwb else 12)
        leaf = first.base | S2_READ | S2_WRITE | attributes << 2 | hw.AF | hw.PAGE
        broken(rig, second, first.base, leaf)
        if device:
            second_word = RNW | CLASS_TT | TT_READ
            expected = stage_2_record(0x13, 0x1000, first.pointer, second=second_word)
            for _ in range(2):
                assert rig.fault(0x1000) == expected
        else:
            assert rig.physical(0x1000) == OUT
    broken(rig, second, first.base, first.base | S2_LEAF)
    broken(rig, second, rig.cd_address, rig.cd_address | S2_READ | hw.AF | hw.PAGE)
    expected = stage_2_record(0x13, 8, rig.cd_address + rig.OFFSET, second=RNW | CLASS_CD)
    assert rig.fault(8) == expected
    # Without S2PTW they may lie anywhere.
    plain = rig.stage_2_words(second, S2R | PS_48)
    rig.ste(hw.STE_NESTED | rig.cd_address + rig.OFFSET, fwb, *plain)
    assert rig.physical(0x1000) == OUT


def test_bypassing_stage_1_by_s1dss_leaves_stage_2() -> None:
    rig = Stages()
    first, second = alternating(rig)
    words = rig.stage_2_words(second)
    pointer = rig.cd_address + rig.OFFSET | 1 << 59
    rig.ste(hw.STE_NESTED | pointer, 1, *words)  # S1DSS 1, 2 CDs
    second.map(IPA, OUT | S2_LEAF)
    first.map(0x1000, IPA | LEAF)
    assert rig.physical(IPA) == OUT
    assert rig.physical(0x1000, substream=0) == OUT
    assert rig.fault(0x1000) == stage_2_record(0x10, 0x1000, 0x1000)
    assert rig.fault(1 << 48) == hw.translation_record(0x11, 1 << 48)


def test_strw_counts_for_nothing_with_stage_2() -> None:
    rig = Stages()
    first, second = alternating(rig)
    first.map(0x1000, IPA | hw.READ_ONLY | hw.AF | hw.PAGE)
    second.map(IPA, OUT | S2_LEAF)
    for strw in range(4):
        pointer = rig.cd_address + rig.OFFSET
        rig.ste(hw.STE_NESTED | pointer, strw << 30, *rig.stage_2_words(second))
        assert hw.number(rig.fault(0x1000)) == 0x13  # no EL0 access: this is EL1
        assert rig.physical(0x1000, privileged=True) == OUT


@pytest.mark.parametrize("nested", [False, True])
def test_a_context_pointer_beyond_the_oas_is_illegal(nested: bool) -> None:
    rig = Stages(everything_but(output_address_bits=40))
    table = Table(rig, 12, 39)
    words = rig.stage_2_words(table, S2R | 2 << 48) if nested else ()
    config = hw.STE_NESTED if nested else hw.STE_S1
    rig.ste(config | 1 << 40, 0, *words)
    assert rig.fault(0) == hw.configuration_record(0x04)
    rig.ste(config | 1 << 39, 0, *words)
    assert hw.number(rig.fault(0)) == (0x10 if nested else 0x09)


def test_a_level_1_cd_pointer_beyond_the_oas_is_as_bad_as_none() -> None:
    rig = Stages(everything_but(output_address_bits=40))
    table = rig.alloc(4096)
    rig.put(table, 1 << 40 | 1)
    rig.ste(hw.STE_S1 | table | 1 << 4 | 7 << 59)
    assert rig.fault(0, substream=3) == hw.record(0x08 | 3 << 12 | hw.STREAM << 32)
