"""What the caches keep, and what each command makes them forget (IHI 0070, 3.17, 3.21, 4.3, 4.4)."""

from collections.abc import Iterable

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import CD_PLAIN, Rig
from viommu.smmu import TransactionAborted
from viommu.smmu.tlb import GLOBAL, STAGE_2, Entry, Tag, Tlb, World

SYNC = (0x46, 0)
OTHER_ASID = 8
LEAF = hw.PLAIN | hw.PAGE
HIGH = hw.word(-(1 << 48))


class TwoSpaces(Rig):
    """SubstreamIDs 1 and 2 with ASIDs 7 and 8 and tables of their own; substream 3 is ASID 7 again."""

    def __init__(self) -> None:
        super().__init__()
        table = self.alloc(256, 256)
        self.tables = {1: self.low, 2: self.alloc(4096)}
        for substream, asid, low in ((1, 7, 1), (2, OTHER_ASID, 2), (3, 7, 1)):
            cd = CD_PLAIN & ~(0xFFFF << 48) | asid << 48
            self.put(table + 64 * substream, cd, self.tables[low], self.high)
        self.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_S1 | table | 2 << 59)
        # name: substream, address, descriptor while it is mapped, level
        self.entries = {
            "asid 7, page": (1, 0x1000, 0xA000 | LEAF, 3),
            "asid 7, next page": (1, 0x2000, 0xB000 | LEAF, 3),
            "asid 7, far page": (1, 0x60_0000, 0xC000 | LEAF, 3),
            "asid 7, 2 MiB": (1, 0x20_0000, 0x20_0000 | hw.PLAIN | hw.BLOCK, 2),
            "asid 7, 1 GiB": (1, 0x4000_0000, 0x4000_0000 | hw.PLAIN | hw.BLOCK, 1),
            "asid 7, high": (1, HIGH | 0x1000, 0xD000 | LEAF, 3),
            "asid 8, page": (2, 0x1000, 0xE000 | LEAF, 3),
            "asid 8, 2 MiB": (2, 0x20_0000, 0x60_0000 | hw.PLAIN | hw.BLOCK, 2),
            "global page": (1, 0x5000, 0xF000 | LEAF & ~hw.NG, 3),
            "global 2 MiB": (1, 0x80_0000, 0x80_0000 | (hw.PLAIN & ~hw.NG) | hw.BLOCK, 2),
        }
        self.places: dict[str, int] = {}
        for name, (substream, address, leaf, level) in self.entries.items():
            self.low = self.tables[substream]
            self.places[name] = self.map(address, leaf, level=level)

    def fill(self) -> None:
        """Everything cached, and then gone from the tables."""
        for substream, address, _, _ in self.entries.values():
            self.physical(address, substream=substream)
        for place in self.places.values():
            self.put(place, 0)

    def stale(self) -> set[str]:
        """The entries that still translate: from the TLB, since the tables are empty."""
        found = set()
        for name, (substream, address, leaf, _) in self.entries.items():
            try:
                assert self.physical(address, substream=substream) == leaf & 0xFFFF_FFFF_F000
                found.add(name)
            except TransactionAborted:
                assert hw.number(self.events()[-1]) == 0x10
        return found


def va(address: int) -> int:
    """Bits 63:12 of the second word of CMD_TLBI_NH_VA and VAA."""
    return hw.word(address) & ~0xFFF


@pytest.fixture
def spaces() -> TwoSpaces:
    rig = TwoSpaces()
    rig.fill()
    assert rig.stale() == set(rig.entries)
    return rig


GLOBALS = {"global page", "global 2 MiB"}


def names(pattern: str, rig: TwoSpaces) -> set[str]:
    return {name for name in rig.entries if pattern in name}


# command, what it must take away; everything else must stay
CASES: dict[str, tuple[tuple[int, int], Iterable[str]]] = {
    "NSNH_ALL": ((0x30, 0), ("",)),
    "NH_ALL": ((0x10, 0), ("",)),
    "NH_ALL, VMID is ignored without stage 2": ((0x10 | 0x55 << 32, 0), ("",)),
    "NH_ASID 7": ((0x11 | 7 << 48, 0), ("asid 7",)),
    "NH_ASID 8": ((0x11 | 8 << 48, 0), ("asid 8",)),
    "NH_ASID 9": ((0x11 | 9 << 48, 0), ()),
    "NH_VA 7, page": ((0x12 | 7 << 48, va(0x1000)), ("asid 7, page",)),
    "NH_VA 8, page": ((0x12 | 8 << 48, va(0x1000)), ("asid 8, page",)),
    "NH_VA 9, page": ((0x12 | 9 << 48, va(0x1000)), ()),
    "NH_VA 7, leaf": ((0x12 | 7 << 48, va(0x1000) | 1), ("asid 7, page",)),
    "NH_VA 7, inside 2 MiB": ((0x12 | 7 << 48, va(0x2F_F000)), ("asid 7, 2 MiB",)),
    "NH_VA 7, inside 1 GiB": ((0x12 | 7 << 48, va(0x7FFF_F000)), ("asid 7, 1 GiB",)),
    "NH_VA 7, high": ((0x12 | 7 << 48, va(HIGH | 0x1000)), ("asid 7, high",)),
    "NH_VA 7, nothing there": ((0x12 | 7 << 48, va(0x3000)), ()),
    "NH_VA 9, global page": ((0x12 | 9 << 48, va(0x5000)), ("global page",)),
    "NH_VA 9, global 2 MiB": ((0x12 | 9 << 48, va(0x8A_0000)), ("global 2 MiB",)),
    "NH_VAA page": ((0x13, va(0x1000)), ("asid 7, page", "asid 8, page")),
    "NH_VAA, ASID is no matter": (
        (0x13 | 9 << 48, va(0x20_0000)),
        ("asid 7, 2 MiB", "asid 8, 2 MiB"),
    ),
    "NH_VAA global page": ((0x13, va(0x5000)), ("global page",)),
    # RIL is 0: range and level hint are not looked at.
    "NH_VA 7, TG and TTL": ((0x12 | 7 << 48 | 31 << 12, va(0x1000) | 1 << 10), ("asid 7, page",)),
    "CFGI_ALL": ((0x04, 31), ()),
    "CFGI_STE": ((0x03 | hw.STREAM << 32, 1), ()),
    "CFGI_CD": ((0x05 | hw.STREAM << 32 | 1 << 12, 1), ()),
    "CFGI_CD_ALL": ((0x06 | hw.STREAM << 32, 0), ()),
    "PREFETCH_CONFIG": ((0x01 | hw.STREAM << 32, 0), ()),
}


@pytest.mark.parametrize("case", CASES)
def test_tlb_invalidation(spaces: TwoSpaces, case: str) -> None:
    command, patterns = CASES[case]
    gone = set().union(*(names(pattern, spaces) for pattern in patterns))
    spaces.submit(command, SYNC)
    assert spaces.stale() == set(spaces.entries) - gone


def test_global_entries_serve_every_asid(spaces: TwoSpaces) -> None:
    assert spaces.physical(0x5000, substream=2) == 0xF000
    assert spaces.physical(0x5000, substream=3) == 0xF000


def test_entries_of_one_asid_serve_every_context_with_it(spaces: TwoSpaces) -> None:
    assert spaces.physical(0x1000, substream=3) == 0xA000
    assert hw.number(spaces.fault(0x2000, substream=2)) == 0x10


def test_a_neighbour_that_is_not_global_stays_in_its_address_space() -> None:
    rig = TwoSpaces()
    rig.low = rig.tables[1]
    rig.map(0x9000, 0xA000 | LEAF & ~hw.NG)
    rig.map(0xA000, 0xB000 | LEAF)
    assert rig.go(0x9000, 0x2000, substream=1) == [(0xA000, 0x2000)]
    assert rig.physical(0x9000, substream=2) == 0xA000
    assert hw.number(rig.fault(0xA000, substream=2)) == 0x10


def test_what_failed_is_not_cached() -> None:
    rig = Rig()
    assert hw.number(rig.fault(0x1000)) == 0x10
    rig.map(0x1000, 0xA000 | LEAF)
    assert rig.physical(0x1000) == 0xA000


def test_invalidation_of_one_page_leaves_its_row_and_the_next_walk_is_fresh() -> None:
    rig = Rig()
    for index in range(4):
        rig.map(0x1000 * index, 0x10_0000 + 0x1000 * index | LEAF)
    assert rig.go(0, 0x4000) == [(0x10_0000, 0x4000)]
    for index in range(4):
        rig.map(0x1000 * index, 0x20_0000 + 0x1000 * index | LEAF)
    rig.submit((0x12 | hw.ASID << 48, 0x2000), SYNC)
    assert rig.go(0, 0x4000) == [(0x10_0000, 0x2000), (0x20_2000, 0x1000), (0x10_3000, 0x1000)]


# Configuration


class Streams(Rig):
    """Eight streams from 0x10 on, each with CDs for substreams 0 to 3; a stream's CDs all map 0x1000."""

    def __init__(self) -> None:
        super().__init__()
        self.map(0x1000, 0xA000 | LEAF)
        self.cds = {}
        for stream in range(0x10, 0x18):
            self.cds[stream] = self.alloc(256, 256)
            for substream in range(4):
                self.put(self.cds[stream] + 64 * substream, CD_PLAIN, self.low, self.high)
            self.put(hw.STRTAB + 64 * stream, hw.STE_S1 | self.cds[stream] | 2 << 59)

    def fill(self) -> None:
        for stream in self.cds:
            for substream in range(4):
                self.physical(0x1000, stream=stream, substream=substream)

    def break_stes(self) -> None:
        for stream in self.cds:
            self.put(hw.STRTAB + 64 * stream, 0)

    def break_cds(self) -> None:
        for table in self.cds.values():
            for substream in range(4):
                self.put(table + 64 * substream, 0)

    def works(self) -> dict[int, set[int]]:
        """The substreams that go through, by stream."""
        found: dict[int, set[int]] = {stream: set() for stream in self.cds}
        for stream in self.cds:
            for substream in range(4):
                try:
                    self.physical(0x1000, stream=stream, substream=substream)
                    found[stream].add(substream)
                except TransactionAborted:
                    assert hw.number(self.events()[-1]) in (0x04, 0x0A)
        return found


@pytest.fixture
def streams() -> Streams:
    rig = Streams()
    rig.fill()
    return rig


EVERY = {0, 1, 2, 3}

STE_CASES = {
    "CFGI_STE": ((0x03 | 0x12 << 32, 1), {0x12}),
    "CFGI_STE, not leaf": ((0x03 | 0x12 << 32, 0), {0x12}),
    "CFGI_STE of a stream out of range": ((0x03 | 0xFFFF_FFFF << 32, 1), set()),
    "CFGI_STE_RANGE 0": ((0x04 | 0x13 << 32, 0), {0x12, 0x13}),
    "CFGI_STE_RANGE 1": ((0x04 | 0x17 << 32, 1), {0x14, 0x15, 0x16, 0x17}),
    "CFGI_STE_RANGE 2": ((0x04 | 0x11 << 32, 2), set(range(0x10, 0x18))),
    "CFGI_STE_RANGE elsewhere": ((0x04 | 0x20 << 32, 2), set()),
    "CFGI_STE_RANGE 30": ((0x04 | 0x7FFF_FFFF << 32, 30), set(range(0x10, 0x18))),
    "CFGI_STE_RANGE 30, other half": ((0x04 | 0x8000_0000 << 32, 30), set()),
    "CFGI_ALL": ((0x04 | 0x8000_0000 << 32, 31), set(range(0x10, 0x18))),
    "CFGI_CD": ((0x05 | 0x12 << 32, 1), set()),
    "CFGI_CD_ALL": ((0x06 | 0x12 << 32, 1), set()),
    "TLBI_NSNH_ALL": ((0x30, 0), set()),
}


@pytest.mark.parametrize("case", STE_CASES)
def test_stes_are_kept_until_invalidated(streams: Streams, case: str) -> None:
    streams.break_stes()
    assert streams.works() == dict.fromkeys(streams.cds, EVERY)
    command, gone = STE_CASES[case]
    streams.submit(command, SYNC)
    assert streams.works() == {s: set() if s in gone else EVERY for s in streams.cds}


CD_CASES = {
    "CFGI_CD": ((0x05 | 2 << 12 | 0x12 << 32, 1), {(0x12, 2)}),
    "CFGI_CD, SSV is no matter": ((0x05 | 1 << 11 | 2 << 12 | 0x12 << 32, 0), {(0x12, 2)}),
    "CFGI_CD, no such substream": ((0x05 | 9 << 12 | 0x12 << 32, 0), set()),
    "CFGI_CD_ALL": ((0x06 | 0x12 << 32, 0), {(0x12, s) for s in EVERY}),
    "CFGI_STE takes the CDs along": ((0x03 | 0x12 << 32, 1), {(0x12, s) for s in EVERY}),
    "CFGI_STE_RANGE too": ((0x04 | 0x12 << 32, 0), {(t, s) for t in (0x12, 0x13) for s in EVERY}),
    "CFGI_ALL too": ((0x04, 31), {(t, s) for t in range(0x10, 0x18) for s in EVERY}),
    "TLBI_NSNH_ALL": ((0x30, 0), set()),
}


@pytest.mark.parametrize("case", CD_CASES)
def test_cds_are_kept_until_invalidated(streams: Streams, case: str) -> None:
    streams.break_cds()
    assert streams.works() == dict.fromkeys(streams.cds, EVERY)
    command, gone = CD_CASES[case]
    streams.submit(command, SYNC)
    expected = {t: {s for s in EVERY if (t, s) not in gone} for t in streams.cds}
    assert streams.works() == expected


def test_faulty_configuration_is_not_cached() -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | LEAF)
    ste = rig.get(hw.STRTAB + 64 * hw.STREAM)
    rig.put(hw.STRTAB + 64 * hw.STREAM, 0)
    assert hw.number(rig.fault(0x1000)) == 0x04
    rig.put(hw.STRTAB + 64 * hw.STREAM, ste)
    rig.put(rig.cd_address, 0)
    assert hw.number(rig.fault(0x1000)) == 0x0A
    rig.put(rig.cd_address, CD_PLAIN)
    assert rig.physical(0x1000) == 0xA000


def test_clearing_smmuen_keeps_the_caches() -> None:
    rig = Rig()
    entry = rig.map(0x1000, 0xA000 | LEAF)
    rig.physical(0x1000)
    rig.put(entry, 0)
    rig.put(hw.STRTAB + 64 * hw.STREAM, 0)
    rig.write(hw.CR0, hw.CMDQEN | hw.EVENTQEN)
    rig.write(hw.CR0, 0xD)
    assert rig.physical(0x1000) == 0xA000


# The TLB by itself: accounting and eviction

TAG = Tag(World.EL1, 0, 1)


def test_tlb_counts_its_entries() -> None:
    tlb = Tlb()
    tlb.insert(TAG, 0x1000, Entry(12, 0xA001))
    tlb.insert(TAG, 0x20_0000, Entry(21, 1))
    tlb.insert(TAG, 0x20_0000, Entry(21, 1))
    tlb.insert(TAG._replace(asid=GLOBAL), 0x4000_0000, Entry(30, 1))
    tlb.insert(TAG._replace(asid=STAGE_2), 0x1_0000, Entry(16, 0xB_0001))
    assert len(tlb) == 4
    tlb.invalidate_asid(World.EL1, 0, 1)
    assert len(tlb) == 2
    tlb.invalidate_vmid(World.EL1, 0)
    assert len(tlb) == 1
    tlb.invalidate_vmid(World.EL1, 0, stage_2=True)
    assert len(tlb) == tlb._used == 0


@pytest.mark.parametrize("capacity", [512, 600, 1024, 5000, 20_000])
@pytest.mark.parametrize("page_shift", [12, 14, 16])
def test_tlb_never_outgrows_its_capacity(capacity: int, page_shift: int) -> None:
    tlb = Tlb(max(capacity, 1 << page_shift - 3))
    for step in range(2000):
        tag = TAG._replace(asid=step * 7 % 50)
        if step % 3:
            tlb.insert(tag, step * 5 % 40 << 21, Entry(21, 1))
        else:
            tlb.insert(tag, step << 12, Entry(page_shift, 1))
        if step % 11 == 0:
            tlb.invalidate_address(World.EL1, 0, step % 50, step * 5 % 40 << 21)
        rows = sum(len(row) for space in tlb._spaces.values() for row in space.rows.values())
        blocks = sum(len(space.blocks) for space in tlb._spaces.values())
        assert tlb._used == rows + blocks * 32 <= tlb._capacity


def test_eviction_costs_only_another_walk() -> None:
    rig = Rig()
    rig.smmu.tlb._capacity = 512
    for index in range(8):
        rig.map(index << 21, 0x10_0000 + (index << 12) | LEAF)
    for _ in range(2):
        for index in range(8):
            assert rig.physical(index << 21) == 0x10_0000 + (index << 12)
