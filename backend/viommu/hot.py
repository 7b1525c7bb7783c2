"""The loops over pages that Python alone cannot carry, each in C and in Python.

`fill` and `collect` work on TLB slots. A slot is one 64-bit word: an output address in bits 51:12 and, below them,
flags that only the TLB gives a meaning to; 0 is an empty slot. A run is an address and a length in bytes; runs lie
flat in an `array("Q")`: address, length, address, length, …

The Python versions are the reference: tests hold the C versions against them, and they serve where no compiler was.
"""

from array import array
from importlib import import_module
from typing import Any

try:
    _hot: Any = import_module("viommu._hot")
except ImportError:
    _hot = None

COMPILED = _hot is not None
"""Whether the C versions are in use."""

ADDRESS_MASK = (1 << 52) - 1
_WRONG_LENGTH = (1 << 64) - 1
Words = array  # of type code "Q"


def fill_python(
    descriptors: memoryview,
    slots: "Words[int]",
    first: int,
    count: int,
    mask: int,
    expected: int,
    address_mask: int,
    flags: int,
) -> int:
    """Turn adjacent leaf descriptors into slots, until one differs from `expected` under `mask` or its slot is taken.

    `descriptors` is a view of words; `first` indexes both it and `slots`. Returns how many slots were filled.
    """
    for index in range(first, first + count):
        descriptor = descriptors[index]
        if slots[index] or descriptor & mask != expected:
            return index - first
        slots[index] = descriptor & address_mask | flags
    return count


def collect_python(
    slots: "Words[int]",
    first: int,
    count: int,
    need: int,
    page_shift: int,
    offset: int,
    length: int,
    runs: "Words[int]",
) -> int:
    """Append the runs of adjacent slots to `runs`, merging what is contiguous, until a slot lacks a flag of `need`.

    `offset` is where in the first page the range starts. Returns the number of bytes covered, at most `length`.
    """
    page = 1 << page_shift
    output = ADDRESS_MASK & ~(page - 1)
    done = 0
    end = -1
    for slot in slots[first : first + count]:
        if done >= length or slot & need != need:
            break
        start = (slot & output) + offset
        part = min(page - offset, length - done)
        if start == end:
            runs[-1] += part
        else:
            runs.extend((start, part))
        end = start + part
        done += part
        offset = 0
    return done


def _fill_c(
    descriptors: memoryview,
    slots: "Words[int]",
    first: int,
    count: int,
    mask: int,
    expected: int,
    address_mask: int,
    flags: int,
) -> int:
    ffi: Any = _hot.ffi
    source = ffi.from_buffer("uint64_t[]", descriptors)
    target = ffi.from_buffer("uint64_t[]", slots, require_writable=True)
    return int(
        _hot.lib.vi_fill(source + first, target + first, count, mask, expected, address_mask, flags)
    )


def _collect_c(
    slots: "Words[int]",
    first: int,
    count: int,
    need: int,
    page_shift: int,
    offset: int,
    length: int,
    runs: "Words[int]",
) -> int:
    ffi: Any = _hot.ffi
    scratch = ffi.new("uint64_t[]", 2 * count)
    covered = ffi.new("uint64_t *")
    source = ffi.from_buffer("uint64_t[]", slots)
    found = _hot.lib.vi_collect(
        source + first, count, need, page_shift, offset, length, scratch, covered
    )
    runs.frombytes(ffi.buffer(scratch, found * 16))
    return int(covered[0])


def compare_exchange(words: memoryview, index: int, expected: int, value: int) -> bool:
    """Store `value` at `index` if what is there is `expected`, atomically; whether it was. Needs the C extension."""
    ffi: Any = _hot.ffi
    target = ffi.from_buffer("uint64_t[]", words, require_writable=True)
    return bool(_hot.lib.vi_compare_exchange(target + index, expected, value))


fill = _fill_c if COMPILED else fill_python
collect = _collect_c if COMPILED else collect_python


class RegionTable:
    """The regions of guest memory as C sees them. Holds their buffers until it is dropped."""

    def __init__(self, regions: "list[tuple[int, int, memoryview | None, bool, bool]]") -> None:
        """Take (base, size, view or None, readable, writable) of each region."""
        ffi: Any = _hot.ffi
        self._count = len(regions)
        self._table = ffi.new("vi_region[]", max(1, self._count))
        self._buffers = []
        for entry, (base, size, view, readable, writable) in zip(
            self._table, regions, strict=False
        ):
            entry.base, entry.size = base, size
            if view is not None:
                self._buffers.append(ffi.from_buffer("uint8_t[]", view))
                entry.host = self._buffers[-1]
            entry.access = readable | writable << 1

    def move(self, runs: "Words[int]", buffer: Any, *, to_guest: bool) -> int:
        """Move bytes between `buffer` and the runs, in order. Returns how many moved before a bus error."""
        ffi: Any = _hot.ffi
        source = ffi.from_buffer("uint64_t[]", runs)
        data = ffi.from_buffer("uint8_t[]", buffer, require_writable=not to_guest)
        moved = int(
            _hot.lib.vi_move(
                self._table, self._count, source, len(runs) // 2, data, len(data), to_guest
            )
        )
        if moved == _WRONG_LENGTH:
            raise ValueError("the buffer and the runs differ in length")
        return moved
