"""The allocator of the driver's tests and of the guest's scripts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viommu.driver.access import Buffer
from viommu.driver.arena import Arena
from viommu.driver.errors import OutOfMemory

RAM = 0x4000_0000
PAGE = 0x1000


def test_an_arena_that_is_full_says_so() -> None:
    arena = Arena([(RAM, memoryview(bytearray(4 << 20)))])
    with pytest.raises(OutOfMemory, match="0x800000 bytes"):
        arena.allocate(8 << 20, PAGE)


def test_an_arena_never_joins_two_ranges() -> None:
    arena = Arena([(0x2000, memoryview(bytearray(PAGE))), (0x1000, memoryview(bytearray(PAGE)))])
    with pytest.raises(OutOfMemory):
        arena.allocate(2 * PAGE, PAGE)
    buffers = [arena.allocate(PAGE, PAGE) for _ in range(2)]
    assert [buffer.address for buffer in buffers] == [0x1000, 0x2000]
    for buffer in buffers:
        arena.free(buffer)
    with pytest.raises(OutOfMemory):
        arena.allocate(2 * PAGE, PAGE)
    with pytest.raises(ValueError, match="not allocated here"):
        arena.free(buffers[0])


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(3, 9)), max_size=40))
def test_an_arena_lends_no_byte_twice_and_gets_all_back(
    steps: list[tuple[bool, int, int]],
) -> None:
    arena = Arena([(RAM, memoryview(bytearray(2048))), (RAM + 0x1000, memoryview(bytearray(1024)))])
    lent: list[tuple[int, int]] = []
    buffers: list[Buffer] = []
    for give_back, words, alignment in steps:
        if give_back and buffers:
            buffer = buffers.pop(words % len(buffers))
            lent.remove((buffer.address, len(buffer)))
            arena.free(buffer)
            continue
        try:
            buffer = arena.allocate(words * 8, 1 << alignment)
        except OutOfMemory:
            continue
        assert buffer.address % (1 << alignment) == 0
        assert bytes(buffer.view) == bytes(words * 8)
        assert all(a + n <= buffer.address or buffer.address + words * 8 <= a for a, n in lent)
        buffer.view[:] = b"\xff" * (words * 8)
        lent.append((buffer.address, words * 8))
        buffers.append(buffer)
    for buffer in buffers:
        arena.free(buffer)
    assert arena.free_bytes == 3072
    assert arena.allocate(2048, 8).address == RAM
