"""The page table builder against plain memory. The expected descriptors are spelled out from DDI 0487, D8.3."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viommu.driver.arena import Arena
from viommu.driver.errors import MappingError
from viommu.driver.page_tables import Access, Mapping, PageTable

RAM = 0x4000_0000
PAGE, MEGA2, GIGA = 0x1000, 0x20_0000, 0x4000_0000
# nG, AF, inner shareable, AP[1], page; UXN and PXN above.
PAGE_RW = 0x0060_0000_0000_0F43
BLOCK_RW = 0x0060_0000_0000_0F41


class Ram:
    """Memory from RAM up, and an allocator over it."""

    def __init__(self, size: int = 4 << 20) -> None:
        self.words = memoryview(bytearray(size)).cast("Q")
        self.arena = Arena([(RAM, self.words.cast("B"))])

    def load(self, address: int) -> int:
        assert address % 8 == 0
        return self.words[(address - RAM) // 8]


@pytest.fixture
def ram() -> Ram:
    return Ram()


def walk(ram: Ram, root: int, bits: int, iova: int) -> tuple[int, int] | None:
    """A walker of its own: physical address and attribute bits, or None."""
    level, shift = {
        range(40, 49): (0, 39),
        range(31, 40): (1, 30),
        range(25, 31): (2, 21),
    }[next(r for r in (range(40, 49), range(31, 40), range(25, 31)) if bits in r)]
    table, index_bits = root, bits - shift
    while True:
        descriptor = ram.load(table + 8 * (iova >> shift & (1 << index_bits) - 1))
        if not descriptor & 1:
            return None
        output = descriptor & 0x0000_FFFF_FFFF_F000
        is_table_or_page = bool(descriptor & 2)
        if level == 3 or not is_table_or_page:
            assert is_table_or_page == (level == 3)
            assert level > 0
            assert output % (1 << shift) == 0
            return output | iova & (1 << shift) - 1, descriptor & ~0x0000_FFFF_FFFF_F003
        table, level, shift, index_bits = output, level + 1, shift - 9, 9


def test_a_page_is_four_levels_down_and_each_descriptor_is_exact(ram: Ram) -> None:
    table = PageTable(ram.arena)
    iova = 0x0123_4567_8000
    table.map(iova, 0x8765_4000, PAGE)
    address = table.root
    for shift in (39, 30, 21):
        descriptor = ram.load(address + 8 * (iova >> shift & 511))
        assert descriptor & 0xFFFF_0000_0000_0FFF == 3
        address = descriptor & ~0xFFF
    assert ram.load(address + 8 * (iova >> 12 & 511)) == 0x8765_4000 | PAGE_RW


@pytest.mark.parametrize(
    ("access", "expected"),
    [
        (Access(), 0x0060_0000_0000_0F43),
        (Access(write=False), 0x0060_0000_0000_0FC3),
        (Access(privileged=True), 0x0060_0000_0000_0F03),
        (Access(write=False, privileged=True), 0x0060_0000_0000_0F83),
        (Access(execute=True), 0x0000_0000_0000_0F43),
        (Access(is_global=True), 0x0060_0000_0000_0743),
        (Access(accessed=False), 0x0060_0000_0000_0B43),
    ],
)
def test_access_becomes_descriptor_bits(access: Access, expected: int) -> None:
    assert access.attributes(3) == expected
    assert access.attributes(2) == expected & ~2
    assert access.attributes(1) == expected & ~2


@pytest.mark.parametrize(
    ("bits", "start_level", "root_size"),
    [
        (48, 0, 4096),
        (41, 0, 64),
        (40, 0, 64),  # 2 entries; a table takes 64 bytes at least
        (39, 1, 4096),
        (36, 1, 512),
        (31, 1, 64),
        (30, 2, 4096),
        (29, 2, 2048),
        (25, 2, 128),
    ],
)
@pytest.mark.parametrize("upper", [False, True])
def test_the_size_chooses_the_start_level_and_the_root(
    ram: Ram, bits: int, start_level: int, root_size: int, upper: bool
) -> None:
    before = ram.arena.free_bytes
    table = PageTable(ram.arena, input_bits=bits, upper=upper)
    assert before - ram.arena.free_bytes == root_size
    assert table.root % root_size == 0
    assert table.start_level == start_level
    assert table.size_field == 64 - bits
    first = (1 << 64) - (1 << bits) if upper else 0
    assert table.first == first
    for iova in (first, first + (1 << bits) - PAGE):
        table.map(iova, 0x1_2345_6000, PAGE)
        assert walk(ram, table.root, bits, iova) == (0x1_2345_6000, PAGE_RW & ~3)
    for iova in ((first - PAGE) % (1 << 64), (first + (1 << bits)) % (1 << 64)):
        with pytest.raises(MappingError, match=f"outside {bits} bits"):
            table.map(iova, 0, PAGE)


@pytest.mark.parametrize("bits", [24, 49])
def test_a_size_that_does_not_exist_is_refused(ram: Ram, bits: int) -> None:
    with pytest.raises(MappingError, match="25 to 48"):
        PageTable(ram.arena, input_bits=bits)


def test_blocks_are_used_where_both_addresses_are_aligned(ram: Ram) -> None:
    table = PageTable(ram.arena)
    iova, address = 2 * GIGA - MEGA2 - PAGE, 4 * GIGA - MEGA2 - PAGE
    table.map(iova, address, PAGE + MEGA2 + GIGA + 2 * MEGA2 + PAGE)
    assert [mapping.size for mapping in table.mappings()] == [PAGE, MEGA2, GIGA, MEGA2, MEGA2, PAGE]
    table = PageTable(ram.arena)
    table.map(0, MEGA2 + PAGE, 2 * MEGA2)
    assert {mapping.size for mapping in table.mappings()} == {PAGE}
    assert len(table.mappings()) == 1024


def test_a_block_descriptor_is_exact(ram: Ram) -> None:
    table = PageTable(ram.arena, input_bits=30)
    table.map(3 * MEGA2, 5 * MEGA2, MEGA2)
    assert ram.load(table.root + 3 * 8) == 5 * MEGA2 | BLOCK_RW
    table = PageTable(ram.arena, input_bits=39)
    table.map(7 * GIGA, 9 * GIGA, GIGA)
    assert ram.load(table.root + 7 * 8) == 9 * GIGA | BLOCK_RW


def test_pages_can_be_forced(ram: Ram) -> None:
    table = PageTable(ram.arena)
    table.map(MEGA2, MEGA2, MEGA2, pages_only=True)
    assert table.mappings() == [
        Mapping(MEGA2 + n * PAGE, MEGA2 + n * PAGE, PAGE) for n in range(512)
    ]


def test_scattered_pages_keep_their_order_across_tables(ram: Ram) -> None:
    table = PageTable(ram.arena)
    frames = [0x9000_0000 + PAGE * (n * 7919 % 2048) for n in range(1500)]
    iova = 3 * MEGA2 - 5 * PAGE
    table.map_pages(iova, frames)
    for n, frame in enumerate(frames):
        assert walk(ram, table.root, 48, iova + n * PAGE) == (frame, PAGE_RW & ~3)
    table.map_pages(0, [])


def test_what_cannot_be_mapped_changes_nothing(ram: Ram) -> None:
    table = PageTable(ram.arena, output_bits=40)
    table.map(8 * PAGE, RAM, PAGE)
    before = bytes(ram.words)
    for iova, address, size, why in (
        (0, RAM, 9 * PAGE, "mapped already"),
        (8 * PAGE, RAM, PAGE, "mapped already"),
        (0, RAM, PAGE + 1, "whole pages"),
        (1, RAM, PAGE, "whole pages"),
        (0, RAM, 0, "whole pages"),
        (0, RAM, -PAGE, "whole pages"),
        (0, RAM + 8, PAGE, "output address"),
        (0, (1 << 40) - PAGE, 2 * PAGE, "past 40 bits"),
        (1 << 48, RAM, PAGE, "outside 48 bits"),
        (-PAGE, RAM, PAGE, "outside 48 bits"),
    ):
        with pytest.raises(MappingError, match=why):
            table.map(iova, address, size)
    with pytest.raises(MappingError, match="output address"):
        table.map_pages(0, [RAM, RAM + 0x200])
    with pytest.raises(MappingError, match="past 40 bits"):
        table.map_pages(0, [RAM, 1 << 40])
    with pytest.raises(MappingError, match="mapped already"):
        table.map_pages(7 * PAGE, [RAM, RAM])
    assert bytes(ram.words) == before


def test_unmapping_says_what_went_and_refuses_to_split_a_block(ram: Ram) -> None:
    table = PageTable(ram.arena)
    table.map(0, 0, MEGA2)
    table.map(MEGA2, 0x1000_0000, 3 * PAGE)
    for iova, size in ((PAGE, MEGA2), (0, PAGE), (MEGA2 - PAGE, 2 * PAGE)):
        with pytest.raises(MappingError, match=r"splits the block of 0x200000 at 0x0"):
            table.unmap(iova, size)
    assert table.unmap(MEGA2 + PAGE, PAGE) == [Mapping(MEGA2 + PAGE, 0x1000_1000, PAGE)]
    assert table.unmap(0, 2 * MEGA2) == [
        Mapping(0, 0, MEGA2),
        Mapping(MEGA2, 0x1000_0000, PAGE),
        Mapping(MEGA2 + 2 * PAGE, 0x1000_2000, PAGE),
    ]
    assert table.unmap(0, 2 * MEGA2) == []
    assert walk(ram, table.root, 48, 0) is None


def test_tables_stay_allocated_until_the_invalidation_is_done(ram: Ram) -> None:
    table = PageTable(ram.arena)
    empty = ram.arena.free_bytes
    table.map(0x1234_5000, RAM, PAGE)
    table.map(0x1234_6000, RAM, PAGE)
    mapped = ram.arena.free_bytes
    assert empty - mapped == 3 * PAGE
    table.unmap(0x1234_5000, PAGE)
    seen = [table.has_retired_tables]
    table.unmap(0x1234_6000, PAGE)
    seen.append(table.has_retired_tables)
    assert ram.load(table.root) == 0  # unlinked at once
    assert ram.arena.free_bytes == mapped  # but a walk may still be in the old tables
    table.release()
    assert ram.arena.free_bytes == empty
    assert [*seen, table.has_retired_tables] == [False, True, False]


def test_close_gives_everything_back(ram: Ram) -> None:
    before = ram.arena.free_bytes
    table = PageTable(ram.arena)
    for iova in (0, GIGA, 512 * GIGA, 513 * GIGA + MEGA2):
        table.map(iova, RAM, PAGE)
    table.unmap(GIGA, PAGE)
    table.close()
    assert ram.arena.free_bytes == before


def test_translate_is_what_the_hardware_would_find(ram: Ram) -> None:
    table = PageTable(ram.arena)
    table.map(MEGA2, 2 * MEGA2, MEGA2)
    table.map(0x5000, RAM, PAGE)
    assert table.translate(MEGA2 + 0x1_2345) == 2 * MEGA2 + 0x1_2345
    assert table.translate(0x5FFF) == RAM + 0xFFF
    assert table.translate(0x6000) is None


# Random maps and unmaps against a dict of pages.

BITS = st.sampled_from([25, 30, 31, 36, 39, 40, 48])
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["map", "pages", "scattered", "unmap"]),
        st.integers(0, 0x1FFF),  # first page in the window
        st.integers(1, 1100),  # pages
        st.integers(0, 3).map(lambda n: (0, 1, 512, 0x300)[n]),  # misalignment of the output
        st.booleans(),
    ),
    max_size=12,
)


def reference_blocks(pages: dict[int, tuple[int, int, int]], iova: int, size: int) -> bool:
    """Whether a block (block number, first, end) is cut by the range."""
    for page in (iova // PAGE, (iova + size) // PAGE - 1):
        if page in pages:
            _, first, end = pages[page]
            if first < iova // PAGE or end > (iova + size) // PAGE:
                return True
    return False


def split(
    iova: int, address: int, size: int, pages_only: bool, top: int
) -> Iterator[tuple[int, int]]:
    """The blocks that a mapping should be made of, in pages."""
    page, frame, end = iova // PAGE, address // PAGE, (iova + size) // PAGE
    while page < end:
        step = next(
            s
            for s in (1 << 18, 1 << 9, 1)
            if s == 1
            or (not pages_only and s <= top and not (page | frame) % s and page + s <= end)
        )
        yield page, step
        page, frame = page + step, frame + step


@settings(max_examples=150, deadline=None)
@given(bits=BITS, upper=st.booleans(), operations=OPERATIONS, data=st.data())
def test_any_sequence_of_maps_and_unmaps(
    bits: int,
    upper: bool,
    operations: list[tuple[str, int, int, int, bool]],
    data: st.DataObject,
) -> None:
    ram = Ram(1 << 20)
    empty = ram.arena.free_bytes
    table = PageTable(ram.arena, input_bits=bits, upper=upper)
    # At either end of the input range, or in the middle of it; always at the beginning of a level 3 table.
    place = data.draw(st.sampled_from([0, 1 << bits - 13, max((1 << bits - 12) - 0x2000, 0)]))
    window = table.first + place * PAGE
    last = table.first + (1 << bits)
    pages: dict[int, tuple[int, int, int]] = {}
    attributes = {False: 0x0060_0000_0000_0F40, True: 0x0060_0000_0000_0FC0}
    for kind, first, count, misalignment, read_only in operations:
        iova, size = window + first * PAGE, count * PAGE
        size = min(size, last - iova)
        if size <= 0:
            continue
        access = Access(write=not read_only)
        address = ((first + misalignment) * PAGE) + GIGA
        number, end = iova // PAGE, (iova + size) // PAGE
        taken = any(page in pages for page in range(number, end))
        if kind == "unmap":
            if reference_blocks(pages, iova, size):
                with pytest.raises(MappingError):
                    table.unmap(iova, size)
                continue
            removed = table.unmap(iova, size)
            gone = [page for page in range(number, end) if page in pages]
            assert [m.iova // PAGE + n for m in removed for n in range(m.size // PAGE)] == gone
            for page in gone:
                del pages[page]
            table.release()
            continue
        frames = [address + PAGE * ((n * 5) % (size // PAGE)) for n in range(size // PAGE)]
        if taken:
            with pytest.raises(MappingError):
                table.map(iova, address, size, access)
            with pytest.raises(MappingError):
                table.map_pages(iova, frames, access)
        elif kind == "scattered":
            table.map_pages(iova, frames, access)
            for n, frame in enumerate(frames):
                pages[number + n] = (frame | attributes[read_only], number + n, number + n + 1)
        else:
            table.map(iova, address, size, access, pages_only=kind == "pages")
            top = 1 << 9 if bits <= 30 else 1 << 18
            for page, step in split(iova, address, size, kind == "pages", top):
                for n in range(step):
                    frame = address + (page + n - number) * PAGE
                    pages[page + n] = (frame | attributes[read_only], page, page + step)

    probe = {page + near for page in pages for near in (-1, 0, 1)} | {window // PAGE}
    for page in probe:
        if not table.first <= page * PAGE < last:
            continue
        found = walk(ram, table.root, bits, page * PAGE)
        expected = pages.get(page)
        assert (found and found[0] | found[1]) == (expected and expected[0])
    runs = [(m.iova // PAGE, (m.iova + m.size) // PAGE) for m in table.mappings()]
    assert runs == sorted({(first, end) for _, first, end in pages.values()})
    table.close()
    assert ram.arena.free_bytes == empty
