"""An address translation cache: what a function remembers of the answers to its Translation Requests (PCIe, 10.3)."""

from typing import NamedTuple

from viommu.smmu import InvalidateRequest

CAPACITY = 1024
"""Translations that are kept; the oldest go first."""


class CachedTranslation(NamedTuple):
    """`size` bytes from `iova` go to `address`, for whom it was asked and with the permissions that were granted."""

    iova: int
    size: int
    address: int
    read: bool
    write: bool
    execute: bool

    def permits(self, *, write: bool, instruction: bool) -> bool:
        """Whether a transaction may use it."""
        if write:
            return self.write
        return self.execute if instruction else self.read


class Requester(NamedTuple):
    """On whose behalf a translation was asked: its PASID, if it has one, and whether it is privileged."""

    substream_id: int | None
    privileged: bool


class AddressTranslationCache:
    """Translations of any size, by requester and place."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._entries: dict[tuple[Requester, int, int], CachedTranslation] = {}
        # The sizes that entries have had; a few.
        self._sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[tuple[Requester, CachedTranslation]]:
        """All that is remembered."""
        return [(requester, entry) for (requester, _, _), entry in self._entries.items()]

    def find(self, requester: Requester, iova: int) -> CachedTranslation | None:
        """What is remembered of `iova`."""
        for size in self._sizes:
            found = self._entries.get((requester, size, iova & -size))
            if found is not None:
                return found
        return None

    def insert(self, requester: Requester, translation: CachedTranslation) -> None:
        """Remember `translation`, instead of what it overlaps for this requester at other sizes or not: both are right
        until they are invalidated.
        """
        key = requester, translation.size, translation.iova
        self._entries.pop(key, None)
        while len(self._entries) >= self._capacity:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = translation
        if translation.size not in self._sizes:
            self._sizes += (translation.size,)

    def invalidate(self, request: InvalidateRequest) -> None:
        """Forget what maps any byte of the request's range.

        A request without a PASID concerns all of them, and so does one with the Global flag: a choice, since no
        translation is global.
        """
        gone = [
            key
            for key, entry in self._entries.items()
            if concerns(request, key[0].substream_id, entry.iova, entry.size)
        ]
        for key in gone:
            del self._entries[key]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._sizes = ()


def concerns(request: InvalidateRequest, substream_id: int | None, iova: int, size: int) -> bool:
    """Whether the request invalidates what was translated for `size` bytes from `iova`."""
    if request.substream_id not in (None, substream_id) and not request.global_:
        return False
    return iova < request.address + request.size and request.address < iova + size
