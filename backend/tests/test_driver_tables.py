"""Stream tables, CD tables, and how live entries change. Expected bits are spelled out from IHI 0070, chapter 5."""

from itertools import pairwise, product

import pytest

from viommu.driver import context, stream_table
from viommu.driver.arena import Arena
from viommu.driver.context import ContextTable, context_descriptor, invalid_descriptor
from viommu.driver.entries import change_entry
from viommu.driver.errors import StreamError
from viommu.driver.page_tables import PageTable
from viommu.driver.stream_table import (
    LinearStreamTable,
    TwoLevelStreamTable,
    abort_entry,
    bypass_entry,
    invalid_entry,
    stage1_entry,
)
from viommu.layouts.bitfields import Layout
from viommu.layouts.tables import S1Default, S1Format

RAM = 0x1_0000_0000
CD_POINTER = 0x000F_EDCB_A987_6540 & 0x000F_FFFF_FFFF_FFC0


class Ram:
    def __init__(self, size: int = 8 << 20) -> None:
        self.words = memoryview(bytearray(size)).cast("Q")
        self.arena = Arena([(RAM, self.words.cast("B"))])

    def load(self, address: int, count: int = 1) -> list[int]:
        first = (address - RAM) // 8
        return list(self.words[first : first + count])


@pytest.fixture
def ram() -> Ram:
    return Ram()


def test_entries_are_bit_exact(ram: Ram) -> None:
    assert invalid_entry().qwords() == [0] * 8
    assert abort_entry().qwords() == [1] + [0] * 7
    assert bypass_entry().qwords() == [0x9, 1 << 44] + [0] * 6
    one = ContextTable(ram.arena)
    assert stage1_entry(one, stall_disable=False).qwords() == [one.base | 0xB, 0xD4] + [0] * 6
    assert stage1_entry(one, stall_disable=True).qwords()[1] == 0xD4 | 1 << 27
    many = ContextTable(ram.arena, 12, S1Format.TWO_LEVEL_64K)
    entry = stage1_entry(many, default=S1Default.BYPASS, stall_disable=False)
    assert entry.qwords()[:2] == [many.base | 12 << 59 | 2 << 4 | 0xB, 0xD5]


def test_context_descriptors_are_bit_exact(ram: Ram) -> None:
    lower = PageTable(ram.arena)
    descriptor = context_descriptor(0x1234, 48, lower)
    # ASID, ASET A R, AA64, IPS=5, V, EPD1, SH0=3 OR0=1 IR0=1 TG0=0, T0SZ=16
    assert descriptor.qwords() == [0x1234_E205_C000_3510, lower.root, 0, 0xFF, 0, 0, 0, 0]
    upper = PageTable(ram.arena, input_bits=39, upper=True)
    # T1SZ=25, TG1=2, IR1 OR1 SH1 in bits 31:16; EPD0 in bit 14.
    assert context_descriptor(1, 40, None, upper).qwords() == [
        0x0001_E202_B599_4000,
        0,
        upper.root,
        0xFF,
        *[0] * 4,
    ]
    assert context_descriptor(1, 32, lower, upper).qwords()[:3] == [
        0x0001_E200_B599_3510,
        lower.root,
        upper.root,
    ]


def test_a_linear_table_aborts_everything_at_first(ram: Ram) -> None:
    table = LinearStreamTable(ram.arena, 6)
    base = table.base.value & ~(1 << 62)
    assert table.base.value == 1 << 62 | base
    assert base % (64 << 6) == 0
    assert table.configuration.value == 6
    assert ram.load(base, 64 * 8) == ([1] + [0] * 7) * 64
    table.entry(63)[0] = 0xABC
    assert ram.load(base + 63 * 64) == [0xABC]
    for outside in (64, -1):
        with pytest.raises(StreamError, match=r"table of 2\^6"):
            table.entry(outside)


@pytest.mark.parametrize("split", [6, 8, 10])
def test_a_two_level_table_is_made_as_needed(ram: Ram, split: int) -> None:
    table = TwoLevelStreamTable(ram.arena, 16, split)
    base = table.base.value & ~(1 << 62)
    level1 = 8 << 16 - split
    assert base % level1 == 0
    assert table.configuration.value == 1 << 16 | split << 6 | 16
    assert not any(ram.load(base, level1 // 8))
    stream_id = 5 << split | 3
    assert not table.has(stream_id)
    words = table.entry(stream_id)
    (descriptor,) = ram.load(base + 5 * 8)
    leaf = descriptor & ~0x3F
    assert descriptor == leaf | split + 1
    assert leaf % (64 << split) == 0
    assert ram.load(leaf, 8 << split) == ([1] + [0] * 7) * (1 << split)
    words[7] = 0xDEF
    assert ram.load(leaf + 3 * 64 + 56) == [0xDEF]
    assert table.has(stream_id ^ 1)
    assert table.entry(stream_id)[7] == 0xDEF
    assert [n for n in range(1 << 16 - split) if ram.load(base + n * 8) != [0]] == [5]
    with pytest.raises(StreamError, match=r"table of 2\^16"):
        table.entry(1 << 16)


def test_a_two_level_table_smaller_than_its_split(ram: Ram) -> None:
    table = TwoLevelStreamTable(ram.arena, 4, 8)
    table.entry(15)
    with pytest.raises(StreamError):
        table.entry(16)
    with pytest.raises(StreamError, match="SPLIT 7"):
        TwoLevelStreamTable(ram.arena, 16, 7)


def test_context_tables(ram: Ram) -> None:
    linear = ContextTable(ram.arena, 5)
    assert linear.base % (64 << 5) == 0
    linear.entry(31)[0] = 0x77
    assert ram.load(linear.base + 31 * 64) == [0x77]
    with pytest.raises(StreamError, match=r"table of 2\^5"):
        linear.entry(32)
    for layout, split in ((S1Format.TWO_LEVEL_4K, 6), (S1Format.TWO_LEVEL_64K, 10)):
        table = ContextTable(ram.arena, 14, layout)
        substream_id = 3 << split | 9
        assert not any(ram.load(table.base, 1 << 14 - split))
        assert not table.has(substream_id)
        table.entry(substream_id)[1] = 0x99
        (descriptor,) = ram.load(table.base + 3 * 8)
        assert descriptor & 0xFFF == 1
        assert (descriptor - 1) % (64 << split) == 0
        assert ram.load(descriptor - 1 + 9 * 64 + 8) == [0x99]
        assert table.has(substream_id)


def test_tables_give_their_memory_back(ram: Ram) -> None:
    before = ram.arena.free_bytes
    linear, split = LinearStreamTable(ram.arena, 6), TwoLevelStreamTable(ram.arena, 16, 8)
    split.entry(0)
    split.entry(0x1234)
    contexts = ContextTable(ram.arena, 10, S1Format.TWO_LEVEL_4K)
    contexts.entry(0)
    contexts.entry(1023)
    for table in (linear, split, contexts, ContextTable(ram.arena)):
        table.close()
    assert ram.arena.free_bytes == before


# Changing entries: how many times the SMMU must be told, and what it may see meanwhile.


def entries(ram: Ram) -> dict[str, Layout]:
    one, many = ContextTable(ram.arena), ContextTable(ram.arena, 6)
    return {
        "invalid": invalid_entry(),
        "abort": abort_entry(),
        "bypass": bypass_entry(),
        "stage 1": stage1_entry(one, stall_disable=True),
        "substreams": stage1_entry(many, stall_disable=True),
        "substreams or bypass": stage1_entry(many, default=S1Default.BYPASS, stall_disable=True),
        "substreams only": stage1_entry(many, default=S1Default.TERMINATE, stall_disable=True),
    }


def descriptors(ram: Ram) -> dict[str, Layout]:
    one, two = PageTable(ram.arena), PageTable(ram.arena, input_bits=39)
    upper = PageTable(ram.arena, upper=True)
    return {
        "invalid": invalid_descriptor(),
        "first": context_descriptor(1, 48, one),
        "other ASID": context_descriptor(2, 48, one),
        "other table": context_descriptor(1, 48, two),
        "both halves": context_descriptor(1, 48, one, upper),
        "upper": context_descriptor(1, 48, None, upper),
    }


def changes(old: Layout, new: Layout, used: object) -> list[list[int]]:
    """The words as they are at first and at each time the SMMU is told."""
    words = memoryview(bytearray(old.to_bytes())).cast("Q")
    told = [list(words)]
    change_entry(words, new, used, lambda: told.append(list(words)))  # type: ignore[arg-type]
    assert list(words) == new.qwords()
    return told


@pytest.mark.parametrize(
    ("old", "new", "syncs"),
    [
        # What the kernel's own unit tests expect of its driver.
        ("bypass", "abort", 2),
        ("abort", "bypass", 2),
        ("stage 1", "abort", 2),
        ("abort", "stage 1", 2),
        ("stage 1", "bypass", 3),
        ("bypass", "stage 1", 3),
        ("substreams", "substreams only", 1),
        ("substreams only", "substreams", 1),
        ("stage 1", "stage 1", 0),
        ("stage 1", "invalid", 2),
    ],
)
def test_how_often_the_smmu_is_told_of_an_ste(ram: Ram, old: str, new: str, syncs: int) -> None:
    found = entries(ram)
    assert len(changes(found[old], found[new], stream_table.used_bits)) - 1 == syncs


@pytest.mark.parametrize(
    ("old", "new", "syncs"),
    [
        ("first", "invalid", 2),
        ("invalid", "first", 2),
        ("first", "other ASID", 1),
        ("first", "other table", 3),
    ],
)
def test_how_often_the_smmu_is_told_of_a_cd(ram: Ram, old: str, new: str, syncs: int) -> None:
    found = descriptors(ram)
    assert len(changes(found[old], found[new], context.used_bits)) - 1 == syncs


@pytest.mark.parametrize("kind", ["ste", "cd"])
def test_no_reader_ever_sees_a_mixture(ram: Ram, kind: str) -> None:
    """The SMMU reads each word before or after any step, and sees the old entry, the new one, or an invalid one."""
    found = entries(ram) if kind == "ste" else descriptors(ram)
    used = stream_table.used_bits if kind == "ste" else context.used_bits

    def meaning(words: tuple[int, ...]) -> int:
        value = sum(word << 64 * place for place, word in enumerate(words))
        return value & used(value)

    for old, new in product(found.values(), repeat=2):
        allowed = {meaning(tuple(old.qwords())), meaning(tuple(new.qwords())), 0}
        told = changes(old, new, used)
        for before, after in pairwise(told):
            for words in product(*({b, a} for b, a in zip(before, after, strict=True))):
                assert meaning(words) in allowed
