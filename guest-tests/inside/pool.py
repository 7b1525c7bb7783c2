"""Memory whose physical addresses are known and stay: 2 MiB huge pages, which are never moved nor swapped."""

import mmap
import os
from collections.abc import Iterator

PAGE = 4096
HUGE = 2 << 20
_PAGES_IN_HUGE = HUGE // PAGE
_MAP_HUGETLB = 0x40000
_MAP_HUGE_2MB = 21 << 26
_KERNEL_PAGE = os.sysconf("SC_PAGESIZE")
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
# Whatever its own pages are, the kernel has huge ones of this size; they need not be its default.
_NR_HUGEPAGES = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"


class Region:
    """A whole number of huge pages, contiguous in this process; `bases` are their physical addresses."""

    def __init__(self, view: memoryview, bases: list[int]) -> None:
        self.view, self.bases = view, bases

    def __len__(self) -> int:
        return len(self.view)

    def address(self, offset: int) -> int:
        """The physical address of a byte."""
        return self.bases[offset // HUGE] + offset % HUGE

    def frames(self) -> list[int]:
        """The physical address of each 4 KiB page."""
        return [base + offset for base in self.bases for offset in range(0, HUGE, PAGE)]

    def ranges(self) -> list[tuple[int, memoryview]]:
        """Each huge page as (physical address, bytes)."""
        return [
            (base, self.view[place * HUGE : (place + 1) * HUGE])
            for place, base in enumerate(self.bases)
        ]

    def fill(self, byte: int) -> None:
        """Set every byte."""
        content = bytes([byte]) * HUGE
        for offset in range(0, len(self), HUGE):
            self.view[offset : offset + HUGE] = content


class Scattered:
    """The pages of a region in an order that has nothing to do with that of their addresses.

    Page n of it is page `order[n]` of the region; `frames` are the physical addresses, for `map_pages`.
    """

    def __init__(self, region: Region, count: int | None = None, seed: int = 1) -> None:
        pages = len(region) // PAGE
        # A page's rank is its number times a large odd one: a shuffle without a random number generator.
        ranks = sorted(range(pages), key=lambda page: (page + seed) * 0x9E37_79B1 & 0xFFFF_FFFF)
        self.order = ranks[:count]
        frames = region.frames()
        self.frames = [frames[page] for page in self.order]
        self._view = region.view

    def __len__(self) -> int:
        return len(self.order)

    def page(self, number: int) -> memoryview:
        """The bytes of page `number`."""
        offset = self.order[number] * PAGE
        return self._view[offset : offset + PAGE]

    def pages(self) -> Iterator[bytes]:
        """A copy of each page, in order."""
        view = self._view
        for page in self.order:
            yield bytes(view[page * PAGE : (page + 1) * PAGE])


class Pool:
    """`size` bytes of huge pages, handed out front to back."""

    def __init__(self, size: int) -> None:
        count = size // HUGE
        with open(_NR_HUGEPAGES, "w") as file:  # noqa: PTH123 - pathlib is slow to import
            file.write(str(count))
        with open(_NR_HUGEPAGES) as file:  # noqa: PTH123
            granted = int(file.read())
        if granted < count:
            raise MemoryError(f"the kernel has {granted} of {count} huge pages")
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        flags |= _MAP_HUGETLB | _MAP_HUGE_2MB
        self._view = memoryview(mmap.mmap(-1, size, flags=flags))
        self._bases = _physical(_virtual(), count)
        self._taken = 0

    def take(self, size: int) -> Region:
        """The next `size` bytes, a multiple of 2 MiB."""
        first, count = self._taken, size // HUGE
        if size % HUGE or first + count > len(self._bases):
            raise MemoryError(f"{size:#x} bytes are not in the pool")
        self._taken += count
        return Region(
            self._view[first * HUGE : (first + count) * HUGE], self._bases[first : first + count]
        )


def _virtual() -> int:
    """Where this process has its only anonymous huge pages."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        (line,) = [line for line in maps if "anon_hugepage" in line]
    return int(line.split("-")[0], 16)


def _physical(address: int, count: int) -> list[int]:
    bases = []
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    for place in range(count):
        entry = os.pread(descriptor, 8, (address + place * HUGE) // _KERNEL_PAGE * 8)
        value = int.from_bytes(entry, "little")
        if not value & _PRESENT or not value & _FRAME:
            raise MemoryError("no physical address: is this root?")
        bases.append((value & _FRAME) * _KERNEL_PAGE)
    os.close(descriptor)
    return bases
