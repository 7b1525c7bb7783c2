"""Detaches that race the DMA of both engines, at points that a seed gives."""

from collections.abc import Callable

from board import DESTINATION, UNTOUCHED, Board, Json
from engine import RAND48
from pool import HUGE, PAGE
from remapping import Bench

DATA_SIZE = HUGE
PAGES = 32
FRAMES = 2
"""Of each engine."""
SEEDS = 8
DETACHES = 25
"""For each seed."""


def numbers(seed: int) -> Callable[[int], int]:
    """Numbers below what is asked for, the same for the same seed; `random` takes long to import."""
    state = seed

    def number(limit: int) -> int:
        nonlocal state
        state = (state * 0x5851_F42D_4C95_7F2D + 0x1405_7B7E_F767_814F) & (1 << 64) - 1
        return (state >> 33) % limit

    return number


def race(board: Board, seed: int) -> dict[str, Json]:
    """Attach both engines, let them write, detach in the midst of it; then look at what still lands."""
    bench, number = Bench(board), numbers(seed)
    device, size = bench.pair(), PAGES * PAGE
    window = board.destination.view
    blank = bytes([UNTOUCHED]) * len(window)
    late = cut_short = 0
    points: list[Json] = []
    statuses: set[str] = set()
    for _ in range(DETACHES):
        domain = bench.domain(pages=PAGES)
        bench.attach(domain, device, 0, 2)
        frames = [engine.frame(index) for engine in board.engines for index in range(FRAMES)]
        before = [frame.returned for frame in frames]
        for frame in frames:
            frame.start(RAND48, DESTINATION, size, seed=number(1 << 32), rate=4 << number(4))
        point = number(40)
        points.append(point)
        for _ in range(point):
            frames[0].returned  # noqa: B018 - a read of a register is what takes time
        statuses.add(bench.remapping.detach_device(domain, device).name)
        window[:] = blank
        outcomes = [frame.wait() for frame in frames]
        # Views are compared byte by byte, which takes its time.
        landed = bytes(window)
        late += sum(byte != UNTOUCHED for byte in landed) if landed != blank else 0
        begun = sum(outcome.returned for outcome in outcomes) > sum(before) + len(frames)
        cut_short += begun and any(outcome.status == "ERROR" for outcome in outcomes)
        statuses.add(bench.remapping.delete_domain(domain).name)
    return {
        "seed": seed,
        "detaches": DETACHES,
        "statuses": [*sorted(statuses)],
        "late_bytes": late,
        "cut_short": cut_short,
        "points": points,
        "events": board.events(),
    }


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    f"seed-{seed}": lambda board, seed=seed: race(board, seed)  # type: ignore[misc]
    for seed in range(SEEDS)
}
