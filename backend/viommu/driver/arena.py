"""An allocator over ranges of physical memory that someone else pinned."""

from collections.abc import Iterable

from viommu.driver.access import Buffer
from viommu.driver.errors import OutOfMemory


class Arena:
    """`Memory` cut first-fit out of the ranges it is given, each `(physical address, writable bytes)`."""

    def __init__(self, ranges: Iterable[tuple[int, memoryview]]) -> None:
        self._ranges = sorted(ranges, key=lambda item: item[0])
        # What is free: (first, end) physical addresses, sorted, each within one range.
        self._holes = [(address, address + len(view)) for address, view in self._ranges]
        self._lent: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        return sum(end - first for first, end in self._holes)

    def allocate(self, size: int, alignment: int = 4096) -> Buffer:
        """`size` zeroed bytes at a multiple of `alignment`, or `OutOfMemory`."""
        for position, (first, end) in enumerate(self._holes):
            address = (first + alignment - 1) & -alignment
            if address + size <= end:
                rest = ((first, address), (address + size, end))
                self._holes[position : position + 1] = [hole for hole in rest if hole[0] < hole[1]]
                self._lent[address] = size
                buffer = Buffer(address, self._view(address, size))
                buffer.view[:] = bytes(size)
                return buffer
        raise OutOfMemory(
            f"no {size:#x} bytes aligned to {alignment:#x} left of {self.free_bytes:#x}"
        )

    def free(self, buffer: Buffer) -> None:
        """Take `buffer` back; `ValueError` when it was not lent by this arena."""
        if self._lent.pop(buffer.address, None) != len(buffer):
            raise ValueError(f"not allocated here: {len(buffer):#x} bytes at {buffer.address:#x}")
        edges = {address for address, _ in self._ranges}
        first, end = buffer.address, buffer.address + len(buffer)
        keep = []
        for hole in self._holes:
            # Neighbours become one hole, but never over the edge of two ranges.
            if hole[1] == first and first not in edges:
                first = hole[0]
            elif hole[0] == end and end not in edges:
                end = hole[1]
            else:
                keep.append(hole)
        self._holes = sorted([*keep, (first, end)])

    def _view(self, address: int, size: int) -> memoryview:
        for base, view in self._ranges:
            if base <= address < base + len(view):
                return view[address - base : address - base + size]
        raise AssertionError("a hole lies in a range")
