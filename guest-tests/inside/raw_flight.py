"""Detach while a DMA of 64 MiB is in flight."""

from collections.abc import Callable
from time import monotonic

from board import DESTINATION, LARGEST, SOURCE, UNTOUCHED, Board, Json
from engine import MEMCPY, Frame
from pool import PAGE, Scattered

from viommu.driver.smmu import DetachMode

DATA_SIZE = LARGEST
UNIT = 64
"""Bytes of a transaction at rate 1."""
RATE = 256
"""Transactions of 16 KiB: the DMA takes long enough to be met in the middle."""
SLOW_RATE = 64
"""Transactions of 4 KiB, for the form of detach that itself takes long: it clears 32768 descriptors."""
NEAR = 256
"""Pages around the last one that landed, which are copied first."""


def in_flight(board: Board, how: DetachMode) -> dict[str, Json]:
    """Copy 64 MiB, detach in the middle of it, and see that nothing lands after the detach returned."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    driver.attach(stream_id, domain)
    source, destination = Scattered(board.source, seed=3), Scattered(board.destination, seed=5)
    domain.map_pages(SOURCE, source.frames)
    domain.map_pages(DESTINATION, destination.frames)
    board.fill(source)
    board.destination.fill(UNTOUCHED)

    rate = SLOW_RATE if how is DetachMode.UNMAP else RATE
    transactions = LARGEST // (UNIT * rate)
    frame = board.frame()
    start = frame.returned
    frame.start(MEMCPY, SOURCE, LARGEST, destination=DESTINATION, rate=rate)
    _wait_for(frame, start + transactions // 8)
    before = frame.returned - start
    began = monotonic()
    driver.detach(stream_id, how)
    took = monotonic() - began

    # What lands goes up page by page: what may land late does so where the last page did. That is copied first.
    landed = _landed(destination)
    near = range(max(landed - NEAR // 4, 0), min(landed + NEAR, len(destination)))
    first = [bytes(destination.page(number)) for number in near]
    all_of_it = bytes(board.destination.view)

    outcome = frame.wait()
    late = sum(bytes(destination.page(n)) != page for n, page in zip(near, first, strict=True))
    now = bytes(board.destination.view)
    late += sum(
        all_of_it[offset : offset + PAGE] != now[offset : offset + PAGE]
        for offset in range(0, len(now), PAGE)
    )
    return {
        "stream_id": stream_id,
        "status": outcome.status,
        "error_address": outcome.error_address,
        "transactions": transactions,
        "transaction_size": UNIT * rate,
        "returned_before_detach": before,
        "launched": outcome.launched - start,
        "returned": outcome.returned - start,
        "total_pages": len(destination),
        "landed_pages": board.right_pages(destination),
        "blank_pages": sum(page == _BLANK for page in destination.pages()),
        "late_pages": late,
        "detach_milliseconds": round(took * 1000, 1),
        "events": board.events(),
    }


_BLANK = bytes([UNTOUCHED]) * PAGE


def _wait_for(frame: Frame, returned: int) -> None:
    deadline = monotonic() + 20
    while frame.returned < returned:
        if not frame.running or monotonic() > deadline:
            raise TimeoutError(f"{frame.returned} transactions, waiting for {returned}")


def _landed(destination: Scattered) -> int:
    """The number of the first page that is still blank, by halving: pages land in ascending order."""
    low, high = 0, len(destination)
    while low < high:
        middle = (low + high) // 2
        if destination.page(middle) == _BLANK:
            high = middle
        else:
            low = middle + 1
    return low


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    how.value: lambda board, how=how: in_flight(board, how)  # type: ignore[misc]
    for how in DetachMode
}
