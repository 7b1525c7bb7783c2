"""PRPs: a command's data as pages of guest RAM (NVM Express 1.4, 4.3)."""

from collections.abc import Generator
from functools import reduce
from operator import or_

from viommu.endpoints.nvme.errors import CommandFailed
from viommu.endpoints.transfers import Segment, Transfers, Waiting, append
from viommu.layouts.nvme_commands import Status, SubmissionEntry


def locate(
    transfers: Transfers, entry: SubmissionEntry, size: int, page: int
) -> Generator[Waiting | None, None, list[Segment]]:
    """Where the `size` bytes of a command's data are: its PRP entries, and the lists that they point to.

    Raises `CommandFailed` for an offset that may not be, `DmaFault` when a list cannot be read.
    """
    segments: list[Segment] = []
    first = entry.prp1
    if first & 3:
        raise CommandFailed(Status.PRP_OFFSET_INVALID)
    left = size - append(segments, first, min(size, page - first % page))
    if not left:
        return segments
    if left <= page:
        append(segments, _aligned(entry.prp2, page), left)
        return segments
    place = _aligned(entry.prp2, 8)
    while left:
        needed, room = -(-left // page), (page - place % page) // 8
        entries = (yield from transfers.read(place, 8 * min(needed, room))).cast("Q")
        # The last entry of a list that is too short points to the next one.
        more = needed > room
        pages = entries[: len(entries) - more].tolist()
        if pages:
            part = min(left, len(pages) * page)
            _append_pages(segments, pages, part, page)
            left -= part
        if more:
            place = _aligned(entries[-1], page)
    return segments


def _append_pages(segments: list[Segment], pages: list[int], size: int, page: int) -> None:
    """Add `size` bytes in whole pages, of which the last need not be full. Neighbours are one segment."""
    _aligned(reduce(or_, pages), page)
    start = end = pages[0]
    for address in pages:
        if address != end:
            append(segments, start, end - start)
            size -= end - start
            start = address
        end = address + page
    append(segments, start, size)


def _aligned(address: int, unit: int) -> int:
    if address % unit:
        raise CommandFailed(Status.PRP_OFFSET_INVALID)
    return address
