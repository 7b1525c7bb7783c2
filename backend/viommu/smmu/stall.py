"""Transactions that wait for software's answer to their fault (IHI 0070, 3.12.2, 4.7)."""

from collections.abc import Iterator
from weakref import WeakValueDictionary

from viommu.layouts.records import EventRecord
from viommu.smmu.faults import Access, Stalled


class StallTable:
    """The transactions that are stalled, by STAG; and those held back, which faulted and could not be recorded.

    A STAG is not used again while its transaction waits. Who was held back and is given up by its function, by a reset,
    is gone: nothing else would bound how many there are.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stalled: dict[int, Stalled] = {}
        self._held: WeakValueDictionary[int, Stalled] = WeakValueDictionary()
        self._arrivals = 0
        self._next = 0

    def __len__(self) -> int:
        """Those that have a STAG."""
        return len(self._stalled)

    def __iter__(self) -> Iterator[Stalled]:
        return iter(self._stalled.values())

    @property
    def held(self) -> tuple[Stalled, ...]:
        """Those that are held back."""
        return tuple(self._held.values())

    @property
    def full(self) -> bool:
        """As many as IDR5.STALL_MAX says are stalled."""
        return len(self._stalled) >= self._limit

    def add(self, access: Access, address: int, record: EventRecord) -> Stalled:
        """Stall a transaction, while the table is not `full`. Its record gets its STAG."""
        while self._next in self._stalled:
            self._next = (self._next + 1) & 0xFFFF
        stag = self._next
        self._next = (stag + 1) & 0xFFFF
        record.stall, record.stag = True, stag
        stalled = self._stalled[stag] = Stalled(access, address, stag, record)
        return stalled

    def hold(self, access: Access, address: int, record: EventRecord) -> Stalled:
        """Hold a transaction back without a record: it tries again when there is room for one (7.2.1)."""
        held = Stalled(access, address, None, record)
        self._held[self._arrivals] = held
        self._arrivals += 1
        return held

    def admit(self) -> None:
        """There is room: who was held back tries again, as if it had just arrived."""
        held = self.held
        self._held.clear()
        for stalled in held:
            stalled.resolution = "retry"

    def resume(self, stream_id: int, stag: int, resolution: str) -> None:
        """CMD_RESUME: answer one. A STAG that waits for nothing, or is another stream's, is ignored (4.7.1)."""
        stalled = self._stalled.get(stag)
        if stalled is not None and stalled.access.stream_id == stream_id:
            stalled.resolution = resolution
            del self._stalled[stag]

    def terminate(self, stream_id: int) -> None:
        """CMD_STALL_TERM: abort all of a stream, those held back too (4.7.2)."""
        self._end([s for s in (*self, *self.held) if s.access.stream_id == stream_id])

    def terminate_all(self) -> None:
        """SMMUEN was cleared (6.3.9.6), or the SMMU reset."""
        self._end([*self, *self.held])

    def _end(self, ended: list[Stalled]) -> None:
        for stalled in ended:
            stalled.resolution = "abort"
            if stalled.stag is not None:
                del self._stalled[stalled.stag]
        for place, held in list(self._held.items()):
            if held.resolution is not None:
                del self._held[place]
