"""Transactions that wait for software's answer to their fault (IHI 0070, 3.12.2, 4.6)."""

from collections.abc import Iterator

from viommu.layouts.records import EventRecord
from viommu.smmu.faults import Access, Stalled


class StallTable:
    """The transactions that are stalled, by STAG. A STAG is not used again while its transaction waits."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stalled: dict[int, Stalled] = {}
        self._waiting: list[Stalled] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._stalled)

    def __iter__(self) -> Iterator[Stalled]:
        return iter(self._stalled.values())

    def add(self, access: Access, address: int, record: EventRecord) -> Stalled | None:
        """Stall a transaction; its record gets its STAG. None when IDR5.STALL_MAX are stalled: then `queue` it."""
        if len(self._stalled) >= self._limit:
            return None
        while self._next in self._stalled:
            self._next = (self._next + 1) & 0xFFFF
        stag = self._next
        self._next = (stag + 1) & 0xFFFF
        record.stall, record.stag = True, stag
        stalled = self._stalled[stag] = Stalled(access, address, stag, record)
        return stalled

    def queue(self, access: Access, address: int, record: EventRecord) -> Stalled:
        """Hold a transaction back without a record, until one that is stalled is answered; then it tries again."""
        self._waiting.append(Stalled(access, address, 0, record))
        return self._waiting[-1]

    def _admit(self) -> None:
        waiting, self._waiting = self._waiting, []
        for stalled in waiting:
            stalled.resolution = "retry"

    def resume(self, stream_id: int, stag: int, resolution: str) -> Stalled | None:
        """CMD_RESUME: answer one. A STAG that waits for nothing, or is another stream's, is ignored (4.6.1)."""
        stalled = self._stalled.get(stag)
        if stalled is None or stalled.access.stream_id != stream_id:
            return None
        stalled.resolution = resolution
        del self._stalled[stag]
        self._admit()
        return stalled

    def terminate(self, stream_id: int) -> list[Stalled]:
        """CMD_STALL_TERM: abort all of a stream (4.6.2)."""
        return [self._end(s) for s in list(self) if s.access.stream_id == stream_id]

    def terminate_all(self) -> list[Stalled]:
        """SMMUEN was cleared, or the SMMU reset."""
        return [self._end(s) for s in list(self)]

    def _end(self, stalled: Stalled) -> Stalled:
        stalled.resolution = "abort"
        del self._stalled[stalled.stag]
        self._admit()
        return stalled
