"""The SMMU sets access flags and dirty state itself (IHI 0070, 3.13; DDI 0487, D8.5)."""

from collections.abc import Callable
from itertools import product
from threading import Thread

import pytest

from tests import smmu_rig as hw
from tests.stages_rig import (
    CLASS_CD,
    CLASS_TT,
    DBM,
    PS_48,
    RNW,
    S2_NORMAL,
    S2_READ,
    S2_WRITE,
    S2AFFD,
    S2HA,
    S2HD,
    S2R,
    Stages,
    Table,
    everything_but,
    stage_2_record,
)
from viommu.memory import GuestMemory
from viommu.smmu import TransactionAborted

OUT = 0x5A_8000_0000
IPA = 0x12_3400_0000
READ_ONLY, AF, NG, USER = hw.READ_ONLY, hw.AF, hw.NG, hw.USER
COLD = OUT | USER | NG | hw.PAGE
"""A page that is readable and writable, and has not been accessed."""
CLEAN = COLD | AF | READ_ONLY | DBM
HTTU = {0: 0, 1: hw.HA, 2: hw.HA | hw.HD}


def stage_1(bits: int = hw.HA | hw.HD, **features: object) -> tuple[Stages, Table]:
    rig = Stages(everything_but(**features))
    table = Table(rig, 12, 48)
    rig.stage_1_only(table, cd=bits)
    return rig, table


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("affd", [0, hw.AFFD])
def test_the_access_flag_is_set_by_an_access(level: int, affd: int) -> None:
    rig, table = stage_1(hw.HA | affd)
    kind = hw.PAGE if level == 3 else hw.BLOCK
    cold = (OUT & -(1 << 30)) | USER | NG | kind
    place = table.map(0, cold, level=level)
    assert rig.physical(0) == OUT & -(1 << 30)
    assert rig.get(place) == cold | AF
    # Its neighbour has not been accessed, though it may have been looked at.
    next_place = table.map(1 << table.shift(level), cold, level=level)
    assert rig.physical(0x10) & 0xFFF == 0x10
    assert rig.get(next_place) == cold


def test_a_range_sets_the_flag_of_each_of_its_pages_and_no_other() -> None:
    for caching in ("normal", "hostile", "none"):
        rig, table = stage_1(hw.HA, caching=caching)
        places = [table.map(page << 12, COLD + (page << 12)) for page in range(8)]
        assert rig.go(0x1800, 0x4000) == [(OUT + 0x1800, 0x4000)]
        flags = [bool(rig.get(place) & AF) for place in places]
        assert flags == [False, True, True, True, True, True, False, False], caching


@pytest.mark.parametrize("httu", [0, 1, 2])
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(("dbm", "read_only", "af"), list(product((0, 1), repeat=3)))
def test_stage_1_as_the_table_of_3_13_3_has_it(
    httu: int, write: bool, dbm: int, read_only: int, af: int
) -> None:
    rig, table = stage_1(HTTU[httu])
    leaf = COLD | dbm * DBM | read_only * READ_ONLY | af * AF
    place = table.map(0x1000, leaf)
    if not af and httu < 1:
        assert hw.number(rig.fault(0x1000, write=write)) == 0x12
        assert rig.get(place) == leaf
        return
    becomes_dirty = write and read_only and dbm and httu == 2
    if write and read_only and not becomes_dirty:
        assert hw.number(rig.fault(0x1000, write=write)) == 0x13
        assert rig.get(place) & ~AF == leaf & ~AF
        return
    assert rig.physical(0x1000, write=write) == OUT
    expected = leaf | AF
    if becomes_dirty:
        expected &= ~READ_ONLY
    assert rig.get(place) == expected
    # Once written it stays written, from the TLB too.
    assert rig.physical(0x1000) == OUT


@pytest.mark.parametrize("bits", [hw.HD, 0])
def test_hd_without_ha_is_as_neither(bits: int) -> None:
    rig, table = stage_1(bits)
    place = table.map(0x1000, CLEAN)
    assert hw.number(rig.fault(0x1000, write=True)) == 0x13
    assert rig.get(place) == CLEAN
    table.map(0x2000, COLD)
    assert hw.number(rig.fault(0x2000)) == 0x12


def test_a_clean_page_in_the_tlb_becomes_dirty_by_the_first_write() -> None:
    rig, table = stage_1()
    places = [table.map(page << 12, CLEAN + (page << 12)) for page in range(4)]
    assert rig.go(0, 0x4000) == [(OUT, 0x4000)]
    assert [rig.get(place) for place in places] == [CLEAN + (page << 12) for page in range(4)]
    assert rig.go(0x1000, 0x2000, write=True) == [(OUT + 0x1000, 0x2000)]
    dirty = [not rig.get(place) & READ_ONLY for place in places]
    assert dirty == [False, True, True, False]


def test_hierarchical_permissions_keep_a_page_clean() -> None:
    rig, table = stage_1()
    for index, attributes in enumerate((1 << 62, 1 << 61)):
        address = (index + 1) << 39
        place = table.map(address, CLEAN, tables=attributes)
        assert hw.number(rig.fault(address, write=True)) == 0x13
        assert rig.get(place) == CLEAN
    # Other reasons to refuse the write keep it clean too: no EL0 access, PAN.
    place = table.map(0x5000, CLEAN & ~USER)
    assert hw.number(rig.fault(0x5000, write=True)) == 0x13
    assert rig.get(place) == CLEAN & ~USER
    rig.stage_1_only(table, cd=hw.HA | hw.HD | hw.PAN)
    place = table.map(0x6000, CLEAN)
    assert hw.number(rig.fault(0x6000, write=True, privileged=True)) == 0x13
    assert rig.get(place) == CLEAN


@pytest.mark.parametrize("hd", [0, hw.HD])
def test_a_clean_page_counts_as_writable_where_that_forbids_execution(hd: int) -> None:
    """WXN, and that EL1 does not execute what EL0 can write."""
    rig, table = stage_1(hw.HA | hd)
    place = table.map(0x1000, CLEAN)
    allowed = not hd
    for wxn, privileged in ((0, True), (hw.WXN, False), (hw.WXN, True), (0, False)):
        rig.stage_1_only(table, cd=hw.HA | hd | wxn)
        try:
            rig.go(0x1000, privileged=privileged, instruction=True)
            assert allowed or (not wxn and not privileged)
        except TransactionAborted:
            assert hw.number(rig.events()[0]) == 0x13
            assert not allowed
    assert rig.get(place) == CLEAN


@pytest.mark.parametrize(("httu", "bits"), list(product((0, 1, 2), HTTU.values())))
def test_what_httu_is_not_is_illegal(httu: int, bits: int) -> None:
    rig, table = stage_1(bits, httu=httu)
    assert rig.read(hw.IDR0) >> 6 & 3 == httu
    table.map(0x1000, COLD | AF)
    legal = not bits & ~HTTU[httu]
    if legal:
        assert rig.physical(0x1000) == OUT
    else:
        assert rig.fault(0x1000) == hw.configuration_record(0x0A)
    second = Table(rig, 12, 40)
    second.map(0, S2_READ | S2_NORMAL | AF | hw.PAGE)
    rig.stage_2_only(second, S2R | PS_48 | (bits & hw.HA and S2HA) | (bits & hw.HD and S2HD))
    if legal:
        assert rig.physical(0) == 0
    else:
        assert rig.fault(0) == hw.configuration_record(0x04)


# Stage 2


@pytest.mark.parametrize("httu", [0, 1, 2])
@pytest.mark.parametrize("affd", [0, S2AFFD])
@pytest.mark.parametrize(
    ("dbm", "s2ap", "af"), list(product((0, DBM), (0, S2_READ, S2_WRITE, S2_READ | S2_WRITE), (0, AF)))
)  # fmt: skip
def test_stage_2_as_the_table_of_3_13_3_has_it(
    httu: int, affd: int, dbm: int, s2ap: int, af: int
) -> None:
    rig = Stages()
    table = Table(rig, 12, 40)
    bits = {0: 0, 1: S2HA, 2: S2HA | S2HD}[httu]
    rig.stage_2_only(table, S2R | PS_48 | bits | affd)
    leaf = OUT & (1 << 40) - 1 | S2_NORMAL | hw.PAGE | dbm | s2ap | af
    place = table.map(0x1000, leaf)
    for write, fetch in ((False, False), (False, True), (True, False)):
        before = rig.get(place)
        found = None
        try:
            rig.go(0x1000, write=write, instruction=fetch)
        except TransactionAborted:
            found = hw.number(rig.events()[0])
        if not af and httu == 0 and not affd:
            assert found == 0x12
            assert rig.get(place) == leaf
            continue
        dirty = write and httu == 2 and dbm and not s2ap & S2_WRITE
        allowed = fetch or bool(before & (S2_WRITE if write else S2_READ)) or dirty
        assert found == (None if allowed else 0x13), (write, fetch)
        after = rig.get(place)
        assert after & ~AF == before & ~AF | (S2_WRITE if dirty else 0)
        if allowed and httu:
            assert after & AF


def test_a_read_never_makes_a_stage_2_page_dirty() -> None:
    rig = Stages()
    table = Table(rig, 12, 40)
    rig.stage_2_only(table, S2R | PS_48 | S2HA | S2HD)
    leaf = S2_NORMAL | hw.PAGE | DBM | AF | 2 << 53
    place = table.map(0x1000, leaf)  # not readable, not executable
    assert hw.number(rig.fault(0x1000)) == 0x13
    assert hw.number(rig.fault(0x1000, instruction=True)) == 0x13
    assert rig.get(place) == leaf
    rig.physical(0x1000, write=True)
    assert rig.get(place) == leaf | S2_WRITE


# Both stages


def pages(rig: Stages, second: Table) -> None:
    """Break the first 2 MiB of RAM, which have all of stage 1, into pages of stage 2."""
    region = hw.BASE + rig.OFFSET
    rig.put(second.map(region, 0, level=2), 0)
    for page in range(512):
        second.map(region + (page << 12), hw.BASE + (page << 12) | hw.PAGE | AF | S2_NORMAL | 0xC0)


def nested(cd: int, bits: int) -> tuple[Stages, Table, Table]:
    rig = Stages()
    first, second = Table(rig, 12, 39, offset=rig.OFFSET), Table(rig, 12, 40)
    rig.nested(first, second, cd=cd, bits=S2R | PS_48 | bits)
    pages(rig, second)
    return rig, first, second


@pytest.mark.parametrize("what", ["access", "dirty"])
@pytest.mark.parametrize("writable", [False, True])
def test_an_update_of_stage_1_needs_write_permission_of_stage_2(what: str, writable: bool) -> None:
    rig, first, second = nested(hw.HA | hw.HD, 0)
    leaf = IPA | USER | NG | hw.PAGE | (AF | DBM | READ_ONLY if what == "dirty" else 0)
    place = first.map(0x1000, leaf)
    second.map(IPA, OUT & (1 << 40) - 1 | S2_READ | S2_WRITE | S2_NORMAL | AF | hw.PAGE)
    write = what == "dirty"
    page = place & ~0xFFF
    rights = S2_READ | (S2_WRITE if writable else 0)
    second.map(page + rig.OFFSET, page | rights | S2_NORMAL | AF | hw.PAGE)
    rig.forget()
    if writable:
        assert rig.physical(0x1000, write=write) == OUT & (1 << 40) - 1
        assert rig.get(place) == (leaf | AF) & ~(READ_ONLY if write else 0)
    else:
        # TTRnW is 0: it was the write of the descriptor.
        second_word = CLASS_TT | (0 if write else RNW)
        expected = stage_2_record(0x13, 0x1000, place + rig.OFFSET, second=second_word)
        for _ in range(2):
            assert rig.fault(0x1000, write=write) == expected
        assert rig.get(place) == leaf
        # Reading it is no trouble.
        if what == "dirty":
            assert rig.physical(0x1000) == OUT & (1 << 40) - 1


def test_an_update_of_stage_1_makes_the_page_of_its_table_dirty() -> None:
    rig, first, second = nested(hw.HA, S2HA | S2HD)
    place = first.map(0x1000, IPA | USER | NG | hw.PAGE)
    target = second.map(IPA, OUT & (1 << 40) - 1 | S2_READ | S2_NORMAL | DBM | hw.PAGE)
    page = place & ~0xFFF
    table_page = second.map(page + rig.OFFSET, page | S2_READ | S2_NORMAL | DBM | hw.PAGE)
    rig.forget()
    rig.physical(0x1000)
    assert rig.get(place) & AF
    assert rig.get(table_page) == page | S2_READ | S2_WRITE | S2_NORMAL | DBM | AF | hw.PAGE
    # Where the transaction goes is clean: it was a read.
    assert rig.get(target) & (AF | S2_WRITE) == AF
    rig.physical(0x1000, write=True)
    assert rig.get(target) & S2_WRITE


def test_every_fetch_of_a_nested_walk_sets_a_flag_of_stage_2_and_makes_nothing_dirty() -> None:
    rig, first, second = nested(0, S2HA | S2HD)
    first.map(0x1000, IPA | USER | NG | AF | hw.PAGE)
    cold = S2_READ | S2_NORMAL | DBM | hw.PAGE
    second.map(IPA, OUT & (1 << 40) - 1 | cold)
    places = {}
    for page in range(512):
        address = hw.BASE + (page << 12)
        places[address] = second.map(address + rig.OFFSET, address | cold)
    rig.forget()
    rig.physical(0x1000)
    accessed = {address for address, place in places.items() if rig.get(place) & AF}
    level_2 = rig.get(first.base) - rig.OFFSET & ~0xFFF
    level_3 = rig.get(level_2) - rig.OFFSET & ~0xFFF
    assert accessed == {rig.cd_address & ~0xFFF, first.base, level_2, level_3}
    assert not any(rig.get(place) & S2_WRITE for place in places.values())


def test_a_fault_of_stage_2_of_a_cd_fetch_can_be_one_of_access() -> None:
    rig, _, second = nested(0, 0)
    page = rig.cd_address & ~0xFFF
    second.map(page + rig.OFFSET, page | S2_READ | S2_NORMAL | hw.PAGE)
    rig.forget()
    expected = stage_2_record(0x12, 0, rig.cd_address + rig.OFFSET, second=CLASS_CD | RNW)
    assert rig.fault(0) == expected


# Races with software


class RacingMemory(GuestMemory):
    """Software that is faster: it runs between the SMMU's load of a descriptor and its update of it."""

    def __init__(self) -> None:
        super().__init__()
        self.race: Callable[[int], None] | None = None
        self.tries = 0

    def compare_exchange_u64(self, address: int, expected: int, value: int) -> bool:
        self.tries += 1
        if self.race is not None:
            self.race(address)
        return super().compare_exchange_u64(address, expected, value)


def race(rig: Stages) -> RacingMemory:
    """Put a racing memory in the place of the rig's own."""
    memory = RacingMemory()
    memory.add_region(hw.BASE, len(rig.ram), memoryview(rig.ram))
    walker = rig.smmu.configuration._walker
    walker._memory = memory
    return memory


def test_software_that_unmaps_first_wins() -> None:
    rig, table = stage_1()
    place = table.map(0x1000, COLD)
    memory = race(rig)
    memory.race = lambda address: rig.put(place, 0)
    assert rig.fault(0x1000) == hw.translation_record(0x10, 0x1000)
    assert rig.get(place) == 0


def test_software_that_moves_the_page_first_is_followed() -> None:
    rig, table = stage_1()
    place = table.map(0x1000, CLEAN)
    memory = race(rig)
    moved = (CLEAN & ~OUT) | 0x7777_0000

    def move(address: int) -> None:
        assert address == place
        rig.put(place, moved)
        memory.race = None

    memory.race = move
    assert rig.physical(0x1000, write=True) == 0x7777_0000
    assert rig.get(place) == moved & ~READ_ONLY
    assert memory.tries == 2


def test_software_that_takes_the_permission_first_is_heeded() -> None:
    rig, table = stage_1()
    place = table.map(0x1000, CLEAN)
    memory = race(rig)
    memory.race = lambda address: rig.put(place, CLEAN & ~DBM)
    assert hw.number(rig.fault(0x1000, write=True)) == 0x13
    assert rig.get(place) == CLEAN & ~DBM


def test_software_that_never_stops_does_not_hang_the_smmu() -> None:
    rig, table = stage_1()
    place = table.map(0x1000, COLD)
    memory = race(rig)
    memory.race = lambda address: rig.put(place, rig.get(place) ^ 1 << 55)
    assert hw.number(rig.fault(0x1000)) == 0x0B
    assert memory.tries < 100


def test_no_update_of_another_thread_is_lost() -> None:
    """Software sets its own bits in descriptors, atomically, while the SMMU sets access flags in them."""
    rig, table = stage_1()
    places = [table.map(page << 12, COLD + (page << 12)) for page in range(256)]
    memory = rig.memory

    def software() -> None:
        for bit in (55, 56, 57, 58):
            for place in places:
                done = False
                while not done:
                    old = memory.load_u64(place)
                    done = memory.compare_exchange_u64(place, old, old | 1 << bit)

    thread = Thread(target=software)
    thread.start()
    for page in range(256):
        assert rig.physical(page << 12) == OUT + (page << 12)
    thread.join()
    assert all(
        rig.get(place) == COLD + (page << 12) | AF | 0xF << 55 for page, place in enumerate(places)
    )


def test_an_update_that_memory_refuses_is_an_external_abort() -> None:
    """A table in a ROM: it can be read, and not written."""
    rom = bytearray(4096)
    head = 0x0B | hw.STREAM << 32
    rig, table = stage_1()
    rig.memory.add_region(0x6000_0000, 4096, memoryview(rom), writable=False)
    rom[8:16] = COLD.to_bytes(8, "little")
    table.map(0x20_0000, 0x6000_0000 | hw.TABLE, level=2)
    expected = hw.record(head, RNW | CLASS_TT, 0x20_1000, 0x6000_0008)
    assert rig.fault(0x20_1000) == expected
    # Of stage 2, it is told what the walk was for.
    second = Table(rig, 12, 40)
    rig.stage_2_only(second, S2R | PS_48 | S2HA)
    rom[8:16] = (S2_READ | S2_NORMAL | hw.PAGE).to_bytes(8, "little")
    second.map(0x20_0000, 0x6000_0000 | hw.TABLE, level=2)
    expected = hw.record(head, RNW | hw.CLASS_IN | 1 << 39, 0x20_1000, 0x6000_0008)
    assert rig.fault(0x20_1000) == expected
