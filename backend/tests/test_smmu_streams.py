"""Stream tables and STEs (IHI 0070, 3.3.1, 5.1, 5.2), with literal 64-bit words."""

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.smmu import Features, TransactionAborted

BAD_STREAMID = 0x02


def bypassing(rig: Rig, stream: int) -> bool:
    """The stream reaches an STE that bypasses; otherwise it must be C_BAD_STREAMID."""
    rig.smmu.configuration.invalidate_all()
    try:
        return rig.physical(0x5000, stream=stream) == 0x5000
    except TransactionAborted:
        assert rig.events()[-1] == hw.record(BAD_STREAMID | stream << 32)
        return False


def linear(log2size: int, base: int = hw.STRTAB, features: Features | None = None) -> Rig:
    rig = Rig(features, on=0)
    rig.write64(hw.STRTAB_BASE, base)
    rig.write(hw.STRTAB_BASE_CFG, log2size)
    rig.write(hw.CR0, 0xD)
    return rig


@pytest.mark.parametrize("log2size", [0, 1, 4, 8])
def test_linear_table(log2size: int) -> None:
    rig = linear(log2size)
    last = (1 << log2size) - 1
    rig.put(hw.STRTAB + 64 * last, hw.STE_BYPASS)
    assert bypassing(rig, last)
    rig.put(hw.STRTAB + 64 * (last + 1), hw.STE_BYPASS)
    assert not bypassing(rig, last + 1)


def test_linear_table_is_aligned_to_its_size() -> None:
    rig = linear(8, hw.STRTAB | 0x3FC0)
    rig.put(hw.STRTAB + 64 * 3, hw.STE_BYPASS)
    assert bypassing(rig, 3)


def test_size_is_capped_by_sidsize_but_aligns_as_written() -> None:
    # 2^10 STEs of which the SMMU can name 2^4: still a table of 64 KiB.
    rig = linear(10, hw.STRTAB | 0x1_0000 | 0x8000, Features(stream_id_bits=4))
    rig.put(hw.STRTAB + 0x1_0000 + 64 * 15, hw.STE_BYPASS)
    assert bypassing(rig, 15)
    assert not bypassing(rig, 16)


@pytest.mark.parametrize("fmt", [2, 3])
def test_reserved_formats_are_linear(fmt: int) -> None:
    rig = linear(8 | fmt << 16)
    rig.put(hw.STRTAB + 64 * 5, hw.STE_BYPASS)
    assert bypassing(rig, 5)


def two_level(split: int, log2size: int = 16, base: int = hw.STRTAB) -> Rig:
    rig = Rig(on=0)
    rig.write64(hw.STRTAB_BASE, base)
    rig.write(hw.STRTAB_BASE_CFG, log2size | split << 6 | 1 << 16)
    rig.write(hw.CR0, 0xD)
    return rig


@pytest.mark.parametrize(
    ("written", "split"), [(6, 6), (8, 8), (10, 10), (0, 6), (7, 6), (9, 6), (12, 6), (31, 6)]
)
def test_two_levels(written: int, split: int) -> None:
    rig = two_level(written)
    leaf = rig.alloc(64 << split, 64 << split)
    stream = (5 << split) + 3
    rig.put(hw.STRTAB + 8 * 5, leaf | split + 1)
    rig.put(leaf + 64 * 3, hw.STE_BYPASS)
    rig.put(leaf + 64 * ((1 << split) - 1), hw.STE_BYPASS)
    assert bypassing(rig, stream)
    assert bypassing(rig, (6 << split) - 1)
    assert not bypassing(rig, 6 << split)  # Span 0


@pytest.mark.parametrize("split", [6, 8, 10])
def test_span_limits_the_leaf(split: int) -> None:
    rig = two_level(split)
    leaf = rig.alloc(64 << split, 64 << split)
    for index in range(1 << split):
        rig.put(leaf + 64 * index, hw.STE_BYPASS)
    for span in range(32):
        rig.put(hw.STRTAB, leaf | span)
        usable = 1 << (span - 1) if 1 <= span <= split + 1 else 0
        for index in {0, usable // 2, usable - 1, usable, (1 << split) - 1} - {-1, 1 << split}:
            assert bypassing(rig, index) == (index < usable), (span, index)


def test_leaf_is_aligned_to_its_span() -> None:
    rig = two_level(8)
    leaf = rig.alloc(0x4000, 0x4000)
    rig.put(hw.STRTAB, leaf | 0x3FC0 | 9)
    rig.put(leaf + 64, hw.STE_BYPASS)
    assert bypassing(rig, 1)
    rig.put(hw.STRTAB, leaf | 64 | 1)  # one STE, 64 bytes: the whole pointer counts
    rig.put(leaf + 64, hw.STE_BYPASS)
    assert bypassing(rig, 0)


def test_level_1_table_is_aligned_to_its_size_or_64_bytes() -> None:
    rig = two_level(8, 12, hw.STRTAB | 0x40)  # 16 descriptors, 128 bytes
    leaf = rig.alloc(0x4000, 0x4000)
    rig.put(hw.STRTAB + 8 * 15, leaf | 9)
    rig.put(leaf, hw.STE_BYPASS)
    assert bypassing(rig, 15 << 8)
    assert not bypassing(rig, 1 << 12)
    rig = two_level(8, 8, hw.STRTAB | 0x40)  # one descriptor
    rig.put(hw.STRTAB + 0x40, leaf | 9)
    rig.put(leaf + 64 * 255, hw.STE_BYPASS)
    assert bypassing(rig, 255)


def test_split_not_below_the_size_leaves_one_descriptor() -> None:
    rig = two_level(8, 5)
    leaf = rig.alloc(0x4000, 0x4000)
    rig.put(hw.STRTAB, leaf | 9)
    rig.put(leaf + 64 * 31, hw.STE_BYPASS)
    rig.put(leaf + 64 * 32, hw.STE_BYPASS)
    assert bypassing(rig, 31)
    assert not bypassing(rig, 32)


# F_STE_FETCH: the address of the descriptor or of the STE, bits 51:3 of the fourth word.


def test_ste_out_of_memory_is_f_ste_fetch() -> None:
    rig = linear(8, 0x4000_0000)
    assert rig.fault(0, stream=3) == hw.configuration_record(3, stream=3, fetch=0x4000_00C0)


def test_level_1_descriptor_out_of_memory_is_f_ste_fetch() -> None:
    rig = two_level(8, 16, 0x4000_0000)
    assert rig.fault(0, stream=0x305) == hw.configuration_record(3, stream=0x305, fetch=0x4000_0018)


def test_leaf_out_of_memory_is_f_ste_fetch() -> None:
    rig = two_level(8)
    rig.put(hw.STRTAB, 0xFF_FFFF_C000 | 9)
    assert rig.fault(0, stream=5) == hw.configuration_record(3, stream=5, fetch=0xFF_FFFF_C140)


# STE


@pytest.mark.parametrize("config", range(8))
@pytest.mark.parametrize("valid", [0, 1])
def test_v_and_config(valid: int, config: int) -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE)
    rig.put(hw.STRTAB + 64 * hw.STREAM, valid | config << 1 | rig.cd_address)
    if not valid or config in (6, 7):
        assert rig.fault(0x1000) == hw.configuration_record(0x04)
    elif config < 4:
        assert rig.fault(0x1000) is None
    else:
        assert rig.physical(0x1000) == (0x1000 if config == 4 else 0xA000)


@pytest.mark.parametrize(
    ("second", "legal"),
    [
        (1 << 27, False),  # S1STALLD, STALL_MODEL is 1
        (1 << 30, True),  # STRW is ignored without HYP
        (2 << 30, True),
        (3 << 30, True),
        (3 << 28, True),  # EATS is ignored without ATS
        (1 << 25 | 1 << 26, True),  # S2FWB, S1MPAM
        (0xF << 13 | 0xF << 20, True),  # CONT, SW_RESERVED
        (0xFFFF << 32, True),  # overrides of attributes, none of which is supported
    ],
)
def test_second_word_of_an_ste(second: int, legal: bool) -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE)
    rig.put(hw.STRTAB + 64 * hw.STREAM + 8, second, 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFF0)
    if legal:
        assert rig.physical(0x1000) == 0xA000
    else:
        assert rig.fault(0x1000) == hw.configuration_record(0x04)


def test_fields_of_an_absent_stage_are_ignored() -> None:
    rig = Rig()
    for config, outcome in ((hw.STE_BYPASS, 0x1000), (hw.STE_ABORT, None)):
        # S1CDMax, S1Fmt, S1STALLD: no stage 1, no matter.
        rig.put(hw.STRTAB + 64 * hw.STREAM, config | 31 << 59 | 3 << 4, 1 << 27)
        rig.submit((0x04, 31))
        if outcome is None:
            assert rig.fault(0x1000) is None
        else:
            assert rig.physical(0x1000) == outcome


@pytest.mark.parametrize(("bits", "most"), [(20, 20), (5, 5), (1, 1)])
def test_s1cdmax_above_ssidsize_is_illegal(bits: int, most: int) -> None:
    rig = Rig(Features(substream_id_bits=bits))
    for cd_max in (most, most + 1, 31):
        rig.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_S1 | rig.cd_address | cd_max << 59, 1)
        rig.submit((0x04, 31))
        if cd_max > most:
            assert rig.fault(0x1000) == hw.configuration_record(0x04)
        else:
            assert rig.physical(0x1000) == 0x1000


def test_s1cdmax_is_ignored_without_substreams() -> None:
    rig = Rig(Features(substream_id_bits=0))
    rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE)
    rig.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_S1 | rig.cd_address | 31 << 59 | 1 << 4)
    assert rig.physical(0x1000) == 0xA000
    assert hw.number(rig.fault(0x1000, substream=0)) == 0x08


def test_bypass_above_the_output_size_is_an_address_size_fault() -> None:
    rig = Rig(Features(output_address_bits=40))
    rig.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_BYPASS)
    assert rig.go((1 << 40) - 16, 32) == [((1 << 40) - 16, 16)]
    assert rig.fault(1 << 40, write=True) == hw.translation_record(
        0x11, 1 << 40, second=hw.CLASS_IN
    )
    assert rig.fault(hw.word(-1), privileged=True, instruction=True) == hw.translation_record(
        0x11, hw.word(-1), second=hw.RNW | hw.IND | hw.PNU | hw.CLASS_IN
    )
