"""A volatile write cache: what software forgets to flush is lost with the power."""

from collections import deque
from collections.abc import Iterator
from typing import Final

from viommu.endpoints.nvme.store import BlockStore
from viommu.endpoints.transfers import Steps

PAGE: Final = 4096
LIMIT: Final = 64 << 20
"""The most that waits for a flush, bytes. A write that goes beyond it makes room: all goes to the store."""
RUN: Final = 256
"""Adjacent pages that go to the store at once, at most."""
_ZEROS: Final = bytes(PAGE)


class WriteCache:
    """Holds what was written to `store` until it is flushed, at most `limit` bytes. Whoever drops it cuts the power."""

    def __init__(self, store: BlockStore, limit: int = LIMIT) -> None:
        self._store, self._limit = store, limit
        self._pages: dict[int, bytes | bytearray] = {}

    @property
    def size(self) -> int:
        return self._store.size

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, with what waits here where something does."""
        self._store.read(offset, buffer)
        if self._pages:
            for number, inside, part in _pages(offset, len(buffer)):
                if (page := self._pages.get(number)) is not None:
                    buffer[part] = page[inside]

    def write(self, offset: int, data: memoryview) -> None:
        """Keep `data` here."""
        for number, inside, part in _pages(offset, len(data)):
            self._page(number)[inside] = data[part]
        self._make_room()

    def zero(self, offset: int, size: int) -> None:
        """Keep zeros here; a whole page of them takes no room."""
        for number, inside, _ in _pages(offset, size):
            if inside == slice(0, PAGE):
                self._pages[number] = _ZEROS
            else:
                self._page(number)[inside] = bytes(inside.stop - inside.start)
        self._make_room()

    def flush(self, offset: int = 0, size: int | None = None) -> Steps:
        """Make last what was written, to those bytes alone if they are given: to whole pages."""
        if size is None:
            yield from self._write_back(sorted(self._pages))
        else:
            yield from self._write_back([number for number, _, _ in _pages(offset, size)])
        yield from self._store.flush(offset, size)

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if isinstance(page, bytearray):
            return page
        start = number * PAGE
        found = bytearray(min(PAGE, self.size - start))
        if page is None:
            self._store.read(start, memoryview(found))
        self._pages[number] = found
        return found

    def _make_room(self) -> None:
        if len(self._pages) * PAGE > self._limit:
            for _ in self._write_back(sorted(self._pages)):
                pass

    def _write_back(self, numbers: list[int]) -> Steps:
        """A step for each run of adjacent pages, which are all zeros, or none of them."""
        left = deque(numbers)
        while left:
            run = [left.popleft()]
            if run[0] not in self._pages:
                continue  # it has gone to the store meanwhile
            zeros = self._pages[run[0]] is _ZEROS
            while left and left[0] == run[-1] + 1 and len(run) < RUN:
                page = self._pages.get(left[0])
                if page is None or (page is _ZEROS) != zeros:
                    break
                run.append(left.popleft())
            if zeros:
                self._store.zero(run[0] * PAGE, len(run) * PAGE)
            else:
                data = b"".join(self._pages[number] for number in run)
                self._store.write(run[0] * PAGE, memoryview(data))
            for number in run:
                del self._pages[number]
            yield None


def _pages(offset: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """The numbers of the pages that the bytes touch, where in the page, and where in the bytes."""
    end = offset + size
    place = offset
    while place < end:
        number, start = divmod(place, PAGE)
        count = min(PAGE - start, end - place)
        yield number, slice(start, start + count), slice(place - offset, place - offset + count)
        place += count
