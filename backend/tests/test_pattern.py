"""The engine's pattern, order and sum against a literal reading of Arm's description, one byte at a time."""

import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viommu.endpoints.pattern import (
    ASCENDING,
    DESCENDING,
    PAGE,
    PIECE,
    Rand48,
    page_pattern,
    rand48,
    sum64,
    transaction_count,
    transactions,
)

seeds = st.integers(0, 0xFFFF_FFFF)
addresses = st.integers(0, (1 << 64) - 1)


class LiteralGenerator:
    """The C routine, with its masks where C's types put them."""

    def __init__(self, seed: int) -> None:
        self.storage = ((seed & 0xFFFF_FFFF) << 16) | 0x330E

    def advance(self) -> int:
        self.storage = (self.storage * 0x0005_DEEC_E66D + 0xB) % (1 << 48)
        return self.storage

    def number(self) -> int:
        low = (self.advance() >> 17) & 0x7FFF_FFFF
        return (low | (self.advance() & 0x8000_0000)) & 0xFFFF_FFFF


def literal_rand48(seed: int, begin: int, end: int) -> bytes:
    data = bytearray()
    generator = LiteralGenerator(0)
    for address in range(begin, end):
        if address % 4096 == 0 or address == begin:
            generator = LiteralGenerator(seed ^ (address >> 32) ^ (address & 0xFFFF_FFFF))
        data.append(generator.number() & 0xFF)
    return bytes(data)


def literal_order(count: int, seed: int) -> list[int]:
    """Which of 0 … count - 1 come when."""
    if seed == 0:
        return list(range(count))
    if seed == 0xFFFF_FFFF:
        return list(reversed(range(count)))
    generator = LiteralGenerator(seed)
    left = list(range(count))
    return [left.pop(-1 if generator.number() & 1 else 0) for _ in range(count)]


@given(seeds)
def test_the_numbers_are_those_of_the_c_routine(seed: int) -> None:
    ours, literal = Rand48(seed), LiteralGenerator(seed)
    assert [ours() for _ in range(50)] == [literal.number() for _ in range(50)]


def test_numbers_worked_out_by_hand() -> None:
    # 0x330E * 0x5DEECE66D + 0xB, modulo 2^48, is 0x2BBB62DC5101, and the state after it 0xBFF993816378.
    numbers = Rand48(0)
    assert numbers() == (0x2BBB_62DC_5101 >> 17 & 0x7FFF_FFFF) | (0xBFF9_9381_6378 & 0x8000_0000)


@pytest.mark.parametrize("seed", [0, 1, 2, 255, 511])
def test_a_whole_page_is_the_literal_one(seed: int) -> None:
    assert page_pattern(seed) == literal_rand48(seed, 0, PAGE)


@settings(deadline=None)
@given(seeds, addresses, st.integers(0, 64), st.integers(1, 300))
def test_any_part_of_a_range_is_the_literal_one(
    seed: int, address: int, before: int, size: int
) -> None:
    # Right before a page boundary, so that the parts cross it.
    begin = max(0, (address & -PAGE) + PAGE - 150)
    literal = literal_rand48(seed, begin, begin + before + size)
    assert rand48(seed, begin, begin + before, size) == literal[before:]


def test_a_range_across_4_gib_takes_the_upper_half_of_the_address() -> None:
    begin = (3 << 32) - 2 * PAGE
    data = rand48(9, begin, begin, 3 * PAGE)
    assert data == literal_rand48(9, begin, begin + 3 * PAGE)
    assert data[:PAGE] == data[PAGE : 2 * PAGE] != data[2 * PAGE :]


@given(st.binary(max_size=200).map(lambda data: data[: len(data) & ~7]), st.integers(0, 3))
def test_the_sum_is_the_sum(data: bytes, pages: int) -> None:
    data = b"\xff" * (pages * PAGE) + data
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    assert sum64(memoryview(data)) == sum(words) % (1 << 64)


@pytest.mark.parametrize("fill", [b"\xff", b"\0", None])
def test_the_sum_of_a_whole_transaction(fill: bytes | None) -> None:
    data = random.Random(3).randbytes(PIECE) if fill is None else fill * PIECE
    assert sum64(data) == sum(memoryview(data).cast("Q")) % (1 << 64)


@settings(deadline=None)
@given(
    begin=st.integers(0, (1 << 64) - (1 << 23)),
    size=st.integers(1, 1 << 22),
    seed=seeds | st.sampled_from([ASCENDING, DESCENDING]),
    limit=st.integers(64, PIECE),
)
def test_transactions_cover_a_range_exactly_once(
    begin: int, size: int, seed: int, limit: int
) -> None:
    limit = max(limit, size >> 8)
    order = list(transactions(begin, begin + size - 1, 1, seed, limit))
    assert all(0 < length <= limit for _, length in order)
    if seed == ASCENDING:
        assert order == sorted(order)
    if seed == DESCENDING:
        assert order == sorted(order, reverse=True)
    position = begin
    for address, length in sorted(order):
        assert address == position
        position += length
    assert position == begin + size


@given(seed=st.integers(1, 0xFFFF_FFFE))
def test_a_seeded_order_is_the_one_that_is_written_down(seed: int) -> None:
    low, high = 0x1234, 0x1234 + (1 << 21)
    generator = LiteralGenerator(seed)
    for address, size in transactions(low, high - 1, 1, seed):
        number = generator.number()
        span = (1 + (number >> 1) % 64) * PAGE
        if number & 1:
            first_page = (high - 1) // PAGE * PAGE
            assert (address, address + size) == (max(low, first_page + PAGE - span), high)
            high = address
        else:
            assert (address, address + size) == (low, min(high, low // PAGE * PAGE + span))
            low = address + size
    assert low == high


@given(
    begin=st.integers(0, 5000),
    length=st.integers(1, 3000),
    stride=st.integers(1, 40).map(lambda n: n * 8),
    seed=seeds | st.sampled_from([ASCENDING, DESCENDING]),
)
def test_a_stride_of_eights_moves_single_words(
    begin: int, length: int, stride: int, seed: int
) -> None:
    end_incl = begin + length - 1
    expected = [
        address
        for address in range(begin & ~7, (end_incl | 7) + 1, stride)
        if address + 7 <= end_incl | 7
    ]
    if stride > max(8, length):
        expected = expected[:1]
    order = literal_order(len(expected), seed)
    assert transaction_count(begin, end_incl, stride) == len(expected)
    assert list(transactions(begin, end_incl, stride, seed)) == [(expected[n], 8) for n in order]


def test_a_stride_longer_than_the_range_makes_one_transaction() -> None:
    # The rule of the last byte alone would give two: 0x10 is within 16 | 7.
    assert list(transactions(7, 16, 16, 0)) == [(0, 8)]
    assert list(transactions(7, 22, 16, 0)) == [(0, 8), (16, 8)]
    assert list(transactions(4, 5, 1 << 63, 9)) == [(0, 8)]


def test_a_range_of_the_whole_space_is_not_counted_through() -> None:
    assert transaction_count(8, (1 << 64) - 1, 1 << 20) == 1 << 44
    assert list(islice(transactions(8, (1 << 64) - 1, 1 << 20, 0), 2)) == [
        (8, 8),
        (8 + (1 << 20), 8),
    ]
