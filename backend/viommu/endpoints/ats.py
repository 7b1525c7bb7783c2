"""ATS in a PCI function: its capability, its translation cache, and who waits for what (PCIe, 10.2 to 10.5).

    ranges = ats.resolve(access, iova, size)      # from the cache, or asked of the SMMU
    translation = smmu.translated(access, ranges)
    ats.hold(translation, …)                      # in flight: an invalidation waits for it
    ats.release(translation)

A function asks for one page at a time, and when it has to write for write permission; what was granted it keeps until
it is told to forget it, or ATS is disabled. An answer without access is not kept.
"""

import struct
from array import array
from collections.abc import Callable, Iterator
from typing import Final

from viommu.endpoints.atc import AddressTranslationCache, CachedTranslation, Requester, concerns
from viommu.endpoints.base import ExtendedCapability
from viommu.endpoints.pri import GROUP, PageRequestGroup, PriService
from viommu.smmu import (
    Access,
    AtsStatus,
    HeldTranslation,
    InvalidateRequest,
    PageResponse,
    Smmu,
    Translation,
    TranslationCompletion,
)
from viommu.trace import Hold

ATS_CAPABILITY: Final = 0x0F
ATS_ENABLE: Final = 1 << 15
ATS_SMALLEST_UNIT: Final = 0x1F
_PAGE_ALIGNED, _GLOBAL_INVALIDATE = 1 << 5, 1 << 6
_QUEUE_DEPTH = 0  # 32


class AtsRefused(Exception):
    """The function may not use ATS for the access at `iova`: no permission (`status` SUCCESS), UR or CA."""

    def __init__(self, iova: int, status: AtsStatus) -> None:
        answer = "no access" if status is AtsStatus.SUCCESS else status.value
        super().__init__(f"Translation Request for {iova:#x}: {answer}")
        self.iova, self.status = iova, status


class AtsLate(Exception):
    """The answer to the Translation Request for `iova` comes when `hold` is released: ask again then."""

    def __init__(self, iova: int, hold: Hold) -> None:
        super().__init__(f"Translation Request for {iova:#x}: no answer yet")
        self.iova, self.hold = iova, hold


class AtsService:
    """ATS of the function that is `stream_id`. The SMMU knows it as the function behind that stream."""

    def __init__(self, smmu: Smmu, stream_id: int) -> None:
        self.cache = AddressTranslationCache()
        self.enabled = False
        """ATS Enable."""
        self.smallest_unit = 1 << 12
        """STU, bytes: what a Translation Request asks for is a multiple of it."""
        self._smmu = smmu
        # Answers that are on their way, by who asked for what.
        self._late: dict[tuple[Requester, int], TranslationCompletion] = {}
        self._transfers: dict[int, tuple[Requester, int, int]] = {}
        self._waiting: list[tuple[set[int], Callable[[], None]]] = []
        self.capability = ExtendedCapability(
            ATS_CAPABILITY,
            struct.pack("<HH", _QUEUE_DEPTH | _PAGE_ALIGNED | _GLOBAL_INVALIDATE, 0),
            struct.pack("<HH", 0, ATS_ENABLE | ATS_SMALLEST_UNIT),
            written=self._written,
        )
        self.pri = PriService(smmu, stream_id) if smmu.features.pri else None
        """PRI, where the SMMU has it too."""
        smmu.connect(stream_id, self)

    def _written(self, body: bytes) -> None:
        (control,) = struct.unpack_from("<H", body, 2)
        self.smallest_unit = 1 << 12 + (control & ATS_SMALLEST_UNIT)
        enabled = bool(control & ATS_ENABLE)
        if enabled != self.enabled:
            self.cache.clear()
            self._late.clear()
        self.enabled = enabled

    def reset(self) -> None:
        """Function level reset: ATS is off. Transfers have ended before."""
        self._written(self.capability.body)
        if self.pri is not None:
            self.pri.reset()

    @property
    def capabilities(self) -> tuple[ExtendedCapability, ...]:
        """What config space has of it."""
        return (self.capability,) if self.pri is None else (self.capability, self.pri.capability)

    # Translation

    def resolve(self, access: Access, iova: int, size: int) -> "array[int]":
        """Where `size` bytes from `iova` go (address, length, …), or as many of them as may be accessed.

        Raises `AtsRefused` when not even the first byte may.
        """
        ranges: array[int] = array("Q")
        end = min(iova + size, 1 << 64)
        address = iova
        while address < end:
            try:
                found = self._find(access, address)
            except AtsRefused:
                if address == iova:
                    raise
                break
            part = min(end, found.iova + found.size) - address
            target = found.address + address - found.iova
            if ranges and ranges[-2] + ranges[-1] == target:
                ranges[-1] += part
            else:
                ranges.extend((target, part))
            address += part
        return ranges

    def ask_for_pages(self, access: Access, iova: int, size: int) -> PageRequestGroup | None:
        """Ask software for the pages of a transfer that has no access to the first; None when nobody can be asked."""
        if self.pri is None:
            return None
        end = min(iova + size, 1 << 64, (iova & -(1 << 12)) + (GROUP << 12))
        return self.pri.request(access, range(iova & -(1 << 12), end, 1 << 12))

    def page_response(self, response: PageResponse) -> None:
        """A PRG Response came."""
        if self.pri is not None:
            self.pri.respond(response)

    def _find(self, access: Access, iova: int) -> CachedTranslation:
        requester = _requester(access)
        found = self.cache.find(requester, iova)
        wanted = {"write": access.write, "instruction": access.instruction and not access.write}
        if found is not None and found.permits(**wanted):
            return found
        unit = iova & -self.smallest_unit
        completion = self._ask(access, unit, self.smallest_unit >> 12)
        if completion.status is not AtsStatus.SUCCESS:
            raise AtsRefused(iova, completion.status)
        # The answer concerns the first page of the unit. A translation smaller than the unit breaks the rules of STU:
        # ask for the page itself.
        if completion.size and unit & -completion.size != iova & -completion.size:
            completion = self._ask(access, iova & -(1 << 12), 1)
            if completion.status is not AtsStatus.SUCCESS:
                raise AtsRefused(iova, completion.status)
        found = CachedTranslation(
            iova & -completion.size if completion.size else iova,
            completion.size,
            completion.address,
            completion.read,
            completion.write,
            completion.execute if access.substream_id is not None else completion.read,
        )
        if not found.permits(**wanted):
            raise AtsRefused(iova, AtsStatus.SUCCESS)
        self.cache.insert(requester, found)
        return found

    def held(self) -> Iterator[HeldTranslation]:
        """What the cache has, for who looks on."""
        for requester, entry in self.cache.entries():
            yield HeldTranslation(
                *requester, entry.iova, entry.size, entry.address, entry.read, entry.write
            )

    def _ask(self, access: Access, iova: int, span: int) -> TranslationCompletion:
        """A Translation Request and its completion. Raises `AtsLate` while that is on its way."""
        key = _requester(access), iova
        completion = self._late.pop(key, None)
        if completion is None:
            completion = self._smmu.ats_translate(access, iova, span, no_write=not access.write)
        if completion.hold is not None and not completion.hold.released:
            self._late[key] = completion
            raise AtsLate(iova, completion.hold)
        return completion

    # Transfers in flight, and invalidations that wait for them

    def hold(self, translation: Translation, iova: int) -> None:
        """`translation`, of a transfer at `iova`, used the cache and is in flight."""
        self._transfers[id(translation)] = _requester(translation.access), iova, translation.size

    def release(self, translation: Translation) -> None:
        """The transfer is over, if it was held."""
        key = id(translation)
        if self._transfers.pop(key, None) is None or not self._waiting:
            return
        for transfers, _ in self._waiting:
            transfers.discard(key)
        ready = [complete for transfers, complete in self._waiting if not transfers]
        self._waiting = [waiter for waiter in self._waiting if waiter[0]]
        for complete in ready:
            complete()

    def invalidate(self, request: InvalidateRequest, complete: Callable[[], None]) -> None:
        """An Invalidate Request: forget, and answer when no transfer in flight uses what was forgotten.

        An answer that is still on its way may be of before: it is not taken, and asked for anew (PCIe, 10.3.1).
        """
        self.cache.invalidate(request)
        for requester, iova in list(self._late):
            if concerns(request, requester.substream_id, iova, self.smallest_unit):
                del self._late[requester, iova]
        transfers = {
            key
            for key, (requester, iova, size) in self._transfers.items()
            if concerns(request, requester.substream_id, iova, size)
        }
        if transfers:
            self._waiting.append((transfers, complete))
        else:
            complete()


def _requester(access: Access) -> Requester:
    # Without a PASID nobody is privileged (13.7 of IHI 0070).
    return Requester(access.substream_id, access.privileged and access.substream_id is not None)
