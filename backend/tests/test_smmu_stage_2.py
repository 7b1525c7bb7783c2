"""Stage 2 alone: what is legal, where walks lead, permissions (IHI 0070, 5.2; DDI 0487, D8.2, D8.4)."""

from itertools import product

import pytest

from tests import smmu_rig as hw
from tests.stages_rig import (
    IND,
    PNU,
    PS_48,
    PS_52,
    RNW,
    S2_NORMAL,
    S2_PLAIN,
    S2_READ,
    S2_WRITE,
    S2AA64,
    S2AFFD,
    S2ENDI,
    S2R,
    S2TG,
    Stages,
    Table,
    everything_but,
    stage_2_record,
)
from viommu.smmu import TransactionAborted

BAD_STE = hw.configuration_record(0x04)
OUT = 0x5A_8000_0000

# log2 of the granule, start level, S2SL0: what one table of that level covers, in bits.
STARTS = {
    (12, 2): (0, 30),
    (12, 1): (1, 39),
    (12, 0): (2, 48),
    (14, 3): (0, 25),
    (14, 2): (1, 36),
    (14, 1): (2, 47),
    (16, 3): (0, 29),
    (16, 2): (1, 42),
    (16, 1): (2, 55),
}


def legal(granule: int, sl0: int, t0sz: int, oas: int) -> bool:
    """The tables of D8.2, spelled out: T0SZ by granule and S2SL0, with up to 16 tables side by side."""
    ranges = {
        (12, 0): range(30, 40),  # 34 bits: 16 tables of level 2
        (12, 1): range(21, 34),  # 43 bits: 16 tables of level 1
        (12, 2): range(16, 25),
        (14, 0): range(35, 40),
        (14, 1): range(24, 39),
        (14, 2): range(16, 28),
        (16, 0): range(31, 40),
        (16, 1): range(18, 35),
        (16, 2): range(12, 22),
    }
    if sl0 == 2 and oas < {12: 44, 14: 42, 16: 44}[granule]:
        return False  # DDI 0487, AArch64.S2InvalidSL
    allowed = ranges.get((granule, sl0), range(0))
    return t0sz in allowed and t0sz >= 64 - oas and (t0sz >= 16 or granule == 16)


@pytest.mark.parametrize("oas", [32, 36, 40, 44, 48, 52])
@pytest.mark.parametrize("granule", [12, 14, 16])
def test_every_combination_of_t0sz_and_sl0(granule: int, oas: int) -> None:
    rig = Stages(everything_but(output_address_bits=oas))
    for sl0, t0sz in product(range(4), range(64)):
        word = t0sz << 32 | sl0 << 38 | S2TG[granule] | S2AA64 | S2R | PS_48
        rig.ste(hw.STE_S2, 0, word, hw.FREE)
        # An empty table: a translation fault when the STE is legal.
        found = hw.number(rig.fault(0))
        assert found == (0x10 if legal(granule, sl0, t0sz, oas) else 0x04), (granule, sl0, t0sz)


@pytest.mark.parametrize("bits", [36, 40, 48])
@pytest.mark.parametrize("granule", [12, 14, 16])
def test_s2ttb_lies_within_s2ps(granule: int, bits: int) -> None:
    rig = Stages()
    table = Table(rig, granule, 32)
    encoding = {36: 1, 40: 2, 48: 5}[bits] << 48
    word, _ = rig.stage_2_words(table, S2R | encoding)
    rig.ste(hw.STE_S2, 0, word, 1 << bits)
    assert rig.fault(0) == BAD_STE
    rig.ste(hw.STE_S2, 0, word, 1 << bits - 1)
    assert hw.number(rig.fault(0)) == 0x0B  # nothing is there


def test_only_64_kib_tables_lie_above_48_bits() -> None:
    rig = Stages(everything_but(output_address_bits=52))
    for granule, event in ((12, 0x04), (14, 0x04), (16, 0x0B)):
        table = Table(rig, granule, 32)
        word, _ = rig.stage_2_words(table, S2R | PS_52)
        rig.ste(hw.STE_S2, 0, word, 1 << 50)
        assert hw.number(rig.fault(0)) == event


@pytest.mark.parametrize("reserved", [PS_52, 7 << 48])
def test_s2ps_is_capped_by_the_oas(reserved: int) -> None:
    rig = Stages(everything_but(output_address_bits=44))
    table = Table(rig, 12, 40)
    rig.stage_2_only(table, S2R | reserved)
    table.map(0x1000, (1 << 43) | S2_PLAIN | hw.PAGE)
    table.map(0x2000, (1 << 44) | S2_PLAIN | hw.PAGE)
    assert rig.physical(0x1000) == 1 << 43
    assert rig.fault(0x2000) == stage_2_record(0x11, 0x2000, 0x2000)


@pytest.mark.parametrize("wrong", [S2ENDI, S2AA64, 3 << 46], ids=["S2ENDI", "AArch32", "S2TG 3"])
def test_what_is_not_implemented_is_illegal(wrong: int) -> None:
    rig = Stages()
    table = Table(rig, 16 if wrong == 3 << 46 else 12, 39)
    rig.stage_2_only(table)
    assert hw.number(rig.fault(0)) == 0x10
    word, pointer = rig.stage_2_words(table)
    rig.ste(hw.STE_S2, 0, word ^ wrong if wrong != 3 << 46 else word | wrong, pointer)
    assert rig.fault(0) == BAD_STE


@pytest.mark.parametrize("granule", [12, 14, 16])
def test_a_granule_that_is_not_implemented_is_illegal(granule: int) -> None:
    others = tuple({12, 14, 16} - {granule})
    rig = Stages(everything_but(granules=others))
    rig.stage_2_only(Table(rig, granule, 36))
    assert rig.fault(0) == BAD_STE
    rig.stage_2_only(Table(rig, others[0], 36))
    assert hw.number(rig.fault(0)) == 0x10


@pytest.mark.parametrize("vmid", [0xFF, 0x100, 0x8001])
def test_a_vmid_of_more_than_8_bits_is_illegal_where_there_are_8(vmid: int) -> None:
    rig = Stages(everything_but(vmid_bits=8))
    table = Table(rig, 12, 39)
    table.map(0x1000, OUT | S2_PLAIN | hw.PAGE)
    low = rig.alloc(4096)
    rig.put(rig.cd_address, hw.CD_PLAIN, low, low)
    for config in (hw.STE_S2, hw.STE_S1 | rig.cd_address, hw.STE_NESTED | rig.cd_address):
        word, pointer = rig.stage_2_words(table, vmid=vmid)
        rig.ste(config, 0, word, pointer)
        number = hw.number(rig.fault(0x9000))
        assert (number == 0x04) == (vmid > 0xFF), hex(config)
    # It is ignored where it does not count: in bypass, in EL2.
    rig.ste(hw.STE_BYPASS, 0, vmid)
    assert rig.physical(0x1000) == 0x1000
    rig.ste(hw.STE_S1 | rig.cd_address, 2 << 30, vmid)
    assert hw.number(rig.fault(0x9000)) == 0x10


# Walks


@pytest.mark.parametrize(("granule", "start"), STARTS)
@pytest.mark.parametrize("concatenated", [0, 1, 4])
def test_walks_of_every_start_level_with_tables_side_by_side(
    granule: int, start: int, concatenated: int
) -> None:
    covered = STARTS[granule, start][1]
    bits = min(covered + concatenated, 52 if granule == 16 else 48)
    rig = Stages(everything_but(output_address_bits=52), ram=24 << 20)
    table = Table(rig, granule, bits, start=start)
    rig.stage_2_only(table, S2R | PS_48)
    last = (1 << bits) - (1 << granule)
    middle = 1 << bits - 1
    for index, address in enumerate((0, 1 << granule, middle, last)):
        output = OUT + (index << granule)
        table.map(address, output | S2_PLAIN | hw.PAGE)
        assert rig.physical(address + 0x123) == output + 0x123
        rig.forget()
    # What is not mapped, and what is beyond the range of S2T0SZ.
    assert rig.fault(2 << granule) == stage_2_record(0x10, 2 << granule, 2 << granule)
    if bits < 52:
        beyond = 1 << bits
        assert rig.fault(beyond | 0x10) == stage_2_record(0x10, beyond | 0x10, beyond)


BLOCKS = {(12, 1): 30, (12, 2): 21, (14, 2): 25, (16, 2): 29, (16, 1): 42}


@pytest.mark.parametrize(("granule", "level"), list(product((12, 14, 16), range(3))))
@pytest.mark.parametrize("oas", [48, 52])
def test_blocks_exist_on_some_levels(granule: int, level: int, oas: int) -> None:
    if (granule, level) == (16, 0):
        level = 3  # there is no level 0: a descriptor of level 3 without bit 1 is reserved
    rig = Stages(everything_but(output_address_bits=oas))
    bits = {12: 48, 14: 47, 16: 48}[granule]
    start = min(level, {12: 0, 14: 1, 16: 1}[granule])
    if (granule, level) == (14, 0):
        start, level = 1, 1
    table = Table(rig, granule, bits, start=start)
    rig.stage_2_only(table)
    shift = BLOCKS.get((granule, level))
    exists = shift is not None and (shift != 42 or oas == 52)
    address = 3 << table.shift(level)
    table.map(address, (5 << table.shift(level)) | S2_PLAIN | hw.BLOCK, level=level)
    if exists:
        inside = (1 << table.shift(level)) - 0x777
        assert rig.physical(address + inside) == (5 << table.shift(level)) + inside
        assert rig.go(address, 0x20_0000) == [(5 << table.shift(level), 0x20_0000)]
    else:
        assert rig.fault(address) == stage_2_record(0x10, address, address)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_an_address_that_is_too_large_at_every_level(level: int) -> None:
    rig = Stages()
    table = Table(rig, 12, 48)
    place = table.map(0x1000, 1 << 40 | S2_PLAIN | hw.PAGE)
    rig.stage_2_only(table, S2R | 2 << 48)  # 40 bits
    assert rig.fault(0x1000) == stage_2_record(0x11, 0x1000, 0x1000)
    rig.put(place, OUT & (1 << 40) - 1 | S2_PLAIN | hw.PAGE)
    rig.physical(0x1000)
    entry = table.map(0x1000, 1 << 40 | hw.TABLE | S2_PLAIN, level=level)
    rig.forget()
    assert rig.fault(0x1000) == stage_2_record(0x11, 0x1000, 0x1000)
    # Fetched from where nothing is.
    if level < 3:
        rig.put(entry, 0x7000_0000 | hw.TABLE)
        expected = hw.record(0x0B | hw.STREAM << 32, RNW | hw.CLASS_IN | 1 << 39, 0x1000)
        found = rig.fault(0x1000)
        assert found is not None
        assert found[:24] == expected[:24]
        assert int.from_bytes(found[24:], "little") == 0x7000_0000 + (8 if level == 2 else 0)


@pytest.mark.parametrize("oas", [40, 48, 52])
def test_an_input_beyond_the_oas_is_an_address_size_fault_of_stage_1(oas: int) -> None:
    """It is recorded and aborted whatever S2R and S2S say (3.12), and never meets an alias."""
    rig = Stages(everything_but(output_address_bits=oas))
    table = Table(rig, 12, 39)
    table.map(0x1000, OUT & (1 << 39) - 1 | S2_PLAIN | hw.PAGE)
    for bits in (S2R, 0, 1 << 57):
        rig.stage_2_only(table, bits | PS_48)
        assert rig.physical(0x1000) == OUT & (1 << 39) - 1
        for beyond in (1 << oas, 1 << 56, 1 << 63):
            assert rig.fault(beyond | 0x1000) == hw.translation_record(0x11, beyond | 0x1000)


# Permissions

ACCESSES = list(product((False, True), (False, True), (False, True)))
"""Privileged, write, instruction."""


def stage_2_rights(s2ap: int, xn: int, privileged: bool, write: bool, fetch: bool) -> bool:
    """DDI 0487, D8.4: S2AP[1:0] for data, XN[1:0] for instructions; what writes is data."""
    if write:
        return bool(s2ap & 2)
    if not fetch:
        return bool(s2ap & 1)
    return {0: True, 1: not privileged, 2: False, 3: privileged}[xn]


@pytest.mark.parametrize("xnx", [True, False])
@pytest.mark.parametrize("level", [2, 3])
def test_permissions_of_every_descriptor(xnx: bool, level: int) -> None:
    rig = Stages(everything_but(stage_2_execute=xnx))
    table = Table(rig, 12, 40)
    rig.stage_2_only(table)
    for s2ap, xn in product(range(4), range(4)):
        address = (s2ap << 2 | xn) << table.shift(level)
        kind = hw.PAGE if level == 3 else hw.BLOCK
        table.map(address, s2ap << 6 | xn << 53 | S2_NORMAL | hw.AF | kind, level=level)
        for privileged, write, fetch in ACCESSES:
            effective = xn if xnx else xn & 2
            allowed = stage_2_rights(s2ap, effective, privileged, write, fetch)
            second = hw.CLASS_IN | (0 if write else RNW) | (PNU if privileged else 0)
            second |= IND if fetch and not write else 0
            for _ in range(2):  # from the tables, and from the TLB
                try:
                    rig.go(address, privileged=privileged, write=write, instruction=fetch)
                    assert allowed
                except TransactionAborted:
                    assert not allowed, (s2ap, xn, privileged, write, fetch)
                    assert rig.events() == [stage_2_record(0x13, address, address, second=second)]


@pytest.mark.parametrize("affd", [0, S2AFFD])
@pytest.mark.parametrize(("level", "kind"), [(1, hw.BLOCK), (2, hw.BLOCK), (3, hw.PAGE)])
def test_af_is_looked_at_before_permissions(level: int, kind: int, affd: int) -> None:
    rig = Stages()
    table = Table(rig, 12, 40)
    rig.stage_2_only(table, S2R | PS_48 | affd)
    table.map(0, S2_READ | S2_NORMAL | kind, level=level)
    if affd:
        assert rig.physical(0x10) == 0x10
        assert rig.fault(0, write=True) == stage_2_record(0x13, 0, 0, second=hw.CLASS_IN)
    else:
        assert rig.fault(0) == stage_2_record(0x12, 0, 0)
        assert rig.fault(0, write=True) == stage_2_record(0x12, 0, 0, second=hw.CLASS_IN)


@pytest.mark.parametrize("address", [0x1000, 0x20_0000, 0x40_0000, 0x60_0000])
def test_without_s2r_faults_are_silent(address: int) -> None:
    rig = Stages()
    table = Table(rig, 12, 40)
    rig.stage_2_only(table, 2 << 48)
    table.map(0x20_0000, 1 << 41 | S2_PLAIN | hw.PAGE)
    table.map(0x40_0000, S2_PLAIN & ~hw.AF | hw.PAGE)
    table.map(0x60_0000, S2_NORMAL | hw.AF | hw.PAGE)
    assert rig.fault(address) is None
    # But not an abort on the way.
    table.map(0x80_0000, 0x7000_0000 | hw.TABLE, level=2)
    assert hw.number(rig.fault(0x80_0000)) == 0x0B


def test_s2ptw_is_for_tables_and_not_for_data() -> None:
    rig = Stages()
    table = Table(rig, 12, 40)
    rig.stage_2_only(table, S2R | PS_48 | 1 << 54)
    table.map(0, 0xA000 | S2_READ | S2_WRITE | hw.AF | hw.PAGE)  # Device
    assert rig.physical(0) == 0xA000


def test_a_range_is_translated_by_adjacent_descriptors() -> None:
    for granule in (12, 14, 16):
        rig = Stages()
        table = Table(rig, granule, 40)
        rig.stage_2_only(table)
        for page in range(8):
            output = OUT + ((page ^ 1) << granule)
            table.map(page << granule, output | S2_PLAIN | hw.PAGE)
        size = 1 << granule
        expected = [(OUT + ((page ^ 1) << granule), size) for page in range(8)]
        assert rig.go(0, 8 << granule) == expected
        assert rig.go(0x800, 2 << granule)[-1] == (OUT + (3 << granule), 0x800)


def test_substreams_are_refused() -> None:
    rig = Stages()
    table = Table(rig, 12, 40)
    table.map(0, S2_PLAIN | hw.PAGE)
    rig.stage_2_only(table)
    assert rig.fault(0, substream=0) == hw.record(0x08 | hw.STREAM << 32)
