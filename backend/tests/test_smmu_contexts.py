"""CD tables, substreams and CDs (IHI 0070, 3.3.2, 5.2 S1Fmt and S1DSS, 5.3, 5.4), with literal 64-bit words."""

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.smmu import Features

LINEAR, LEAF_4K, LEAF_64K, RESERVED = 0 << 4, 1 << 4, 2 << 4, 3 << 4
TERMINATE, BYPASS_STAGE_1, SUBSTREAM_0 = 0, 1, 2
STE = hw.STRTAB + 64 * hw.STREAM


def cd(rig: Rig, address: int, page: int, asid: int = hw.ASID) -> None:
    """A CD at `address` which maps 0x1000 to `page`."""
    table = rig.low
    rig.low = rig.alloc(4096)
    rig.map(0x1000, page | hw.PLAIN | hw.PAGE)
    rig.put(address, hw.CD_PLAIN & ~(0xFFFF << 48) | asid << 48, rig.low, rig.high)
    rig.low = table


def use(rig: Rig, pointer: int, cd_max: int, fmt: int, dss: int = SUBSTREAM_0) -> None:
    rig.put(STE, hw.STE_S1 | fmt | pointer | cd_max << 59, dss)
    rig.forget()


def bad_substream(substream: int) -> bytes:
    # No SSV in this record: its SubstreamID is always valid (7.3.9).
    return hw.record(0x08 | substream << 12 | hw.STREAM << 32)


# CD tables


@pytest.mark.parametrize("fmt", [LINEAR, RESERVED])
def test_linear_table(fmt: int) -> None:
    rig = Rig()
    table = rig.alloc(64 * 8)
    for index in range(8):
        cd(rig, table + 64 * index, 0x10_0000 + index * 0x1000, index + 1)
    use(rig, table | 0x1C0, 3, fmt, TERMINATE)  # aligned to its 512 bytes
    assert [rig.physical(0x1000, substream=i) for i in range(8)] == [
        0x10_0000 + i * 0x1000 for i in range(8)
    ]
    assert rig.fault(0x1000, substream=8) == bad_substream(8)
    assert rig.fault(0x1000, substream=0xF_FFFF) == bad_substream(0xF_FFFF)


@pytest.mark.parametrize(("fmt", "split"), [(LEAF_4K, 6), (LEAF_64K, 10)])
def test_two_level_table(fmt: int, split: int) -> None:
    rig = Rig()
    top = rig.alloc(4096)
    leaf = rig.alloc(64 << split, 64 << split)
    # The pointer's bits below the leaf's size are ignored.
    rig.put(top + 8 * 2, leaf | (0xF000 if fmt == LEAF_64K else 0) | 0xFFE | 1)
    cd(rig, leaf + 64 * 5, 0xA000, 1)
    cd(rig, leaf + 64 * ((1 << split) - 1), 0xB000, 2)
    use(rig, top, split + 2, fmt)
    assert rig.physical(0x1000, substream=(2 << split) + 5) == 0xA000
    assert rig.physical(0x1000, substream=(3 << split) - 1) == 0xB000
    for missing in (5, (1 << split) + 5, (3 << split) + 5):
        assert rig.fault(0x1000, substream=missing) == bad_substream(missing)
    assert rig.fault(0x1000, substream=4 << split) == bad_substream(4 << split)


@pytest.mark.parametrize(("fmt", "split"), [(LEAF_4K, 6), (LEAF_64K, 10)])
def test_two_level_table_no_larger_than_one_leaf(fmt: int, split: int) -> None:
    rig = Rig()
    top = rig.alloc(64, 64)
    leaf = rig.alloc(64 << split, 64 << split)
    rig.put(top, leaf | 1)
    cd(rig, leaf + 64 * 3, 0xA000)
    use(rig, top, 2, fmt)
    assert rig.physical(0x1000, substream=3) == 0xA000


def test_level_1_cd_table_is_aligned_to_its_size() -> None:
    rig = Rig()
    top = rig.alloc(128, 4096)  # 2^10 CDs in leaves of 64: 16 descriptors
    leaf = rig.alloc(4096)
    rig.put(top + 8 * 9, leaf | 1)
    cd(rig, leaf, 0xA000)
    use(rig, top | 0x40, 10, LEAF_4K)
    assert rig.physical(0x1000, substream=9 << 6) == 0xA000


def test_unreachable_tables_are_f_cd_fetch() -> None:
    rig = Rig()
    use(rig, 0x4000_0000, 0, LINEAR)
    assert rig.fault(0) == hw.configuration_record(0x09, fetch=0x4000_0000)
    use(rig, 0x4000_0000, 8, LINEAR)
    assert rig.fault(0, substream=3) == hw.record(
        0x09 | 1 << 11 | 3 << 12 | hw.STREAM << 32, 0, 0, 0x4000_00C0
    )
    use(rig, 0x4000_0000, 8, LEAF_4K)
    assert rig.fault(0, substream=0x43) == hw.record(
        0x09 | 1 << 11 | 0x43 << 12 | hw.STREAM << 32, 0, 0, 0x4000_0008
    )
    top = rig.alloc(64, 64)
    rig.put(top, 0x4_0000_0000 | 1)
    use(rig, top, 6, LEAF_4K)
    assert rig.fault(0, substream=1) == hw.record(
        0x09 | 1 << 11 | 1 << 12 | hw.STREAM << 32, 0, 0, 0x4_0000_0040
    )


# Substreams and S1DSS


@pytest.fixture
def substreams() -> Rig:
    """Four CDs: 0x1000 goes to 0xA000 in that of SubstreamID 0, and to 0xB000 in that of 1."""
    rig = Rig()
    rig.cd_address = rig.alloc(256, 256)
    cd(rig, rig.cd_address, 0xA000, 1)
    cd(rig, rig.cd_address + 64, 0xB000, 2)
    return rig


@pytest.mark.parametrize(
    ("dss", "none", "zero", "one"),
    [
        (TERMINATE, 0x06, 0xA000, 0xB000),
        (BYPASS_STAGE_1, 0x1000, 0xA000, 0xB000),
        (SUBSTREAM_0, 0xA000, 0x06, 0xB000),
        (3, 0x06, 0xA000, 0xB000),
    ],
)
def test_s1dss(substreams: Rig, dss: int, none: int, zero: int, one: int) -> None:
    use(substreams, substreams.cd_address, 2, LINEAR, dss)
    for substream, outcome in ((None, none), (0, zero), (1, one)):
        access = {} if substream is None else {"substream": substream}
        if outcome == 0x06:
            assert hw.number(substreams.fault(0x1000, **access)) == 0x06
        else:
            assert substreams.physical(0x1000, **access) == outcome


def test_f_stream_disabled_record(substreams: Rig) -> None:
    use(substreams, substreams.cd_address, 2, LINEAR, TERMINATE)
    assert substreams.fault(0x1000) == hw.configuration_record(0x06)


def test_stage_1_bypass_by_s1dss_checks_the_address_size() -> None:
    rig = Rig(Features(output_address_bits=40))
    rig.put(STE, hw.STE_S1 | rig.cd_address | 2 << 59, BYPASS_STAGE_1)
    rig.put(rig.cd_address, 0)  # not looked at
    assert rig.physical((1 << 40) - 1) == (1 << 40) - 1
    assert rig.fault(1 << 40) == hw.translation_record(0x11, 1 << 40)


@pytest.mark.parametrize("substream", [0, 1, 5])
def test_substreams_need_a_table_of_cds(substreams: Rig, substream: int) -> None:
    use(substreams, substreams.cd_address, 0, LINEAR)
    assert substreams.physical(0x1000) == 0xA000
    assert substreams.fault(0x1000, substream=substream) == bad_substream(substream)


def test_substreams_need_stage_1(substreams: Rig) -> None:
    substreams.put(STE, hw.STE_BYPASS | 2 << 59)
    substreams.forget()
    assert substreams.fault(0x1000, substream=0) == bad_substream(0)


def test_an_abort_is_silent_with_substreams_too(substreams: Rig) -> None:
    substreams.put(STE, hw.STE_ABORT)
    substreams.forget()
    assert substreams.fault(0x1000, substream=9) is None


# CDs

BAD_CD = hw.configuration_record(0x0A)
LOW_ONLY = hw.CD_PLAIN | hw.EPD1


@pytest.mark.parametrize(
    "wrong",
    {
        "V": hw.CD_PLAIN & ~hw.CD_V,
        "AA64": hw.CD_PLAIN & ~hw.AA64,
        "A": hw.CD_PLAIN & ~hw.ABORT,
        "S": hw.CD_PLAIN | hw.STALL,
        "HA": hw.CD_PLAIN | hw.HA,
        "HD": hw.CD_PLAIN | hw.HD,
        "ENDI": hw.CD_PLAIN | hw.ENDI,
        "ENDI, one half": LOW_ONLY | hw.ENDI,
        "TG0 64K": hw.CD_PLAIN | 1 << 6,
        "TG0 16K": hw.CD_PLAIN | 2 << 6,
        "TG0 reserved": hw.CD_PLAIN | 3 << 6,
        "TG1 reserved": hw.CD_PLAIN & ~(3 << 22),
        "TG1 16K": hw.CD_PLAIN & ~(3 << 22) | 1 << 22,
        "TG1 64K": hw.CD_PLAIN | 3 << 22,
    }.items(),
    ids=lambda item: item[0],
)
def test_illegal_cds(wrong: tuple[str, int]) -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE)
    rig.context(wrong[1])
    assert rig.fault(0x1000) == BAD_CD


@pytest.mark.parametrize("shift", [0, 16])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 25, 39, 40, 48, 63])
def test_txsz_from_16_to_39(shift: int, size: int) -> None:
    rig = Rig(cd=hw.CD_PLAIN & ~(0x3F << shift) | size << shift)
    expected = 0x10 if 16 <= size <= 39 else 0x0A
    assert hw.number(rig.fault(0x1000)) == expected


def test_a_disabled_half_is_not_checked() -> None:
    rig = Rig(cd=hw.CD_PLAIN & ~(0xFF << 16) | hw.EPD1 | 3 << 16 | 1 << 22)
    rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE)
    rig.put(rig.cd_address + 16, hw.word(-1))
    assert rig.physical(0x1000) == 0xA000
    both = hw.CD_PLAIN | hw.EPD0 | hw.EPD1 | hw.ENDI | 3 << 6 | 63
    rig.context(both)
    assert rig.fault(0x1000) == hw.translation_record(0x10, 0x1000)


@pytest.mark.parametrize("half", [8, 16])
@pytest.mark.parametrize(("ips", "bits"), [(0, 32), (1, 36), (2, 40), (3, 42), (4, 44)])
def test_table_base_above_ips(half: int, ips: int, bits: int) -> None:
    rig = Rig(cd=hw.CD_PLAIN & ~(7 << 32) | ips << 32)
    rig.put(rig.cd_address + half, 1 << bits)
    assert rig.fault(0x1000) == BAD_CD


def test_table_base_above_the_output_size() -> None:
    rig = Rig(Features(output_address_bits=40))
    rig.put(rig.cd_address + 8, 1 << 40)
    assert rig.fault(0x1000) == BAD_CD


@pytest.mark.parametrize("ips", [5, 6, 7])
def test_large_and_reserved_ips_behave_as_the_output_size(ips: int) -> None:
    rig = Rig(Features(output_address_bits=44), cd=hw.CD_PLAIN & ~(7 << 32) | ips << 32)
    rig.map(0x1000, (1 << 44) - 0x1000 | hw.PLAIN | hw.PAGE)
    assert rig.physical(0x1000) == (1 << 44) - 0x1000
    rig.map(0x2000, 1 << 44 | hw.PLAIN | hw.PAGE)
    assert rig.fault(0x2000) == hw.translation_record(0x11, 0x2000)


def test_invalid_contexts_are_recorded_with_their_substream() -> None:
    rig = Rig()
    rig.cd_address = rig.alloc(256, 256)
    use(rig, rig.cd_address, 2, LINEAR)
    assert rig.fault(0, substream=2) == hw.record(0x0A | 1 << 11 | 2 << 12 | hw.STREAM << 32)


@pytest.mark.parametrize("event", [0x10, 0x11, 0x12, 0x13])
def test_r_is_0_faults_of_translation_are_silent(event: int) -> None:
    rig = Rig(cd=hw.CD_PLAIN & ~hw.RECORD)
    rig.map(0x1000, 1 << 63)
    rig.map(0x1_0000_1000, (0xA000 | hw.PLAIN | hw.PAGE) & ~hw.AF)
    rig.map(0x2_0000_1000, 0xA000 | hw.PLAIN | hw.PAGE | hw.READ_ONLY)
    rig.put(rig.cd_address, hw.CD_PLAIN & ~hw.RECORD & ~(7 << 32))
    rig.map(0x3_0000_1000, 1 << 40 | hw.PLAIN | hw.PAGE)
    address = {0x10: 0x1000, 0x12: 0x1_0000_1000, 0x13: 0x2_0000_1000, 0x11: 0x3_0000_1000}[event]
    assert rig.fault(address, write=True) is None
    rig.context(hw.CD_PLAIN & ~(7 << 32))
    assert hw.number(rig.fault(address, write=True)) == event


def test_r_is_0_errors_of_the_walk_are_recorded() -> None:
    rig = Rig(cd=hw.CD_PLAIN & ~hw.RECORD)
    rig.map(0x1000, 0x4000_0000 | hw.TABLE, level=1)
    assert hw.number(rig.fault(0x1000)) == 0x0B
    rig.context(hw.CD_PLAIN & ~hw.RECORD & ~hw.ABORT)
    assert hw.number(rig.fault(0x1000)) == 0x0A
