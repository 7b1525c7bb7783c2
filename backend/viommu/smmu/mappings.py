"""Everything that a stage of translation maps, found by reading its tables from end to end."""

from array import array
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from viommu.memory import BusError
from viommu.smmu.context import StreamContext
from viommu.smmu.tlb import OUTPUT

_BELOW_48 = (1 << 48) - 1
_HIGH_ADDRESS = 0xF << 12  # bits 51:48 of a 64 KiB granule's addresses, at bits 15:12


class Mapped(NamedTuple):
    """`size` bytes at physical `address`: what `iova` maps to, or with None a table."""

    iova: int | None
    address: int
    size: int


class Reader(Protocol):
    """Guest memory, or a copy of some of it. Raises `BusError`."""

    def read(self, address: int, size: int) -> bytes: ...


def mapped(memory: Reader, context: StreamContext) -> Iterator[Mapped]:
    """What one stage alone maps, and its tables.

    Nothing of a context with both stages, whose first tables lie at addresses of the second.
    """
    for table, words in _tables(memory, context):
        address, granule, levels, _, start = table
        yield Mapped(None, address, len(words) * 8)
        shift = granule + (granule - 3) * (levels - 1)
        for index, word in enumerate(words):
            if word & 1 and bool(word & 2) == (levels == 1):
                output = _output(word, granule) & -(1 << shift)
                yield Mapped(start + (index << shift), output, 1 << shift)


def tables(memory: Reader, context: StreamContext) -> Iterator[tuple[int, bytes]]:
    """The tables of one stage alone: where each lies, and its content."""
    for table, words in _tables(memory, context):
        yield table.address, words.tobytes()


def _tables(memory: Reader, context: StreamContext) -> "Iterator[tuple[_Table, array[int]]]":
    stage_1, stage_2 = context.stage_1, context.stage_2
    seen: set[int] = set()
    if stage_1 is not None and stage_2 is None:
        for base in (stage_1.low, stage_1.high):
            if base.enabled:
                top = (1 << 64) - (1 << base.input_bits) if base.upper else 0
                levels = -(-(base.input_bits - base.granule) // (base.granule - 3))
                table = _Table(base.address, base.granule, levels, base.input_bits, top)
                yield from _below(memory, table, seen)
    elif stage_2 is not None and stage_1 is None:
        levels = 4 - stage_2.start_level
        table = _Table(stage_2.address, stage_2.granule, levels, stage_2.input_bits, 0)
        yield from _below(memory, table, seen)


class _Table(NamedTuple):
    """A table that resolves `bits` bits of input address from `start` on, with `levels` levels."""

    address: int
    granule: int
    levels: int
    bits: int
    start: int


def _below(memory: Reader, table: _Table, seen: set[int]) -> "Iterator[tuple[_Table, array[int]]]":
    """A table and those that it points at."""
    address, granule, levels, bits, start = table
    if address in seen:
        return  # a guest may let a table point at itself
    seen.add(address)
    shift = granule + (granule - 3) * (levels - 1)
    try:
        words = array("Q", memory.read(address, 8 << bits - shift))
    except BusError:
        return
    yield table, words
    if levels > 1:
        for index, word in enumerate(words):
            if word & 3 == 3:
                place = start + (index << shift)
                below = _Table(_output(word, granule), granule, levels - 1, shift, place)
                yield from _below(memory, below, seen)


def _output(word: int, granule: int) -> int:
    output = word & _BELOW_48 & OUTPUT & -(1 << granule)
    return output | (word & _HIGH_ADDRESS) << 36 if granule == 16 else output
