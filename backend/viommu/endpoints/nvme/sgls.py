"""SGLs: the data of an I/O command as blocks of any size at any address (NVM Express 1.4, 4.4).

An SGL is examined descriptor by descriptor until all data has a place. What follows may be anything: SGLS says that an
SGL may be longer than the data. Nor is it an error when no further segment follows on one that is not the last.
"""

from collections.abc import Generator

from viommu.endpoints.nvme.errors import CommandFailed
from viommu.endpoints.transfers import Segment, Transfers, Waiting, append
from viommu.layouts.nvme_commands import (
    CONTROLLER_TO_HOST,
    SglCommand,
    SglDescriptor,
    SglIdentifier,
    Status,
    SubmissionEntry,
)

DESCRIPTORS = 4096
"""The most that are fetched for one command; more are a wrong number of them. NVM Express itself sets no limit."""
_SIZE = SglDescriptor.size
_PIECE = 256 * _SIZE
# The most that is fetched at once, and examined in one step, bytes.
_NOWHERE = -1 << 64
# Where a bit bucket is: before all addresses, so that nothing is adjacent to it.


def locate(
    transfers: Transfers, entry: SubmissionEntry, size: int
) -> Generator[Waiting | None, None, list[Segment]]:
    """Where the `size` bytes of a command's data are; bit buckets, which only a read has, are for `kept` to take out.

    Raises `CommandFailed` for an SGL that may not be, `DmaFault` when a segment cannot be read.
    """
    sgl = _Sgl(size, buckets=entry.opcode & 3 == CONTROLLER_TO_HOST)
    sgl.examine(SglDescriptor(SglCommand(entry.value).sgl1), ends=True)
    fetched = 0
    while sgl.left:
        place, end = sgl.follow()
        while place < end and sgl.left:
            piece = min(end - place, _PIECE)
            fetched += piece // _SIZE
            if fetched > DESCRIPTORS:
                raise CommandFailed(Status.INVALID_NUMBER_OF_SGL_DESCRIPTORS)
            data = yield from transfers.read(place, piece)
            place += piece
            sgl.examine_all(data, ends=place == end)
    return sgl.segments


def kept(segments: list[Segment], buffer: memoryview) -> tuple[list[Segment], memoryview]:
    """The segments that are not bit buckets, and what of `buffer` goes there."""
    memory = [segment for segment in segments if segment.iova != _NOWHERE]
    if len(memory) == len(segments):
        return segments, buffer
    parts, done = list[memoryview](), 0
    for iova, size in segments:
        if iova != _NOWHERE:
            parts.append(buffer[done : done + size])
        done += size
    return memory, memoryview(b"".join(parts))


class _Sgl:
    """What an SGL has told so far."""

    def __init__(self, size: int, *, buckets: bool) -> None:
        self.segments: list[Segment] = []
        self.left = size
        """Bytes that have no place yet."""
        self._buckets = buckets
        self._next: SglDescriptor | None = None
        self._in_last = False

    def follow(self) -> tuple[int, int]:
        """The beginning and the end of the segment that comes next."""
        segment, self._next = self._next, None
        if segment is None:
            raise CommandFailed(Status.DATA_SGL_LENGTH_INVALID)
        self._in_last = segment.identifier == SglIdentifier.LAST_SEGMENT
        return segment.address, segment.address + segment.length

    def examine_all(self, data: memoryview, *, ends: bool) -> None:
        """What has been fetched of a segment; `ends` says that it goes to its end."""
        for place in range(0, len(data), _SIZE):
            if not self.left:
                return
            descriptor = SglDescriptor.from_bytes(data[place:])
            self.examine(descriptor, ends=ends and place + _SIZE == len(data))

    def examine(self, descriptor: SglDescriptor, *, ends: bool) -> None:
        """One descriptor; `ends` says that it is the last of its segment."""
        match descriptor.identifier:
            case SglIdentifier.DATA_BLOCK:
                _check_end(descriptor)
                size = min(descriptor.length, self.left)
                if size:
                    self.left -= append(self.segments, descriptor.address, size)
            case SglIdentifier.BIT_BUCKET:
                size = min(descriptor.length, self.left)
                if size and self._buckets:
                    self.segments.append(Segment(_NOWHERE, size))
                    self.left -= size
            case SglIdentifier.SEGMENT | SglIdentifier.LAST_SEGMENT:
                if not ends:
                    raise CommandFailed(Status.INVALID_NUMBER_OF_SGL_DESCRIPTORS)
                _check_segment(descriptor, allowed=not self._in_last)
                _check_end(descriptor)
                self._next = descriptor
            case _:
                raise CommandFailed(Status.SGL_DESCRIPTOR_TYPE_INVALID)


def _check_segment(descriptor: SglDescriptor, *, allowed: bool) -> None:
    size = descriptor.length
    if not allowed or not size or size % _SIZE or descriptor.address % 8:
        raise CommandFailed(Status.INVALID_SGL_SEGMENT_DESCRIPTOR)


def _check_end(descriptor: SglDescriptor) -> None:
    if descriptor.address + descriptor.length > 1 << 64:
        raise CommandFailed(Status.DATA_SGL_LENGTH_INVALID)
