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
RATE = 64
"""Transactions of 4 KiB: many times more of them than pass until any form of detach is done."""
FRAMES = 16
"""One frame copies all 64 MiB, and each other one a part of the same, so that writes are in flight at any moment."""
PART = LARGEST // FRAMES
PART_PAGES = PART // PAGE
BEGUN = 64
"""Transactions of the first frame that are over when the detach begins."""
NEAR = 8
"""Pages around the last one of a part that landed, which are copied first."""

_BLANK = bytes([UNTOUCHED]) * PAGE


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

    frames = [board.engines[0].frame(index) for index in range(FRAMES)]
    starts = [frame.returned for frame in frames]
    for part, frame in enumerate(frames):
        offset, size = part * PART, PART if part else LARGEST
        frame.start(MEMCPY, SOURCE + offset, size, destination=DESTINATION + offset, rate=RATE)
    _wait_for(frames[0], starts[0] + BEGUN)
    before = frames[0].returned - starts[0]
    began = monotonic()
    driver.detach(stream_id, how)
    took = monotonic() - began

    # The pages of a part land in ascending order: what may land late does so after the last one. That is copied first.
    near = [page for part in range(FRAMES) for page in _frontier(destination, part)]
    first = [bytes(destination.page(page)) for page in near]
    all_of_it = bytes(board.destination.view)

    outcomes = [frame.wait() for frame in frames]
    late = sum(bytes(destination.page(n)) != page for n, page in zip(near, first, strict=True))
    now = bytes(board.destination.view)
    late += sum(
        all_of_it[offset : offset + PAGE] != now[offset : offset + PAGE]
        for offset in range(0, len(now), PAGE)
    )
    return {
        "stream_id": stream_id,
        "transaction_size": UNIT * RATE,
        "returned_before_detach": before,
        "frames": [
            {
                "status": outcome.status,
                "error_address": outcome.error_address,
                "launched": outcome.launched - start,
                "returned": outcome.returned - start,
            }
            for outcome, start in zip(outcomes, starts, strict=True)
        ],
        "total_pages": len(destination),
        "landed_pages": board.right_pages(destination),
        "blank_pages": sum(page == _BLANK for page in destination.pages()),
        "late_pages": late,
        "detach_milliseconds": round(took * 1000, 1),
        "events": board.events(),
    }


def _wait_for(frame: Frame, returned: int) -> None:
    deadline = monotonic() + 20
    while frame.returned < returned:
        if not frame.running or monotonic() > deadline:
            raise TimeoutError(f"{frame.returned} transactions, waiting for {returned}")


def _frontier(destination: Scattered, part: int) -> range:
    """The pages of a part about the first one that is still blank, found by halving."""
    low = start = part * PART_PAGES
    high = end = start + PART_PAGES
    while low < high:
        middle = (low + high) // 2
        if destination.page(middle) == _BLANK:
            high = middle
        else:
            low = middle + 1
    return range(max(low - NEAR, start), min(low + NEAR, end))


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    how.value: lambda board, how=how: in_flight(board, how)  # type: ignore[misc]
    for how in DetachMode
}
