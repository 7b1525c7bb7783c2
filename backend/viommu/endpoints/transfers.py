"""DMA in steps: its generators yield what they wait for, or None when they can go on at once."""

from collections import deque
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

from viommu.endpoints.port import (
    UNPRIVILEGED_DATA,
    DmaAttributes,
    DmaFault,
    DmaPort,
    DmaStalled,
    Transfer,
)
from viommu.memory import Buffer

WINDOW = 16
"""Transactions that one generator has in flight at most."""
TRIES = 1000
"""How often a transaction is begun again because software said that it may."""


class Waiting(Protocol):
    """What somebody waits for."""

    @property
    def waiting(self) -> bool:
        """It has not come yet."""
        ...


Steps = Generator[Waiting | None, None, None]


class Segment(NamedTuple):
    """`size` bytes at `iova`."""

    iova: int
    size: int


class Transfers:
    """Moves bytes by `port`. What is adjacent moves at once."""

    def __init__(
        self,
        port: DmaPort,
        *,
        substream_id: int | None = None,
        attributes: DmaAttributes = UNPRIVILEGED_DATA,
    ) -> None:
        """`substream_id` and `attributes` are those of all its transactions."""
        self._port = port
        self._say: dict[str, Any] = {}
        if substream_id is not None or attributes != UNPRIVILEGED_DATA:
            self._say = {"substream_id": substream_id, "attributes": attributes}

    def read(self, iova: int, size: int) -> Generator[Waiting | None, None, memoryview]:
        """`size` bytes from guest RAM. Raises `DmaFault`."""
        buffer = memoryview(bytearray(size))
        if size:
            yield from self.move([Segment(iova, size)], buffer, write=False)
        return buffer

    def write(self, iova: int, data: Buffer) -> Steps:
        """Write `data` to guest RAM. Raises `DmaFault`."""
        segments = [Segment(iova, len(data))] if data else []
        return self.move(segments, memoryview(data), write=True)

    def move(self, segments: Iterable[Segment], buffer: memoryview, *, write: bool) -> Steps:
        """Move `buffer` to the segments, or what they hold into it. Raises `DmaFault`; what was before it has moved."""
        left = deque(segments)
        done = tries = 0
        while left:
            flight: list[Transfer] = []
            try:
                held, fault = self._begin(left, flight, write=write)
                yield None
                for transfer in flight:
                    end = done + transfer.size
                    yield from _released(transfer)
                    if write:
                        transfer.write_from(buffer[done:end])
                    else:
                        transfer.read_into(buffer[done:end])
                    yield from _released(transfer)
                    transfer.done()
                    done = end
            except BaseException:
                with ExitStack() as over:  # each of them, though the end of one fails
                    for transfer in reversed(flight):
                        over.callback(transfer.done)
                raise
            if fault is not None:
                raise fault
            if flight:
                tries = 0
            if held is not None:
                tries += 1
                while held.waiting:
                    yield held
                if held.aborted or tries > TRIES:
                    raise DmaFault(left[0].iova, 0, "software did not let the transaction through")

    def _begin(
        self, left: deque[Segment], flight: list[Transfer], *, write: bool
    ) -> tuple[DmaStalled | None, DmaFault | None]:
        """Begin transactions for what is at the front of `left`, until one is stalled or aborted."""
        while left and len(flight) < WINDOW:
            iova, size = left[0]
            try:
                transfer = self._port.begin(iova, size, write=write, **self._say)
            except DmaStalled as held:
                return held, None
            except DmaFault as fault:
                return None, fault
            flight.append(transfer)
            if transfer.size < size:
                left[0] = Segment(iova + transfer.size, size - transfer.size)
            else:
                left.popleft()
        return None, None


def _released(transfer: Transfer) -> Steps:
    """Wait, in flight, as long as somebody holds the transfer."""
    while transfer.waiting:
        yield transfer


def append(segments: list[Segment], iova: int, size: int) -> int:
    """Add a segment, to the last if it follows on it; returns its size."""
    if segments and sum(segments[-1]) == iova:
        segments[-1] = Segment(segments[-1].iova, segments[-1].size + size)
    else:
        segments.append(Segment(iova, size))
    return size
