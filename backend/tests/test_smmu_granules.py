"""Stage 1 with 16 and 64 KiB granules and with 52-bit addresses (DDI 0487, D8.2, D8.3; IHI 0070, 5.4)."""

from itertools import product

import pytest

from tests import smmu_rig as hw
from tests.stages_rig import TG0, TG1, Stages, Table, everything_but, high_word

OUT = 0x5A_8000_0000
LEAF = hw.PLAIN | hw.PAGE
BAD_CD = hw.configuration_record(0x0A)
GRANULES = (12, 14, 16)
BLOCKS = {(12, 1): 30, (12, 2): 21, (14, 2): 25, (16, 2): 29, (16, 1): 42}


@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("bits", range(25, 53))
def test_walks_of_every_size_in_both_halves(granule: int, bits: int) -> None:
    rig = Stages(everything_but(output_address_bits=52))
    if bits > 48 and granule != 16:
        table = Table(rig, 16, bits)
        table.granule = granule
        rig.stage_1_only(table)
        assert rig.fault(0) == BAD_CD
        return
    low, high = Table(rig, granule, bits), Table(rig, granule, bits)
    cd = rig.cd_word(low) & ~hw.EPD1 & ~(0x3F << 16) & ~(3 << 22)
    cd |= 64 - bits << 16 | TG1[granule]
    rig.put(rig.cd_address, cd, low.pointer, high.pointer)
    rig.ste(hw.STE_S1 | rig.cd_address)
    top = hw.word(-1 << bits)
    last = (1 << bits) - (1 << granule)
    for index, address in enumerate((0, 1 << bits - 1, last)):
        for half, table in ((0, low), (top, high)):
            output = OUT + (index * 2 + bool(half) << granule)
            table.map(address, output | LEAF)
            assert rig.physical((half | address) + 0x321) == output + 0x321
    middle = 1 << granule
    for half in (0, top):
        assert rig.fault(half | middle) == hw.translation_record(0x10, half | middle)
    # Just outside of both.
    for address in (1 << bits, hw.word((-1 << bits) - 1)):
        assert rig.fault(address) == hw.translation_record(0x10, address)


@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("oas", [48, 52])
def test_every_t0sz(granule: int, oas: int) -> None:
    rig = Stages(everything_but(output_address_bits=oas))
    least = 12 if granule == 16 and oas == 52 else 16
    for t0sz in range(64):
        cd = hw.CD_PLAIN & ~0x3F & ~(3 << 6) | TG0[granule] | hw.EPD1 | t0sz
        rig.put(rig.cd_address, cd, hw.FREE)
        rig.ste(hw.STE_S1 | rig.cd_address)
        legal = least <= t0sz <= 39
        assert hw.number(rig.fault(0)) != 0x0A if legal else rig.fault(0) == BAD_CD, t0sz


@pytest.mark.parametrize(("granule", "level"), [*BLOCKS, (12, 0), (14, 1), (14, 0), (16, 3)])
@pytest.mark.parametrize("oas", [48, 52])
def test_blocks(granule: int, level: int, oas: int) -> None:
    rig = Stages(everything_but(output_address_bits=oas))
    table = Table(rig, granule, 48)
    rig.stage_1_only(table)
    shift = table.shift(level)
    place = table.map(0, (1 << shift) % (1 << 48) | hw.PLAIN | hw.BLOCK, level=level)
    exists = (granule, level) in BLOCKS and (shift != 42 or oas == 52)
    if exists:
        assert rig.physical((1 << shift) - 1) == (2 << shift) - 1
        assert rig.go((1 << shift) - 0x1000, 0x1000) == [((2 << shift) - 0x1000, 0x1000)]
        # The bits of the output below the size of the block are not looked at.
        rig.put(place, 1 << shift | 1 << shift - 1 | hw.PLAIN | hw.BLOCK)
        rig.forget()
        assert rig.physical(0) == 1 << shift
    else:
        assert rig.fault(0) == hw.translation_record(0x10, 0)


@pytest.mark.parametrize("granule", GRANULES)
def test_low_bits_of_a_page_are_not_part_of_its_address(granule: int) -> None:
    rig = Stages()
    table = Table(rig, granule, 48)
    rig.stage_1_only(table)
    junk = (1 << granule) - (1 << 12)
    table.map(0, OUT | junk | LEAF)
    assert rig.physical(0x10) == OUT + 0x10
    # And of a table's: with 48 bits those of a 64 KiB granule mean nothing either.
    table.map(1 << 33, OUT | LEAF, tables=junk)
    assert rig.physical(1 << 33) == OUT


@pytest.mark.parametrize("bits", range(25, 30))
def test_a_small_table_of_level_3_ends_where_it_ends(bits: int) -> None:
    """With 64 KiB granules one of 25 bits has 512 descriptors: what follows it in memory is not its."""
    for caching in ("normal", "hostile"):
        rig = Stages(everything_but(caching=caching), ram=32 << 20)
        table = Table(rig, 16, bits)
        entries = 1 << bits - 16
        assert table.start == 3
        for index in range(entries * 2):
            rig.put(table.base + 8 * index, OUT + (index << 16) | LEAF)
        rig.alloc(entries * 8)
        rig.stage_1_only(table)
        end = 1 << bits
        assert rig.go(end - 0x2_0000, 0x8_0000) == [(OUT + end - 0x2_0000, 0x2_0000)]
        assert rig.fault(end) == hw.translation_record(0x10, end)
        assert rig.go(0x1_0000, 0x3_0000) == [(OUT + 0x1_0000, 0x3_0000)]
        assert len(rig.smmu.tlb) == (entries if caching == "hostile" else 5)


@pytest.mark.parametrize("granule", GRANULES)
def test_ranges_of_scattered_pages(granule: int) -> None:
    rig = Stages()
    table = Table(rig, granule, 48)
    rig.stage_1_only(table)
    size = 1 << granule
    outputs = [OUT + (page * 7 % 16 << granule) for page in range(16)]
    for page, output in enumerate(outputs):
        table.map(page << granule, output | LEAF)
    for _ in range(2):
        assert rig.go(0, 16 << granule) == [(output, size) for output in outputs]
        assert rig.go(size - 8, 16) == [(outputs[0] + size - 8, 8), (outputs[1], 8)]


# 52 bits


IPS_52 = 6


def test_outputs_of_52_bits() -> None:
    rig = Stages(everything_but(output_address_bits=52))
    table = Table(rig, 16, 52)
    rig.stage_1_only(table, ips=IPS_52)
    outputs = [nibble << 48 | 0x1234_5678_0000 + (nibble << 16) for nibble in range(16)]
    for page, output in enumerate(outputs):
        table.map(page << 16, high_word(output) | LEAF)
        assert rig.physical(page << 16 | 0x8642) == output + 0x8642
    rig.forget()
    assert rig.go(0, 16 << 16) == [(output, 1 << 16) for output in outputs]
    # Blocks of 4 TiB and of 512 MiB.
    table.map(8 << 48, high_word(0xC_0400_0000_0000) | hw.PLAIN | hw.BLOCK, level=1)
    assert rig.physical((8 << 48) + 0x3FF_FFFF_FFFF) == 0xC_07FF_FFFF_FFFF
    table.map(9 << 48, high_word(0xD_0000_2000_0000) | hw.PLAIN | hw.BLOCK, level=2)
    assert rig.physical((9 << 48) + 0x1FFF_FFFF) == 0xD_0000_3FFF_FFFF


@pytest.mark.parametrize("ips", range(8))
def test_ips_bounds_them_as_any_other(ips: int) -> None:
    rig = Stages(everything_but(output_address_bits=52))
    table = Table(rig, 16, 48)
    rig.stage_1_only(table, ips=ips)
    bits = (32, 36, 40, 42, 44, 48, 52, 52)[ips]
    table.map(0, high_word(1 << bits - 1) | LEAF)
    assert rig.physical(0) == 1 << bits - 1
    if bits < 52:
        table.map(1 << 16, high_word(1 << bits) | LEAF)
        assert rig.fault(1 << 16) == hw.translation_record(0x11, 1 << 16)
        table.map(1 << 29, high_word(1 << 51) | hw.TABLE, level=2)
        assert rig.fault(1 << 29) == hw.translation_record(0x11, 1 << 29)


@pytest.mark.parametrize(("granule", "oas"), [(16, 48), (12, 52), (14, 52)])
def test_where_there_are_no_52_bits_the_bits_mean_nothing(granule: int, oas: int) -> None:
    rig = Stages(everything_but(output_address_bits=oas))
    table = Table(rig, granule, 48)
    rig.stage_1_only(table, ips=IPS_52)
    ignored = 0xF << 12 if granule == 16 else 0xF << 48 & ~(1 << 51)
    table.map(0, OUT | LEAF | ignored)
    assert rig.physical(0) == OUT


def test_a_table_above_48_bits_is_walked() -> None:
    rig = Stages(everything_but(output_address_bits=52))
    far = 0xA_0000_0000_0000
    ram = bytearray(1 << 17)
    rig.memory.add_region(far, len(ram), memoryview(ram))
    first = Table(rig, 16, 42)
    rig.put(first.base, high_word(far) | hw.TABLE)
    ram[0x10_000 - 8 : 0x10_000] = (OUT | LEAF).to_bytes(8, "little")
    rig.stage_1_only(first, ips=IPS_52)
    assert rig.physical(8191 << 16) == OUT
    # And TTB0 itself.
    rig.put(rig.cd_address, rig.cd_word(first) & ~(7 << 32) | IPS_52 << 32, far | 0x1_0000)
    ram[0x1_0000:0x1_0008] = (1 << 29 | hw.PLAIN | hw.BLOCK).to_bytes(8, "little")
    rig.ste(hw.STE_S1 | rig.cd_address)
    assert rig.physical(0x10) == 1 << 29 | 0x10


@pytest.mark.parametrize(("ips", "aligned"), [(5, 16), (IPS_52, 64)])
def test_a_first_table_is_aligned_to_64_bytes_with_52_bits(ips: int, aligned: int) -> None:
    """Two descriptors of level 1, 16 bytes: bits of TTB0 below the alignment are not looked at."""
    rig = Stages(everything_but(output_address_bits=52))
    base = rig.alloc(256, 256)
    for offset in range(0, 256, 8):
        rig.put(base + offset, (offset + 8) << 42 & 0xFFFF_FFFF_FFFF | hw.PLAIN | hw.BLOCK)
    cd = hw.CD_PLAIN & ~0x3F & ~(7 << 32) | 21 | TG0[16] | ips << 32 | hw.EPD1
    rig.put(rig.cd_address, cd, base + 48)
    rig.ste(hw.STE_S1 | rig.cd_address)
    offset = 48 & -aligned
    assert rig.physical(1 << 42) == (offset + 16) << 42 & 0xFFFF_FFFF_FFFF


@pytest.mark.parametrize(("granule", "half"), list(product(GRANULES, (0, 1))))
def test_ttb_lies_within_ips_and_48_bits_for_small_granules(granule: int, half: int) -> None:
    rig = Stages(everything_but(output_address_bits=52))
    for ips, bits in ((1, 36), (2, 40), (5, 48), (IPS_52, 52)):
        effective = bits if granule == 16 else min(bits, 48)
        for pointer in (1 << effective - 1, 1 << effective if effective < 52 else None):
            if pointer is None:
                continue
            cd = hw.CD_PLAIN & ~(7 << 32) & ~(3 << 6) & ~(3 << 22) | ips << 32
            cd |= TG0[granule] | TG1[granule] | (hw.EPD0 if half else hw.EPD1)
            pointers = (0, pointer) if half else (pointer, 0)
            rig.put(rig.cd_address, cd, *pointers)
            rig.ste(hw.STE_S1 | rig.cd_address)
            address = hw.word(-1) if half else 0
            expected = 0x0A if pointer >> effective else 0x0B
            assert hw.number(rig.fault(address)) == expected, (ips, hex(pointer))
