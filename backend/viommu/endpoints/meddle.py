"""What a function does with the verdicts of a meddler on accesses and interrupts."""

from collections.abc import Callable

from viommu.endpoints.points import ConfigAccess, FunctionInterrupts, MmioAccess
from viommu.trace import Again, Defer, Point, Replace, Skip, Verdict

Meddler = Callable[[Point], Verdict | None]


def read(meddler: Meddler, point: MmioAccess | ConfigAccess) -> int:
    """What the guest reads."""
    match meddler(point):
        case Replace(value):
            return int(value) & (1 << point.value_bits) - 1
        case Skip():
            return (1 << point.value_bits) - 1
        case _:
            return point.value


def write(meddler: Meddler, point: MmioAccess | ConfigAccess) -> int | None:
    """What is written; None is nothing."""
    match meddler(point):
        case Replace(value):
            return int(value) & (1 << point.value_bits) - 1
        case Skip():
            return None
        case _:
            return point.value


def interrupt(meddler: Meddler, point: FunctionInterrupts, send: Callable[[], bool]) -> bool:
    """Send it as the meddler wants; what is lost or late has been sent, for the function."""
    match meddler(point):
        case Skip():
            return True
        case Again(count):
            for _ in range(count):
                send()
            return send()
        case Defer(hold):
            hold.then(send)
            return True
        case _:
            return send()
