"""The C versions of the hot loops against the Python ones, which are the reference."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viommu import hot

MASK64 = (1 << 64) - 1
PAGE = 0xFFF

if not hot.COMPILED:
    pytest.fail(
        "viommu._hot is not built: run `python -m pip install -e .` with a C compiler",
        pytrace=False,
    )

# Few flags and few pages, so that runs, gaps and permission changes all come up.
slots = st.lists(
    st.one_of(
        st.just(0),
        st.builds(
            lambda page, flags: page << 12 | flags,
            st.one_of(st.integers(0, 5), st.integers(0, (1 << 40) - 1)),
            st.sampled_from([1, 3, 7, 0x7F, 0xFFF]),
        ),
        st.integers(0, MASK64),
    ),
    min_size=1,
    max_size=64,
)


@settings(max_examples=1000, deadline=None)
@given(
    slots,
    st.data(),
    st.sampled_from([0, 1, 3, 0x7F]),
    st.sampled_from([12, 14, 16]),
)
def test_collect(values: list[int], data: st.DataObject, need: int, shift: int) -> None:
    first = data.draw(st.integers(0, len(values) - 1))
    count = data.draw(st.integers(0, len(values) - first))
    offset = data.draw(st.integers(0, (1 << shift) - 1))
    length = data.draw(st.integers(0, (count + 1) << shift))
    row = array("Q", values)
    before = data.draw(
        st.lists(st.integers(0, MASK64), max_size=4).filter(lambda x: not len(x) % 2)
    )
    outcomes = []
    for collect in (hot.collect_python, hot._collect_c):
        found = array("Q", before)
        outcomes.append((collect(row, first, count, need, shift, offset, length, found), found))
    assert outcomes[0] == outcomes[1]
    covered, found = outcomes[0]
    assert covered == sum(found[len(before) + 1 :: 2]) <= length
    assert row == array("Q", values)


def test_collect_merges_what_is_adjacent() -> None:
    row = array("Q", [0x5001, 0x6001, 0x9001, 0x7001, 0xA000])
    for collect in (hot.collect_python, hot._collect_c):
        found = array("Q")
        assert collect(row, 0, 5, 1, 12, 0x10, 0x9000, found) == 0x3FF0
        assert found.tolist() == [0x5010, 0x1FF0, 0x9000, 0x1000, 0x7000, 0x1000]
        found = array("Q")
        assert collect(row, 0, 5, 1, 12, 0x10, 0x1800, found) == 0x1800
        assert found.tolist() == [0x5010, 0x1800]
        assert collect(row, 4, 1, 1, 12, 0, 8, found) == 0


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([0, 0x5003, 0x6003, 0x6403, 1 << 63 | 3]), st.integers(0, MASK64)
        ),
        min_size=1,
        max_size=64,
    ),
    st.data(),
    st.sampled_from([0, 3, PAGE, MASK64]),
)
def test_fill(values: list[int], data: st.DataObject, mask: int) -> None:
    first = data.draw(st.integers(0, len(values) - 1))
    count = data.draw(st.integers(0, len(values) - first))
    expected = data.draw(st.sampled_from([v & mask for v in values]))
    taken = data.draw(
        st.lists(st.sampled_from([0, 0, 0, 5]), min_size=len(values), max_size=len(values))
    )
    flags = data.draw(st.integers(0, PAGE))
    descriptors = memoryview(array("Q", values))
    outcomes = []
    for fill in (hot.fill_python, hot._fill_c):
        row = array("Q", taken)
        address_mask = hot.ADDRESS_MASK >> 4 & ~PAGE
        filled = fill(descriptors, row, first, count, mask, expected, address_mask, flags)
        outcomes.append((filled, row))
    assert outcomes[0] == outcomes[1]
    filled, row = outcomes[0]
    assert row[:first].tolist() == taken[:first]
    assert row[first + filled :].tolist() == taken[first + filled :]
    for index in range(first, first + filled):
        assert row[index] == values[index] & 0xFFFF_FFFF_F000 | flags


def test_the_c_versions_are_in_use() -> None:
    assert hot.fill is hot._fill_c
    assert hot.collect is hot._collect_c


def test_a_region_table_holds_its_buffers_only_while_it_lives() -> None:
    data = bytearray(16)
    table = hot.RegionTable([(0, 16, memoryview(data), True, True)])
    with pytest.raises(BufferError):
        data.extend(b"x")
    del table
    data.extend(b"x")


def test_an_empty_region_table_moves_nothing() -> None:
    table = hot.RegionTable([])
    assert table.move(array("Q", (0, 8)), bytearray(8), to_guest=True) == 0
    assert table.move(array("Q"), bytearray(0), to_guest=False) == 0


def test_addresses_at_the_end_of_the_space_do_not_wrap() -> None:
    data = bytearray(16)
    last = (1 << 64) - 8
    table = hot.RegionTable(
        [(0, 8, memoryview(data)[:8], True, True), (last, 8, memoryview(data)[8:], True, True)]
    )
    assert table.move(array("Q", (last, 8)), bytearray(b"12345678"), to_guest=True) == 8
    assert data == bytes(8) + b"12345678"
