"""What a test engine command computes: the order of its transactions, its pattern, and its sum.

Standard library only and without any other module of the package, so that a guest can do the same.
"""

from collections.abc import Callable, Iterator
from functools import cache

PAGE = 0x1000
PIECE = 0x4_0000
"""The longest transaction, bytes."""
ASCENDING = 0
DESCENDING = 0xFFFF_FFFF

_MULTIPLIER, _INCREMENT = 0x5_DEEC_E66D, 0xB
_WORD = 0xFFFF_FFFF_FFFF_FFFF

# Byte i of a run is bits 24:17 of the generator's state after 2i + 1 steps, and those depend on bits 24:0
# of the first state alone. That is seed << 16 | 0x330E, so nine bits of the seed decide: 512 patterns.
_STATE = (1 << 25) - 1
_SEED_BITS = 0x1FF


class Rand48:
    """The engine's random numbers: the 48-bit linear congruential generator, two steps a number."""

    def __init__(self, seed: int) -> None:
        self._state = (seed & 0xFFFF_FFFF) << 16 | 0x330E

    def __call__(self) -> int:
        """The next number, 32 bits: 31 from one state and the topmost from the state after it."""
        number = self._step() >> 17 & 0x7FFF_FFFF
        return number | self._step() & 0x8000_0000

    def _step(self) -> int:
        self._state = self._state * _MULTIPLIER + _INCREMENT & (1 << 48) - 1
        return self._state


@cache
def _lanes() -> tuple[int, int]:
    # The states that become the bytes of a page are linear in the first: state i is a[i] * first + c[i].
    # All a and all c stand side by side in one integer each, 64 bits apart: no product reaches the next.
    factor, addend = _MULTIPLIER & _STATE, _INCREMENT
    factors, addends = bytearray(), bytearray()
    for _ in range(PAGE):
        factors += factor.to_bytes(8, "little")
        addends += addend.to_bytes(8, "little")
        for _ in range(2):
            factor = factor * _MULTIPLIER & _STATE
            addend = addend * _MULTIPLIER + _INCREMENT & _STATE
    return int.from_bytes(factors, "little"), int.from_bytes(addends, "little")


@cache
def page_pattern(seed: int) -> bytes:
    """The first 4096 bytes of the run that starts with `seed`, which is below 512."""
    factors, addends = _lanes()
    first = seed << 16 & _STATE | 0x330E
    states = factors * first + addends >> 17
    return states.to_bytes(8 * PAGE, "little")[::8]


def rand48(seed: int, begin: int, address: int, size: int) -> bytes:
    """The `size` bytes that RAND48 writes at `address` when its range starts at `begin` <= `address`.

    The generator starts anew at `begin` and at each 4 KiB boundary, from `seed` exclusive-or both halves of
    the address there. So whole pages of one 4 GiB get the same bytes: to tell pages apart, fill each with
    a seed of its own.
    """
    parts = []
    end = address + size
    while address < end:
        start = max(begin, address & -PAGE)
        stop = min(end, (address & -PAGE) + PAGE)
        pattern = page_pattern((seed ^ start >> 32 ^ start) & _SEED_BITS)
        parts.append(pattern[address - start : stop - start])
        address = stop
    return b"".join(parts)


def sum64(data: bytes | bytearray | memoryview) -> int:
    """The sum, modulo 2^64, of `data` as little-endian 64-bit words; its length is a multiple of 8."""
    # Pages are added up as one integer each. In `low` every word of a page keeps its lower half only, so
    # it has 32 bits of room; what is left of `total` is the upper halves, which get theirs by the shift.
    # An integer modulo 2^64 - 1 is the sum of its words, when that sum is smaller.
    halves = _low_halves()
    total = low = 0
    for offset in range(0, len(data), PAGE):
        page = int.from_bytes(data[offset : offset + PAGE], "little")
        total += page
        low += page & halves
    high = total - low >> 32
    return low % _WORD + (high % _WORD << 32) & _WORD


@cache
def _low_halves() -> int:
    return int.from_bytes(b"\xff\xff\xff\xff\0\0\0\0" * (PAGE // 8), "little")


def transactions(
    begin: int, end_incl: int, stride: int, seed: int, limit: int = PIECE
) -> Iterator[tuple[int, int]]:
    """Address and size of each transaction over [begin, end_incl], in the order of the engine.

    Seed 0 goes from the lowest address to the highest, 2^32 - 1 from the highest to the lowest; any other
    seeds a `Rand48` that gives one number a transaction: its bit 0 says whether the front (0) or the back
    (1) of what is left comes next.

    With stride 1 a transaction ends at a 4 KiB boundary (going down: starts at one) unless the range ends
    first. It spans 64 pages, or in a random order 1 + bits 6:1 of the number, the page where it starts
    included; never more than `limit` bytes. With a multiple of 8 it is 8 bytes, at
    (begin & ~7) + n * stride as long as its last byte is not above end_incl | 7, and there is only one when
    the stride is greater than 8 and than the range.
    """
    draw = _drawer(seed)
    if stride == 1:
        return _pages(begin, end_incl + 1, limit, draw)
    return _words(begin & ~7, transaction_count(begin, end_incl, stride), stride, draw)


def transaction_count(begin: int, end_incl: int, stride: int) -> int:
    """How many 8-byte transactions a stride that is a multiple of 8 makes of [begin, end_incl]."""
    if stride > max(8, end_incl - begin + 1):
        return 1
    return ((end_incl & ~7) - (begin & ~7)) // stride + 1


def _drawer(seed: int) -> Callable[[], tuple[bool, int]]:
    # Whether to take from the back, and how many pages.
    most = PIECE // PAGE
    if seed in (ASCENDING, DESCENDING):
        constant = seed == DESCENDING, most
        return lambda: constant
    numbers = Rand48(seed)

    def draw() -> tuple[bool, int]:
        number = numbers()
        return bool(number & 1), 1 + (number >> 1) % most

    return draw


def _pages(
    low: int, high: int, limit: int, draw: Callable[[], tuple[bool, int]]
) -> Iterator[tuple[int, int]]:
    while low < high:
        from_back, pages = draw()
        if from_back:
            start = max(low, (high - 1 & -PAGE) - (pages - 1) * PAGE, high - limit)
            yield start, high - start
            high = start
        else:
            stop = min(high, (low & -PAGE) + pages * PAGE, low + limit)
            yield low, stop - low
            low = stop


def _words(
    first: int, count: int, stride: int, draw: Callable[[], tuple[bool, int]]
) -> Iterator[tuple[int, int]]:
    low, high = 0, count
    while low < high:
        if draw()[0]:
            high -= 1
            yield first + high * stride, 8
        else:
            yield first + low * stride, 8
            low += 1
