"""What the points of fault injection cost while no plan is loaded: looks at one attribute, counted and timed."""

import time
from collections.abc import Callable
from statistics import median

from viommu.trace import Point, Tracer, Verdict

ROUNDS = 7
REPEAT = 2000


class _CountingTracer(Tracer):
    """Counts how often somebody asks whether there is a meddler."""

    looks = 0

    @property  # type: ignore[override]
    def meddler(self) -> Callable[[Point], Verdict | None] | None:
        self.looks += 1
        return None

    @meddler.setter
    def meddler(self, value: object) -> None:
        pass


def looks(work: Callable[[Tracer], Callable[[], None]]) -> int:
    """How many looks one call of what `work` makes over a tracer takes."""
    tracer = _CountingTracer()
    call = work(tracer)
    call()
    before = tracer.looks
    call()
    return tracer.looks - before


def share(work: Callable[[Tracer], Callable[[], None]]) -> tuple[float, float, float]:
    """Microseconds of one call, those of its looks, and their ratio."""
    tracer = Tracer()
    call, count = work(tracer), looks(work)

    def nothing() -> None:
        for _ in range(REPEAT):
            pass

    def look() -> None:
        for _ in range(REPEAT):
            if tracer.meddler is not None:
                raise AssertionError

    def calls() -> None:
        for _ in range(REPEAT):
            call()

    empty, looking, calling = (
        median(_seconds(each) for _ in range(ROUNDS)) for each in (nothing, look, calls)
    )
    one = max(looking - empty, 0.0) / REPEAT * 1e6
    whole = calling / REPEAT * 1e6
    return whole, one * count, one * count / whole


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
