"""Guest physical memory as a device sees it: the regions that are mapped for DMA, and bus errors everywhere else.

A region without a view is known and not accessible (a ROM, a BAR of another device): touching it is a bus error too.
Values are little-endian, as the host must be.
"""

from array import array
from bisect import bisect_right
from typing import TypeAlias

from viommu import hot

Buffer: TypeAlias = bytes | bytearray | memoryview


class BusError(Exception):
    """The access at `address` of `size` bytes reached no accessible memory; `done` bytes had moved before."""

    def __init__(self, address: int, size: int, done: int = 0) -> None:
        super().__init__(f"bus error at {address:#x}, {size} bytes")
        self.address, self.size, self.done = address, size, done


class _Region:
    """One mapped range. Its casts are our own views: they must go before the mapping does."""

    __slots__ = ("base", "bytes", "dwords", "end", "qwords", "readable", "size", "writable")

    def __init__(
        self, base: int, size: int, view: memoryview | None, readable: bool, writable: bool
    ) -> None:
        self.base, self.size, self.end = base, size, base + size
        self.readable = readable and view is not None
        self.writable = writable and view is not None and not view.readonly
        self.bytes = None if view is None else view.cast("B")
        whole = None if view is None or size % 8 or base % 8 else view
        self.qwords = None if whole is None else whole.cast("B").cast("Q")
        self.dwords = None if whole is None else whole.cast("B").cast("I")

    def release(self) -> None:
        for view in (self.qwords, self.dwords, self.bytes):
            if view is not None:
                view.release()


_NOWHERE = _Region(0, 0, None, False, False)


class GuestMemory:
    """The regions of one device's DMA address space, by physical address in bytes."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._bases: list[int] = []
        self._last = _NOWHERE
        self._table: hot.RegionTable | None = None
        self.guests = 0
        """How many clients have left it: what was meant for one is not for the next."""

    def add_region(
        self,
        base: int,
        size: int,
        view: memoryview | None,
        readable: bool = True,
        writable: bool = True,
    ) -> None:
        """Map `size` bytes at `base`; without a view they are known and not accessible.

        Raises `ValueError` when the range overlaps another or the view is not `size` bytes.
        """
        if size <= 0 or (view is not None and view.nbytes != size):
            raise ValueError(f"region at {base:#x}: {size} bytes do not fit its view")
        place = bisect_right(self._bases, base)
        neighbours = self._regions[max(0, place - 1) : place + 1]
        if any(base < other.end and other.base < base + size for other in neighbours):
            raise ValueError(f"region at {base:#x}, {size:#x} bytes, overlaps another")
        self._regions.insert(place, _Region(base, size, view, readable, writable))
        self._bases.insert(place, base)
        self._table = None

    def remove_region(self, base: int, size: int) -> None:
        """Unmap the region that was added with `base` and `size`, and let go of its view."""
        place = bisect_right(self._bases, base) - 1
        if place < 0 or self._regions[place].base != base or self._regions[place].size != size:
            raise ValueError(f"no region at {base:#x} of {size:#x} bytes")
        self._table = None
        self._last = _NOWHERE
        del self._bases[place]
        self._regions.pop(place).release()

    def clear(self) -> None:
        """Unmap everything."""
        while self._regions:
            self.remove_region(self._regions[-1].base, self._regions[-1].size)

    @property
    def regions(self) -> list[tuple[int, int, bool]]:
        """Base, size in bytes, and whether it is accessible, of each region in order of address."""
        return [(r.base, r.size, r.readable) for r in self._regions]

    def _find(self, address: int, size: int) -> _Region:
        region = self._last
        if region.base <= address < region.end:
            return region
        place = bisect_right(self._bases, address) - 1
        if place >= 0 and address < self._regions[place].end:
            self._last = self._regions[place]
            return self._last
        raise BusError(address, size)

    def view(self, address: int, size: int) -> memoryview:
        """A view of `size` readable bytes in one region. Release it before control goes back to the event loop."""
        region = self._find(address, size)
        if region.bytes is None or not region.readable or address + size > region.end:
            raise BusError(address, size)
        return region.bytes[address - region.base : address - region.base + size]

    def read(self, address: int, size: int) -> bytes:
        """Copy `size` bytes out of guest memory."""
        region = self._find(address, size)
        if region.bytes is not None and region.readable and address + size <= region.end:
            return bytes(region.bytes[address - region.base : address - region.base + size])
        data = bytearray(size)
        self.gather(array("Q", (address, size)), data)
        return bytes(data)

    def write(self, address: int, data: Buffer) -> None:
        """Copy `data` into guest memory. Where a bus error comes up, the bytes before it have been written."""
        self.scatter(array("Q", (address, len(data))), data)

    def load_u64(self, address: int) -> int:
        """Load 8 bytes, in one access when `address` is a multiple of 8."""
        region = self._find(address, 8)
        if region.qwords is not None and region.readable and not address & 7:
            return region.qwords[(address - region.base) >> 3]
        return int.from_bytes(self.read(address, 8), "little")

    def load_u32(self, address: int) -> int:
        """Load 4 bytes, in one access when `address` is a multiple of 4."""
        region = self._find(address, 4)
        if region.dwords is not None and region.readable and not address & 3:
            return region.dwords[(address - region.base) >> 2]
        return int.from_bytes(self.read(address, 4), "little")

    def store_u64(self, address: int, value: int) -> None:
        """Store 8 bytes, in one access when `address` is a multiple of 8."""
        region = self._find(address, 8)
        if region.qwords is not None and region.writable and not address & 7:
            region.qwords[(address - region.base) >> 3] = value
        else:
            self.write(address, value.to_bytes(8, "little"))

    def compare_exchange_u64(self, address: int, expected: int, value: int) -> bool:
        """Store 8 aligned bytes if they are `expected`; whether they were. Atomic where the C extension is built."""
        region = self._find(address, 8)
        if region.qwords is None or not (region.readable and region.writable) or address & 7:
            raise BusError(address, 8)
        place = (address - region.base) >> 3
        if hot.COMPILED:
            return hot.compare_exchange(region.qwords, place, expected, value)
        if region.qwords[place] != expected:
            return False
        region.qwords[place] = value
        return True

    def store_u32(self, address: int, value: int) -> None:
        """Store 4 bytes, in one access when `address` is a multiple of 4."""
        region = self._find(address, 4)
        if region.dwords is not None and region.writable and not address & 3:
            region.dwords[(address - region.base) >> 2] = value
        else:
            self.write(address, value.to_bytes(4, "little"))

    def gather(self, runs: "array[int]", buffer: bytearray | memoryview) -> None:
        """Read the runs (address, length, …), in order, into `buffer` of as many bytes.

        Raises `BusError` with what was `done`.
        """
        self._move(runs, buffer, to_guest=False)

    def scatter(self, runs: "array[int]", buffer: Buffer) -> None:
        """Write `buffer` to the runs (address, length, …), in order, of as many bytes.

        Raises `BusError` with what was `done`.
        """
        self._move(runs, buffer, to_guest=True)

    def _move(self, runs: "array[int]", buffer: Buffer, *, to_guest: bool) -> None:
        if len(runs) == 2 and self._move_one(runs[0], runs[1], buffer, to_guest):
            return
        if len(runs) == 2 or not hot.COMPILED:
            done = self._move_python(runs, buffer, to_guest)
        else:
            if self._table is None:
                self._table = hot.RegionTable(
                    [(r.base, r.size, r.bytes, r.readable, r.writable) for r in self._regions]
                )
            done = self._table.move(runs, buffer, to_guest=to_guest)
        if done != len(buffer):
            raise _located(runs, done)

    def _move_one(self, address: int, length: int, buffer: Buffer, to_guest: bool) -> bool:
        """Move one run within the region that was used last; False when it is not like that."""
        region, window = self._last, memoryview(buffer).cast("B")
        offset = address - region.base
        allowed = region.writable if to_guest else region.readable
        inside = offset >= 0 and offset + length <= region.size and length == len(window)
        if not inside or not allowed or region.bytes is None:
            return False
        if to_guest:
            region.bytes[offset : offset + length] = window
        else:
            window[:] = region.bytes[offset : offset + length]
        return True

    def _move_python(self, runs: "array[int]", buffer: Buffer, to_guest: bool) -> int:
        window = memoryview(buffer).cast("B")
        if sum(runs[1::2]) != len(window):
            raise ValueError("the buffer and the runs differ in length")
        done = 0
        for address, length in zip(runs[::2], runs[1::2], strict=True):
            end = address + length
            while address < end:
                try:
                    region = self._find(address, end - address)
                except BusError:
                    return done
                allowed = region.writable if to_guest else region.readable
                if region.bytes is None or not allowed:
                    return done
                part = min(end, region.end) - address
                offset = address - region.base
                if to_guest:
                    region.bytes[offset : offset + part] = window[done : done + part]
                else:
                    window[done : done + part] = region.bytes[offset : offset + part]
                done += part
                address += part
        return done


def _located(runs: "array[int]", done: int) -> BusError:
    """The bus error of a move that stopped after `done` bytes."""
    before = 0
    for address, length in zip(runs[::2], runs[1::2], strict=True):
        if done < before + length:
            return BusError(address + done - before, length - (done - before), done)
        before += length
    raise AssertionError("the move did not stop early")
