"""PRI in a PCI function: its capability, and the page request groups that wait for an answer (PCIe, 10.4 and 10.5).

A group asks for up to `GROUP` pages of one transfer. It has its index until it is answered: Success lets the transfer
ask for its translation again, Invalid Request ends it. Response Failure ends all of them, and no page is asked for
until software enables PRI anew. A response may come with the PASID of its requests or without.
"""

import struct
from collections.abc import Sequence
from typing import Final

from viommu.endpoints.base import ExtendedCapability
from viommu.smmu import Access, PageRequest, PageResponse, ResponseCode, Smmu

PRI_CAPABILITY: Final = 0x13
PRI_ENABLE, PRI_RESET = 1 << 0, 1 << 1
RESPONSE_FAILURE, UNEXPECTED_INDEX, STOPPED = 1 << 0, 1 << 1, 1 << 8
CAPACITY: Final = 64
"""Page requests that can be outstanding."""
GROUP: Final = 8
"""Page requests of one group."""
_INDICES = 512
_STATUS = 2


class PageRequestGroup:
    """Page requests for `pages` that wait for one answer. `resolution` is None, then `retry` or `abort`."""

    __slots__ = ("address", "pages", "resolution")

    def __init__(self, address: int, pages: int) -> None:
        self.address, self.pages = address, pages
        self.resolution: str | None = None


class PriService:
    """PRI of the function that is `stream_id`."""

    def __init__(self, smmu: Smmu, stream_id: int) -> None:
        self._smmu = smmu
        self._stream_id = stream_id
        self._groups: dict[int, PageRequestGroup] = {}
        self._queued: list[PageRequestGroup] = []
        self._index = 0
        self._enabled = False
        self._allocation = 0
        self._status = STOPPED
        self.capability = ExtendedCapability(
            PRI_CAPABILITY,
            struct.pack("<HHII", 0, STOPPED, CAPACITY, 0),
            struct.pack("<HHII", PRI_ENABLE | PRI_RESET, 0, 0, 0xFFFF_FFFF),
            struct.pack("<HH", 0, RESPONSE_FAILURE | UNEXPECTED_INDEX),
            written=self._written,
        )

    @property
    def outstanding(self) -> int:
        """Page requests that are not answered."""
        return sum(group.pages for group in self._groups.values())

    @property
    def usable(self) -> bool:
        """A page can be asked for, at once or when another group is answered."""
        return self._enabled and self._allocation > 0 and not self._status & RESPONSE_FAILURE

    def _written(self, body: bytes) -> None:
        control, status, _, allocation = struct.unpack_from("<HHII", body)
        self._allocation = min(allocation, CAPACITY)
        enabled = bool(control & PRI_ENABLE)
        self._status = status & (RESPONSE_FAILURE | UNEXPECTED_INDEX)
        if enabled and not self._enabled:
            self._status &= ~RESPONSE_FAILURE
        self._enabled = enabled
        if control & PRI_RESET:
            if not enabled:
                self._end_all()
            self.capability.publish(0, struct.pack("<H", control & ~PRI_RESET))  # it reads as 0
        self._tell()

    def _tell(self) -> None:
        stopped = not self._enabled and not self._groups
        status = self._status & ~STOPPED | (STOPPED if stopped else 0)
        self._status = status
        self.capability.publish(_STATUS, struct.pack("<H", status))

    def reset(self) -> None:
        """Function level reset: nothing is outstanding, PRI is off."""
        self._end_all()
        self._written(self.capability.body)

    def request(self, access: Access, pages: Sequence[int]) -> PageRequestGroup | None:
        """Ask for `pages`, addresses, of which at most `GROUP` and as many as may be outstanding count.

        A group that may not be sent now waits for the answer to another, and then tries again. None when no page can
        be asked for.
        """
        if not self.usable:
            return None
        room = min(GROUP, self._allocation - self.outstanding, len(pages))
        if room <= 0:
            self._queued.append(PageRequestGroup(pages[0], 0))
            return self._queued[-1]
        while self._index in self._groups:
            self._index = (self._index + 1) % _INDICES
        index = self._index
        self._index = (index + 1) % _INDICES
        group = self._groups[index] = PageRequestGroup(pages[0], room)
        with_pasid = access.substream_id is not None
        for number, page in enumerate(pages[:room], 1):
            self._smmu.page_request(
                PageRequest(
                    self._stream_id,
                    access.substream_id,
                    page & -(1 << 12),
                    index,
                    last=number == room,
                    read=not access.write,
                    write=access.write,
                    execute=with_pasid and access.instruction and not access.write,
                    privileged=with_pasid and access.privileged,
                )
            )
        return group

    def respond(self, response: PageResponse) -> None:
        """A PRG Response came. After Response Failure none is expected any more."""
        if self._status & RESPONSE_FAILURE:
            return
        if response.code == ResponseCode.RESPONSE_FAILURE:
            self._status |= RESPONSE_FAILURE
            self._end_all()
            self._tell()
            return
        group = self._groups.pop(response.prg_index, None)
        if group is None:
            self._status |= UNEXPECTED_INDEX
        else:
            group.resolution = "retry" if response.code == ResponseCode.SUCCESS else "abort"
            queued, self._queued = self._queued, []
            for waiting in queued:
                waiting.resolution = "retry"
        self._tell()

    def _end_all(self) -> None:
        for group in (*self._groups.values(), *self._queued):
            group.resolution = "abort"
        self._groups.clear()
        self._queued.clear()
