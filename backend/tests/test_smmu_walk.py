"""The walk of the 4 KiB granule: ranges, levels, blocks, sizes, order of faults (DDI 0487 D8.2, IHI 0070 7.3.22)."""

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.smmu import Features

TOP = 1 << 64
LEAF = hw.PLAIN | hw.PAGE


def sized(t0sz: int, t1sz: int = 16, more: int = 0) -> int:
    return hw.CD_PLAIN & ~(0x3F | 0x3F << 16) | t0sz | t1sz << 16 | more


def lone_table(rig: Rig, level: int, index: int, leaf: int) -> int:
    """A table of `level` with `leaf` at the end of the way below its entry `index`. Returns its address."""
    first = table = rig.alloc(0x1000)
    for _ in range(level, 3):
        below = rig.alloc(0x1000)
        rig.put(table + 8 * index, below | hw.TABLE)
        table, index = below, 0
    rig.put(table + 8 * index, leaf)
    return first


@pytest.mark.parametrize("tsz", range(16, 40))
@pytest.mark.parametrize("high", [False, True])
def test_every_size_and_start_level(tsz: int, high: bool) -> None:
    bits = 64 - tsz
    level = {4: 0, 3: 1, 2: 2}[-(-(bits - 12) // 9)]
    shift = 39 - 9 * level
    last = (1 << bits - shift) - 1  # the last entry of the first table
    rig = Rig()
    # Of the low half the last entry of the first table, of the high half too: its offset is the same.
    table = lone_table(rig, level, last, 0xA000 | LEAF)
    address = last << shift
    if high:
        address |= TOP - (1 << bits)
    rig.context(sized(16, tsz) if high else sized(tsz), None if high else table, table)
    assert rig.physical(address | 0x123) == 0xA123
    # One bit beyond the range.
    outside = TOP - (1 << bits) - 1 if high else 1 << bits
    assert rig.fault(outside) == hw.translation_record(0x10, outside)


@pytest.mark.parametrize("tsz", [16, 20, 24, 25, 28, 33, 34, 39])
def test_first_table_is_aligned_to_its_size(tsz: int) -> None:
    bits = 64 - tsz
    level = {4: 0, 3: 1, 2: 2}[-(-(bits - 12) // 9)]
    entries = 1 << bits - (39 - 9 * level)
    rig = Rig()
    table = lone_table(rig, level, 0, 0xA000 | LEAF)
    # Of a table of two entries 16 bytes are the size, and the least that TTB can say.
    rig.context(sized(tsz), table | max(16, entries * 8) - 16)
    assert rig.physical(0x10) == 0xA010


def test_a_table_of_two_entries_may_lie_on_16_bytes() -> None:
    rig = Rig()
    table = lone_table(rig, 0, 6 + 1, 0xA000 | LEAF)  # entry 1 of the table at 0x30 of the page
    rig.context(sized(24), table + 0x30)
    assert rig.physical(1 << 39) == 0xA000


def test_halves_are_chosen_by_bit_55() -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | LEAF)
    rig.map(TOP - (1 << 48) + 0x1000, 0xB000 | LEAF)
    assert rig.physical(0x1000) == 0xA000
    assert rig.physical(TOP - (1 << 48) + 0x1000) == 0xB000
    for address in (1 << 48, 1 << 54, 1 << 55, 1 << 63, TOP - (1 << 48) - 1, TOP - (1 << 56)):
        assert rig.fault(address) == hw.translation_record(0x10, address)


@pytest.mark.parametrize("tag", [0, 0x5A, 0xFF])
def test_tbi_ignores_the_top_byte_of_each_half(tag: int) -> None:
    low, high = 0x1000 | tag << 56, ((1 << 56) - (1 << 48) + 0x1000) | tag << 56
    for tbi in (0, hw.TBI0, hw.TBI1, hw.TBI0 | hw.TBI1):
        rig = Rig(cd=hw.CD_PLAIN | tbi)
        rig.map(0x1000, 0xA000 | LEAF)
        rig.map(TOP - (1 << 48) + 0x1000, 0xB000 | LEAF)
        for address, enabled, plain, page in (
            (low, hw.TBI0, tag == 0, 0xA000),
            (high, hw.TBI1, tag == 0xFF, 0xB000),
        ):
            if tbi & enabled or plain:
                assert rig.physical(address) == page
            else:
                # The address is recorded as it came.
                assert rig.fault(address) == hw.translation_record(0x10, address)


def test_tbi_still_checks_the_bits_below() -> None:
    rig = Rig(cd=sized(25, 25, hw.TBI0 | hw.TBI1))
    for address in (1 << 39, 1 << 54, TOP - (1 << 40), 0xAA << 56 | 1 << 40):
        assert hw.number(rig.fault(address)) == 0x10


def test_tagged_addresses_share_a_translation() -> None:
    rig = Rig(cd=hw.CD_PLAIN | hw.TBI0)
    rig.map(0x1000, 0xA000 | LEAF)
    assert rig.physical(0x12 << 56 | 0x1000) == 0xA000
    rig.map(0x1000, 0)
    assert rig.physical(0x1000) == 0xA000
    rig.submit((0x12 | hw.ASID << 48, 0x1000), (0x46, 0))
    assert hw.number(rig.fault(0x12 << 56 | 0x1000)) == 0x10


@pytest.mark.parametrize(("epd", "low"), [(hw.EPD0, False), (hw.EPD1, True)])
def test_epd_disables_a_half(epd: int, low: bool) -> None:
    rig = Rig(cd=hw.CD_PLAIN | epd)
    rig.map(0x1000, 0xA000 | LEAF)
    rig.map(TOP - (1 << 48) + 0x1000, 0xB000 | LEAF)
    ways = {True: (0x1000, 0xA000), False: (TOP - (1 << 48) + 0x1000, 0xB000)}
    assert rig.physical(ways[low][0]) == ways[low][1]
    assert rig.fault(ways[not low][0]) == hw.translation_record(0x10, ways[not low][0])


# Blocks and pages


@pytest.mark.parametrize(("level", "shift"), [(1, 30), (2, 21), (3, 12)])
def test_output_of_each_level(level: int, shift: int) -> None:
    rig = Rig()
    address, page = 0x55 << 39 | 3 << 30 | 5 << 21 | 7 << 12, 9 << 30 | 1 << 21 | 3 << 12
    kind = hw.PAGE if level == 3 else hw.BLOCK
    # Below the block the bits of the address in the descriptor are not part of it.
    rig.map(address, page | hw.PLAIN | kind, level=level)
    inside = address & (1 << shift) - 1 | 0xABC
    base = page >> shift << shift
    assert rig.physical(address | 0xABC) == base | inside
    end = (address >> shift) + 1 << shift
    assert rig.go(end - 0x10, 0x20) == [(base + (1 << shift) - 0x10, 0x10)]


@pytest.mark.parametrize(
    ("level", "descriptor"),
    [(0, 0xA000 | hw.PLAIN | hw.BLOCK), (3, 0xA000 | hw.PLAIN | hw.BLOCK)]
    + [(level, hw.word(-2)) for level in range(4)]
    + [(level, 0) for level in range(4)],
)
def test_invalid_descriptors(level: int, descriptor: int) -> None:
    rig = Rig()
    rig.map(0x1000, descriptor, level=level)
    assert rig.fault(0x1000) == hw.translation_record(0x10, 0x1000)


def test_ranges_of_pages_blocks_and_holes() -> None:
    rig = Rig()
    for index, page in enumerate((0xA000, 0xB000, 0xF000)):
        rig.map(0x1F_D000 + index * 0x1000, page | LEAF)
    rig.map(0x20_0000, 0x4000_0000 | hw.PLAIN | hw.BLOCK, level=2)
    assert rig.go(0x1F_D800, 0x4000) == [
        (0xA800, 0x1800),
        (0xF000, 0x1000),
        (0x4000_0000, 0x1800),
    ]
    # A range ends before the first fault, which is told to whoever asks for it.
    assert rig.go(0x20_0000, 1 << 21) == [(0x4000_0000, 1 << 21)]
    assert rig.go(0x3F_FFF0, 0x1000) == [(0x401F_FFF0, 0x10)]
    assert rig.events() == []
    assert rig.fault(0x40_0000) == hw.translation_record(0x10, 0x40_0000)


def test_at_most_2_mib_at_a_time() -> None:
    rig = Rig()
    rig.map(0, hw.PLAIN | hw.BLOCK, level=1)
    assert rig.go(0x1000, 1 << 30) == [(0x1000, 1 << 21)]


def test_a_range_may_end_at_the_end_of_the_address_space() -> None:
    rig = Rig()
    rig.map(TOP - 0x1000, 0xA000 | LEAF)
    assert rig.go(TOP - 0x10, 0x1000) == [(0xAFF0, 0x10)]


def test_a_table_across_two_regions_is_walked_page_by_page() -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | LEAF)
    entry = rig.map(0x2000, 0xB000 | LEAF)
    rig.memory.clear()
    split = (entry & ~0xFFF) + 64 - hw.BASE
    view = memoryview(rig.ram)
    rig.memory.add_region(hw.BASE, split, view[:split])
    rig.memory.add_region(hw.BASE + split, hw.RAM - split, view[split:])
    assert rig.go(0x1000, 0x2000) == [(0xA000, 0x2000)]


# Sizes of addresses


@pytest.mark.parametrize(("ips", "bits"), [(0, 32), (1, 36), (2, 40), (3, 42), (4, 44), (5, 48)])
@pytest.mark.parametrize("level", range(4))
def test_ips_limits_every_descriptor(ips: int, bits: int, level: int) -> None:
    rig = Rig(cd=hw.CD_PLAIN & ~(7 << 32) | ips << 32)
    kind = hw.TABLE if level in (0, 3) else hw.BLOCK
    rig.map(0x1000, (1 << bits - 1) | hw.PLAIN | kind, level=level)
    if level == 0:
        if bits == 32:  # that is in memory
            assert hw.number(rig.fault(0x1000)) == 0x10
        else:
            assert hw.number(rig.fault(0x1000)) == 0x0B
    else:
        assert rig.physical(0x1000) >> bits - 1 == 1
    if bits < 48:
        rig.map(0x1000, 1 << bits | hw.PLAIN | kind, level=level)
        rig.forget()
        # CLASS is IN, whichever descriptor it was (7.3.14).
        assert rig.fault(0x1000) == hw.translation_record(0x11, 0x1000)


def test_bits_51_to_48_of_a_descriptor_are_no_address() -> None:
    rig = Rig()
    rig.map(0x1000, 0xF << 48 | 0xA000 | LEAF)
    assert rig.physical(0x1000) == 0xA000


def test_output_size_limits_what_ips_allows() -> None:
    rig = Rig(Features(output_address_bits=36))
    rig.map(0x1000, 1 << 36 | LEAF)
    assert rig.fault(0x1000) == hw.translation_record(0x11, 0x1000)


# Aborted fetches


@pytest.mark.parametrize("level", range(1, 4))
def test_external_abort_of_each_level(level: int) -> None:
    rig = Rig()
    address = 3 << 39 | 5 << 30 | 7 << 21 | 9 << 12 | 0x123
    rig.map(address, 0x4000_0000 | hw.TABLE, level=level - 1)
    fetch = 0x4000_0000 + 8 * (address >> 39 - 9 * level & 511)
    assert rig.fault(address, write=True) == hw.translation_record(
        0x0B, address, second=hw.CLASS_TT, fetch=fetch
    )


def test_external_abort_of_the_first_level() -> None:
    rig = Rig()
    rig.context(hw.CD_PLAIN, 0x7000_0000)
    assert rig.fault(1 << 39, privileged=True) == hw.translation_record(
        0x0B, 1 << 39, second=hw.RNW | hw.PNU | hw.CLASS_TT, fetch=0x7000_0008
    )


# Access flag


@pytest.mark.parametrize(("level", "kind"), [(1, hw.BLOCK), (2, hw.BLOCK), (3, hw.PAGE)])
def test_access_flag(level: int, kind: int) -> None:
    rig = Rig()
    leaf = hw.USER | hw.NG | kind
    entry = rig.map(0x1000, leaf, level=level)
    assert rig.fault(0x1234) == hw.translation_record(0x12, 0x1234)
    assert rig.fault(0x1234, write=True) == hw.translation_record(0x12, 0x1234, second=hw.CLASS_IN)
    # A fault leaves nothing in the TLB.
    rig.put(entry, leaf | hw.AF)
    assert rig.physical(0x1234) & 0xFFF == 0x234
    rig.put(entry, leaf)
    rig.context(hw.CD_PLAIN | hw.AFFD)
    assert rig.physical(0x1234) & 0xFFF == 0x234


def test_neighbours_without_the_access_flag_are_not_taken_along() -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | LEAF)
    rig.map(0x2000, 0xB000 | LEAF & ~hw.AF)
    assert rig.go(0x1000, 0x2000) == [(0xA000, 0x1000)]
    assert rig.fault(0x2000) == hw.translation_record(0x12, 0x2000)


# What differs from its neighbour is walked on its own.
@pytest.mark.parametrize(
    "other", [0, 1 << 40 | LEAF, 0xB000 | LEAF | hw.READ_ONLY, 0xB000 | hw.AF | hw.NG | hw.PAGE]
)
def test_neighbours_that_differ(other: int) -> None:
    rig = Rig(cd=hw.CD_PLAIN & ~(7 << 32))
    rig.map(0x1000, 0xA000 | LEAF)
    rig.map(0x2000, other)
    rig.map(0x3000, 0xC000 | LEAF)
    expected = {0: 0x10, 1 << 40 | LEAF: 0x11}.get(other, 0x13)
    assert rig.go(0x1000, 0x3000, write=True) == [(0xA000, 0x1000)]
    assert hw.number(rig.fault(0x2000, write=True)) == expected
    assert rig.go(0x3000, 0x1000, write=True) == [(0xC000, 0x1000)]


# The order: range, then level by level abort, translation, size; then access flag, then permission.


def test_order_of_faults_in_a_walk() -> None:
    everything_wrong = 1 << 40 | hw.READ_ONLY | hw.NG | hw.PAGE
    rig = Rig(cd=hw.CD_PLAIN & ~(7 << 32))
    entry = rig.map(0x1000, everything_wrong & ~1)
    outcomes = []
    for fixed in (
        everything_wrong & ~1,  # nothing right
        everything_wrong,  # valid
        everything_wrong & ~(1 << 40),  # within IPS
        everything_wrong & ~(1 << 40) | hw.AF,  # accessed
        (everything_wrong & ~(1 << 40) | hw.AF | hw.USER) & ~hw.READ_ONLY,
    ):
        rig.put(entry, fixed)
        rig.forget()
        if fixed & hw.USER:
            assert rig.physical(0x1000, write=True) == 0
        else:
            outcomes.append(hw.number(rig.fault(0x1000, write=True)))
    assert outcomes == [0x10, 0x11, 0x12, 0x13]


def test_an_upper_level_faults_before_a_lower_one() -> None:
    rig = Rig(cd=hw.CD_PLAIN & ~(7 << 32))
    rig.map(0x1000, 0, level=1)
    assert hw.number(rig.fault(0x1000)) == 0x10
    rig.map(0x1000, 1 << 40 | hw.TABLE, level=1)  # too large, and out of memory
    assert hw.number(rig.fault(0x1000)) == 0x11
    rig.map(0x1000, 0x4000_0000 | hw.TABLE, level=1)
    assert hw.number(rig.fault(0x1000)) == 0x0B


def test_order_of_configuration_faults() -> None:
    rig = Rig()
    ste = hw.STRTAB + 64 * hw.STREAM
    outcomes = []

    def see(**access: int) -> None:
        rig.forget()
        outcomes.append(hw.number(rig.fault(0x1000, **access)))

    see(stream=0x100, substream=9)
    rig.put(ste, 0x4000_0000 | 2 << 59)
    see(substream=9)  # V is 0
    rig.put(ste, hw.STE_S1 | 0x4000_0000 | 2 << 59, 2)
    see(substream=9)  # beyond S1CDMax
    see(substream=0)  # not to be had with S1DSS 2
    see(substream=1)  # out of memory
    rig.put(ste, hw.STE_S1 | rig.cd_address | 2 << 59, 2)
    see(substream=1)  # V is 0
    see()  # the CD is right, the tables are empty
    assert outcomes == [0x02, 0x04, 0x08, 0x06, 0x09, 0x0A, 0x10]


def test_a_table_that_points_at_itself_ends() -> None:
    rig = Rig()
    rig.put(rig.low, rig.low | hw.TABLE | hw.AF | hw.USER)
    assert rig.physical(0) == rig.low
    rig.put(rig.low + 8, rig.low | hw.TABLE)
    assert rig.fault(1 << 39 | 1 << 30 | 1 << 21 | 1 << 12) == hw.translation_record(
        0x12, 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12
    )
