"""What each TLB invalidation takes and leaves, with two stages, VMIDs and ranges (IHI 0070, 4.4)."""

import time
from collections.abc import Callable

import pytest

from tests import smmu_rig as hw
from tests.stages_rig import PS_48, S2_PLAIN, S2R, SYNC, Stages, Table, everything_but
from viommu.smmu import Features, TransactionAborted

LEAF = hw.PLAIN | hw.PAGE
S2_LEAF = S2_PLAIN | hw.PAGE
OUT = 0x5A_8000_0000
IPA = 0x12_3400_0000
NESTED, SECOND, FIRST = 0x10, 0x11, 0x12
"""Streams: both stages, stage 2 alone, stage 1 alone; each again, 0x10 further, with another VMID."""
VMIDS = {0: 5, 0x10: 6}


class TwoMachines(Stages):
    """Two VMIDs, each with a stream of either stage and of both, whose entries are then taken from the tables."""

    def __init__(self, features: Features | None = None) -> None:
        super().__init__(features)
        self.places: dict[str, tuple[int, int, int]] = {}
        self.erase: list[int] = []
        for base, vmid in VMIDS.items():
            second = Table(self, 12, 40)
            for address in range(hw.BASE, hw.BASE + len(self.ram), 1 << 21):
                second.map(address + self.OFFSET, address | S2_PLAIN | hw.BLOCK, level=2)
            words = self.stage_2_words(second, S2R | PS_48, vmid)
            first = Table(self, 12, 39, offset=self.OFFSET)
            alone = Table(self, 12, 39)
            cd, cd_alone = self.alloc(64), self.alloc(64)
            self.put(cd, self.cd_word(first), first.pointer)
            self.put(cd_alone, self.cd_word(alone), alone.pointer)
            for stream, *ste in (
                (NESTED, hw.STE_NESTED | cd + self.OFFSET, 0, *words),
                (SECOND, hw.STE_S2, 0, *words),
                (FIRST, hw.STE_S1 | cd_alone, 0, vmid),
            ):
                self.put(hw.STRTAB + 64 * (stream + base), *ste, *(0,) * (8 - len(ste)))
            marks = 1 << 30 if base else 0
            for name, stream, table, address, leaf in (
                ("nested", NESTED, first, 0x1000, IPA | LEAF),
                ("nested global", NESTED, first, 0x2000, IPA + 0x1000 | LEAF & ~hw.NG),
                ("stage 1", FIRST, alone, 0x3000, OUT + marks | LEAF),
                ("stage 1 global", FIRST, alone, 0x4000, OUT + marks | LEAF & ~hw.NG),
                ("stage 2", SECOND, second, IPA + 0x5000, OUT + marks | S2_LEAF),
            ):
                self.erase.append(table.map(address, leaf))
                self.places[f"{vmid} {name}"] = (stream + base, address, 0)
            for page in range(2):
                self.erase.append(second.map(IPA + (page << 12), OUT + marks | S2_LEAF))
                # What stage 2 has of the same IPA is seen by the stream that has it alone.
                self.places[f"{vmid} ipa {page}"] = (SECOND + base, IPA + (page << 12), 0)

    def fill(self) -> None:
        for stream, address, _ in self.places.values():
            self.physical(address, stream=stream)
        for place in self.erase:
            self.put(place, 0)

    def stale(self) -> set[str]:
        found = set()
        for name, (stream, address, _) in self.places.items():
            try:
                self.physical(address, stream=stream)
                found.add(name)
            except TransactionAborted:
                assert hw.number(self.events()[-1]) == 0x10
        return found


def every(*parts: str) -> Callable[[str], bool]:
    return lambda name: all(part in name for part in parts)


def either(*tests: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda name: any(test(name) for test in tests)


OF_STAGE_1 = either(every("5", "nested"), every("5", "stage 1"))
V5 = 5 << 32

CASES: dict[str, tuple[tuple[int, int], Callable[[str], bool]]] = {
    "NSNH_ALL": ((0x30, 0), every()),
    "NH_ALL": ((0x10 | V5, 0), OF_STAGE_1),
    "NH_ALL of nobody": ((0x10 | 7 << 32, 0), either()),
    "S12_VMALL": ((0x28 | V5, 0), every("5 ")),
    "NH_ASID": (
        (0x11 | V5 | 7 << 48, 0),
        lambda name: OF_STAGE_1(name) and "global" not in name,
    ),
    "NH_ASID of nobody": ((0x11 | V5 | 8 << 48, 0), either()),
    "NH_VA": ((0x12 | V5 | 7 << 48, 0x1000), lambda name: name == "5 nested"),
    "NH_VA, global": ((0x12 | V5 | 9 << 48, 0x2000), every("5 nested global")),
    "NH_VA, stage 1": ((0x12 | V5 | 7 << 48, 0x3000), lambda name: name == "5 stage 1"),
    "NH_VA of nobody": ((0x12 | V5 | 9 << 48, 0x1000), either()),
    "NH_VA of an IPA": ((0x12 | V5 | 7 << 48, IPA), either()),
    "NH_VAA": ((0x13 | V5, 0x1000), lambda name: name == "5 nested"),
    "NH_VAA of the other": ((0x13 | 6 << 32, 0x4000), every("6 stage 1 global")),
    "S2_IPA": ((0x2A | V5, IPA), every("5 ipa 0")),
    "S2_IPA, leaf": ((0x2A | V5, IPA + 0x1000 | 1), every("5 ipa 1")),
    "S2_IPA of stage 2 alone": ((0x2A | V5, IPA + 0x5000), every("5 stage 2")),
    "S2_IPA of a VA": ((0x2A | V5, 0x1000), either()),
    "S2_IPA of nobody": ((0x2A | 7 << 32, IPA), either()),
    "EL2_ALL": ((0x20, 0), either()),
    "EL2_VAA": ((0x23, 0x1000), either()),
    "CFGI_ALL": ((0x04, 31), either()),
    # Ranges: TG 1 is 4 KiB; (NUM + 1) << SCALE pages.
    "NH_VA, 4 pages": (
        (0x12 | V5 | 7 << 48 | 3 << 12, 0x1000 | 1 << 10),
        lambda name: OF_STAGE_1(name) and ("global" in name or name[2:] in ("nested", "stage 1")),
    ),
    "NH_VAA, 2 pages by SCALE": (
        (0x13 | V5 | 1 << 20, 0x2000 | 1 << 10),
        lambda name: name in ("5 nested global", "5 stage 1"),
    ),
    "S2_IPA, 8 pages": ((0x2A | V5 | 7 << 12, IPA | 1 << 10), every("5", "ip")),
    "S2_IPA, everything": ((0x2A | V5 | 31 << 12 | 31 << 20, 1 << 10), either(every("5 ipa"), every("5 stage 2"))),
    "NH_VA, one page of level 3": (
        (0x12 | V5 | 7 << 48, 0x1000 | 1 << 10 | 3 << 8),
        lambda name: name == "5 nested",
    ),
    "NH_VA, one block of level 2": ((0x12 | V5 | 7 << 48, 1 << 10 | 2 << 8), either()),
    "NH_VA, 16 KiB granules": ((0x12 | V5 | 7 << 48 | 31 << 12, 2 << 10), either()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_goes_and_what_stays(case: str) -> None:
    command, gone = CASES[case]
    rig = TwoMachines()
    rig.fill()
    everything = set(rig.places)
    assert rig.stale() == everything
    rig.submit(command, SYNC)
    assert rig.consumed
    expected = {name for name in everything if not gone(name)}
    if case == "S2_IPA, 8 pages":  # IPA + 0x5000 is in it too
        expected.discard("5 stage 2")
    assert rig.stale() == expected


def test_both_stages_go_by_two_commands_and_not_by_one() -> None:
    """S2_IPA leaves what combines both stages, NH_ALL what stage 2 alone knows (4.4.3)."""
    rig = TwoMachines()
    rig.fill()
    rig.submit((0x2A | V5, IPA), SYNC)
    assert "5 nested" in rig.stale()
    rig.submit((0x10 | V5, 0), SYNC)
    assert "5 nested" not in rig.stale()


def test_stage_2_entries_that_walks_left_are_used_until_they_are_invalidated() -> None:
    rig = Stages()
    first, second = Table(rig, 12, 39, offset=rig.OFFSET), Table(rig, 12, 40)
    rig.nested(first, second, vmid=9)
    first.map(0x1000, IPA | LEAF)
    first.map(0x2000, IPA + 0x234 * 0x1000 | LEAF)
    second.map(IPA, OUT | S2_LEAF)
    second.map(IPA + 0x234 * 0x1000, OUT | S2_LEAF)
    rig.physical(0x1000)
    # The tables of stage 1 lie at an IPA that stage 2 does not map any more.
    region = first.base & -(1 << 21)
    place = second.map(region + rig.OFFSET, 0, level=2)
    assert rig.physical(0x2000) == OUT
    rig.submit((0x10 | 9 << 32, 0), SYNC)
    assert rig.physical(0x1000) == OUT
    rig.submit((0x2A | 9 << 32, region + rig.OFFSET), (0x10 | 9 << 32, 0), SYNC)
    assert hw.number(rig.fault(0x1000)) == 0x10
    rig.put(place, region | S2_PLAIN | hw.BLOCK)
    assert rig.physical(0x1000) == OUT


# What stage 1 maps as one and stage 2 in pieces

SIZES = {
    (12, 2): (0x12 | 7 << 48, 1 << 10 | 2 << 8),
    (12, 1): (0x12 | 7 << 48, 1 << 10 | 1 << 8),
    (16, 3): (0x12 | 7 << 48, 3 << 10 | 3 << 8),
    (14, 3): (0x12 | 7 << 48, 2 << 10 | 3 << 8),
}


@pytest.mark.parametrize(("granule", "level"), SIZES)
@pytest.mark.parametrize("how", ["address", "end", "range", "VAA", "other level"])
def test_one_invalidation_takes_all_fragments(granule: int, level: int, how: str) -> None:
    rig = Stages()
    first, second = Table(rig, granule, 42, offset=rig.OFFSET), Table(rig, 12, 40)
    rig.nested(first, second)
    size = 1 << first.shift(level)
    address, ipa = 3 << 36, 5 << 36
    kind = hw.PAGE if level == 3 else hw.BLOCK
    place = first.map(address, ipa | hw.PLAIN | kind, level=level)
    neighbour = first.map(address + size, ipa | hw.PLAIN | kind, level=level)
    offsets = [0, 0x1000, size // 2, size - 0x1000]
    for offset in offsets:
        second.map(ipa + offset, OUT + offset | S2_LEAF)
        for base in (address, address + size):
            assert rig.physical(base + offset + 8) == OUT + offset + 8
    rig.put(place, 0)
    rig.put(neighbour, 0)
    low, high = SIZES[granule, level]
    command = {
        "address": (low, address),
        "end": (low, address + size - 0x1000),
        "VAA": (0x13, address + size // 2),
        "range": (low, address | high),
        "other level": (low, address | high & ~(3 << 8) | (1 if level == 2 else 2) << 8),
    }[how]  # fmt: skip
    rig.submit(command, SYNC)
    assert rig.consumed
    for offset in offsets:
        assert rig.physical(address + size + offset) == OUT + offset  # the next one is whole
        if how != "other level":
            assert hw.number(rig.fault(address + offset)) == 0x10, hex(offset)
        else:
            assert rig.physical(address + offset) == OUT + offset


# Ranges and levels of one stage


GRANULES = {12: (1, (1, 2, 3)), 14: (2, (2, 3)), 16: (3, (2, 3))}


@pytest.mark.parametrize("granule", GRANULES)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_range_goes_by_granule_and_level(granule: int, stage: int) -> None:
    for tg in range(1, 4):
        for ttl in range(4):
            rig = Stages()
            table = Table(rig, granule, 44)
            if stage == 1:
                rig.stage_1_only(table)
            else:
                rig.stage_2_only(table)
            plain = hw.PLAIN if stage == 1 else S2_PLAIN
            own_tg, levels = GRANULES[granule]
            places = {}
            for level in levels:
                address = level << 36
                kind = hw.PAGE if level == 3 else hw.BLOCK
                places[level] = table.map(address, plain | kind, level=level)
                assert rig.physical(address + 8) == 8
                rig.put(places[level], 0)
            # 2^39 bytes or more from 0 on.
            command = 0x12 | 7 << 48 if stage == 1 else 0x2A
            rig.submit((command | 31 << 12 | 23 << 20, tg << 10 | ttl << 8), SYNC)
            assert rig.consumed
            effective = 0 if (tg, ttl) == (2, 1) else ttl
            for level in places:
                gone = tg == own_tg and effective in (0, level)
                try:
                    rig.physical(level << 36)
                    assert not gone, (tg, ttl, level)
                except TransactionAborted:
                    assert gone, (tg, ttl, level)


@pytest.mark.parametrize("num", [0, 1, 30, 31])
@pytest.mark.parametrize("scale", [0, 1, 4])
def test_a_range_covers_num_plus_1_times_2_to_the_scale(num: int, scale: int) -> None:
    rig = Stages()
    table = Table(rig, 12, 48)
    rig.stage_1_only(table)
    pages = 600
    places = [table.map(page << 12, OUT + (page << 12) | LEAF) for page in range(pages)]
    rig.go(0, 0x20_0000)
    rig.go(0x20_0000, (pages << 12) - 0x20_0000)
    for place in places:
        rig.put(place, 0)
    first, count = 3, (num + 1) << scale
    command = 0x12 | 7 << 48 | num << 12 | scale << 20
    rig.submit((command, first << 12 | 1 << 10 | 3 << 8), SYNC)
    stale = []
    for page in range(pages):
        try:
            rig.physical(page << 12)
            stale.append(page)
        except TransactionAborted:
            rig.events()
    assert stale == [page for page in range(pages) if not first <= page < first + count]


@pytest.mark.parametrize("opcode", [0x12, 0x13, 0x22, 0x23, 0x2A])
@pytest.mark.parametrize("tg", range(4))
@pytest.mark.parametrize("ttl", range(4))
def test_a_granule_without_range_and_level_is_reserved(opcode: int, tg: int, ttl: int) -> None:
    for ranges in (True, False):
        for num, scale in ((0, 0), (1, 0), (0, 1)):
            rig = Stages(everything_but(range_invalidation=ranges))
            rig.submit((opcode | num << 12 | scale << 20, tg << 10 | ttl << 8))
            says_nothing = not num and not scale and (not ttl or (tg, ttl) == (2, 1))
            assert rig.consumed != (ranges and tg != 0 and says_nothing)


def test_without_ril_its_fields_are_not_looked_at() -> None:
    rig = Stages(everything_but(range_invalidation=False))
    assert rig.read(hw.IDR3) >> 10 & 1 == 0
    table = Table(rig, 12, 48)
    rig.stage_1_only(table)
    places = [table.map(page << 12, OUT | LEAF) for page in range(4)]
    rig.go(0, 0x4000)
    for place in places:
        rig.put(place, 0)
    rig.submit((0x12 | 7 << 48 | 31 << 12, 0x1000 | 3 << 10 | 1 << 8), SYNC)
    assert hw.number(rig.fault(0x1000)) == 0x10
    assert rig.physical(0x2000) == OUT


def test_a_range_ends_where_the_half_of_the_address_space_does() -> None:
    rig = Stages()
    rig.put(rig.cd_address, hw.CD_PLAIN, rig.low, rig.high)
    rig.ste(hw.STE_S1 | rig.cd_address)
    high = hw.word(-(1 << 48))
    places = [rig.map(address, 0xA000 | LEAF) for address in (0x1000, high | 0x1000)]
    for address in (0x1000, high | 0x1000):
        rig.physical(address)
    for place in places:
        rig.put(place, 0)
    rig.submit((0x12 | 7 << 48 | 31 << 12 | 31 << 20, 0x1000 | 1 << 10), SYNC)
    assert hw.number(rig.fault(0x1000)) == 0x10
    assert rig.physical(high | 0x1000) == 0xA000
    rig.submit((0x12 | 7 << 48 | 31 << 12 | 31 << 20, high | 1 << 10), SYNC)
    assert hw.number(rig.fault(high | 0x1000)) == 0x10


def test_huge_ranges_take_no_time() -> None:
    rig = Stages(ram=32 << 20)
    table = Table(rig, 12, 48)
    rig.stage_1_only(table)
    for region in range(64):
        table.map(region << 30, OUT | LEAF)
        rig.physical(region << 30)
    start = time.perf_counter()
    for _ in range(8):
        commands = [(0x12 | 8 << 48 | 31 << 12 | scale << 20, 1 << 10) for scale in range(0, 31, 2)]
        rig.submit(*commands, SYNC)
    assert rig.consumed
    assert time.perf_counter() - start < 1
    assert len(rig.smmu.tlb) == 64
    rig.submit((0x12 | 7 << 48 | 31 << 12 | 31 << 20, 1 << 10), SYNC)
    assert len(rig.smmu.tlb) == 0


@pytest.mark.parametrize(("name", "bits"), [("vmid_bits", 8), ("vmid_bits", 16), ("asid_bits", 16)])
def test_all_bits_of_a_tag_tell_apart(name: str, bits: int) -> None:
    rig = Stages(everything_but(**{name: bits}))
    first, second = Table(rig, 12, 39), Table(rig, 12, 40)
    places = [first.map(0x1000, OUT | LEAF), second.map(0x1000, OUT | S2_LEAF)]
    tags = [1, 1 << bits - 1 | 1, 1 << bits - 1]
    for tag in tags:
        if name == "vmid_bits":
            rig.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_S2, 0, *rig.stage_2_words(second, vmid=tag))
        else:
            rig.put(rig.cd_address, rig.cd_word(first) & ~(0xFFFF << 48) | tag << 48, first.pointer)
            rig.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_S1 | rig.cd_address)
        rig.submit((0x04, 31))
        assert rig.physical(0x1000) == OUT
    assert len(rig.smmu.tlb) == 3
    for place in places:
        rig.put(place, 0)
    command = 0x28 | tags[0] << 32 if name == "vmid_bits" else 0x11 | tags[0] << 48
    rig.submit((command, 0), SYNC)
    assert len(rig.smmu.tlb) == 2
    assert rig.physical(0x1000) == OUT
