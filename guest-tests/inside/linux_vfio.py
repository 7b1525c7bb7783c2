"""VFIO from user space on the engines: open is attach, close is detach."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep

import pci
import vfio
from engine import IDS, MEMCPY, RAND48, Frame, Outcome, page_pattern
from kernel_log import KernelLog
from vfio import Memory

from viommu.layouts.test_engine import EngineCommand

PAGE = os.sysconf("SC_PAGESIZE")
MIB = 1 << 20
SOURCE, DESTINATION = 0x1000_0000, 0x2_2000_0000
SIZES = ((PAGE, False), (4 * PAGE, False), (2 * MIB, False), (2 * MIB, True), (64 * MIB, False))
IN_FLIGHT = 16 * MIB
RATE = 64
"""Transactions of 4 KiB: a long DMA is met in the middle."""
SETTLED = 0.3
"""Seconds in which whatever is late lands."""

Json = int | float | str | bool | list["Json"] | dict[str, "Json"] | None


class Session(vfio.Session):
    """An engine, ready for DMA."""

    def __init__(self, place: int = 0) -> None:
        self.address = pci.find(ids=IDS)[place].address
        super().__init__(self.address)

    def dma(self, command: EngineCommand, begin: int, size: int, **options: int) -> Outcome:
        """One command of the engine's first frame, to its end."""
        frame = self.frame()
        frame.start(command, begin, size, **options)  # type: ignore[arg-type]
        return frame.wait()

    def frame(self) -> Frame:
        return Frame(self.device.bar, 0)


@contextmanager
def without_resets() -> Iterator[None]:
    """Let the kernel not reset the engines at open and close: that takes time, and newer kernels detach for it."""
    functions = pci.find(ids=IDS)
    for function in functions:
        function.write("reset_method", "\n")
    yield
    for function in functions:
        function.write("reset_method", "default\n")


def open_close() -> dict[str, Json]:
    """Nothing but that."""
    with without_resets():
        Session().close()
    return {}


def dma() -> dict[str, Json]:
    """Copy by IOVA: the engine reads one mapping and writes another."""
    session = Session()
    unit = os.urandom(MIB)
    results: list[Json] = []
    for size, huge in SIZES:
        source, destination = Memory(size, huge=huge), Memory(size, huge=huge)
        for at in range(0, size, MIB):
            source.view[at : at + MIB] = unit[: min(MIB, size - at)]
        words = source.view.cast("Q")
        for page in range(size // 4096):
            words[page * 512] = page + 1
        session.container.map(SOURCE, source, write=False)
        session.container.map(DESTINATION, destination)
        started = monotonic()
        outcome = session.dma(MEMCPY, SOURCE, size, destination=DESTINATION)
        seconds = monotonic() - started
        unmapped = [session.container.unmap(iova, size) for iova in (SOURCE, DESTINATION)]
        results.append(
            {
                "size": size,
                "huge": huge,
                "status": outcome.status,
                "wrong_pages": destination.differing_pages(source.copy()),
                "unmapped": unmapped == [size, size],
                "seconds": round(seconds, 3),
            }
        )
    session.close()
    return {"page": PAGE, "results": results}


def unmap() -> dict[str, Json]:
    """Unmap memory that DMA has just reached: the next DMA faults, and the kernel hears of it."""
    session, memory = Session(), Memory(4 * PAGE)
    session.container.map(DESTINATION, memory)
    before = session.dma(RAND48, DESTINATION, 4096, seed=7).status
    landed = memory.copy()[:4096] == page_pattern(7, DESTINATION)
    session.container.unmap(DESTINATION, 4 * PAGE)
    memory.clear()
    return {
        "before": before,
        "landed": landed,
        **_refused(session, memory, DESTINATION + 64),
    }


def read_only() -> dict[str, Json]:
    """Write where only reading is mapped."""
    session, memory = Session(), Memory(PAGE)
    session.container.map(DESTINATION, memory, write=False)
    return _refused(session, memory, DESTINATION)


def last_page() -> dict[str, Json]:
    """Map the highest IOVAs that there are, and write there and beyond."""
    session, memory = Session(), Memory(PAGE)
    end = session.container.iova_end()
    session.container.map(end - PAGE, memory)
    before = session.dma(RAND48, end - 4096, 4096, seed=4).status
    landed = memory.copy()[-4096:] == page_pattern(4, end - 4096)
    memory.clear()
    return {
        "end": end,
        "before": before,
        "landed": landed,
        **_refused(session, memory, end),
    }


def _refused(session: Session, memory: Memory, iova: int) -> dict[str, Json]:
    """A write by DMA that must not go through; `memory` is zero."""
    log = KernelLog()
    outcome = session.dma(RAND48, iova, 64)
    lines: list[Json] = [*log.wait("event")]
    interrupts = log.interrupts
    log.close()
    session.close()
    return {
        "status": outcome.status,
        "error_address": outcome.error_address,
        "zero": memory.is_zero,
        "log": lines,
        "interrupts": interrupts,
    }


def _in_flight(detach: Callable[[Session], None]) -> dict[str, Json]:
    """Fill much memory by DMA, `detach` in the middle of it, and see whether anything lands afterwards."""
    session, memory = Session(), Memory(IN_FLIGHT)
    session.container.map(DESTINATION, memory)
    frame = session.frame()
    start = frame.returned
    frame.start(RAND48, DESTINATION, IN_FLIGHT, rate=RATE)
    deadline = monotonic() + 20
    while frame.returned - start < 100 and monotonic() < deadline:
        pass
    running = frame.running
    del frame
    detach(session)
    after = memory.copy()
    sleep(SETTLED)
    return {
        "running": running,
        "pages": IN_FLIGHT // 4096,
        "untouched": after.count(bytes(4096)),
        "late": memory.differing_pages(after),
    }


def close_in_flight() -> dict[str, Json]:
    """Close device, group and container."""
    return _in_flight(Session.close)


def unmap_in_flight() -> dict[str, Json]:
    """Unmap, with the device open and running."""
    outcomes: list[Json] = []

    def detach(session: Session) -> None:
        session.container.unmap(DESTINATION, IN_FLIGHT)
        outcomes.append(session.frame().wait().status)
        session.close()

    return {**_in_flight(detach), "outcomes": outcomes}


def reopen() -> dict[str, Json]:
    """What an earlier container mapped is not there for the next one."""
    memory = Memory(PAGE)
    first = Session()
    first.container.map(DESTINATION, memory)
    mapped = first.dma(RAND48, DESTINATION, 4096, seed=1).status
    first.close()
    memory.clear()
    second = Session()
    forgotten = second.dma(RAND48, DESTINATION, 4096, seed=2).status
    zero = memory.is_zero
    second.container.map(DESTINATION, memory)
    again = second.dma(RAND48, DESTINATION, 4096, seed=3).status
    landed = memory.copy()[:4096] == page_pattern(3, DESTINATION)
    second.close()
    return {
        "mapped": mapped,
        "forgotten": forgotten,
        "zero": zero,
        "again": again,
        "landed": landed,
    }


def isolated() -> dict[str, Json]:
    """Two engines in two containers use the same IOVA at the same time; each reaches its own memory."""
    sessions = [Session(0), Session(1)]
    memories = [Memory(MIB), Memory(MIB)]
    for session, memory in zip(sessions, memories, strict=True):
        session.container.map(DESTINATION, memory)
    for seed, session in enumerate(sessions):
        session.frame().start(RAND48, DESTINATION, MIB, seed=seed, rate=8)
    status: list[Json] = [session.frame().wait().status for session in sessions]
    landed: list[Json] = [
        all(
            bytes(memory.view[at : at + 4096]) == page_pattern(seed, DESTINATION + at)
            for at in (0, MIB // 2, MIB - 4096)
        )
        for seed, memory in enumerate(memories)
    ]
    # What one container maps alone, the other's engine does not reach.
    alone = Memory(PAGE)
    sessions[0].container.map(SOURCE, alone)
    other = sessions[1].dma(RAND48, SOURCE, 64).status
    zero = alone.is_zero
    own = sessions[0].dma(RAND48, SOURCE, 64).status
    for session in sessions:
        session.close()
    return {"status": status, "landed": landed, "other": other, "zero": zero, "own": own}


def rounds(count: int = 50) -> dict[str, Json]:
    """Open, map, DMA, close, again and again."""
    memory = Memory(PAGE)
    good = 0
    with without_resets():
        started = monotonic()
        for seed in range(count):
            session = Session(seed & 1)
            session.container.map(DESTINATION, memory)
            status = session.dma(RAND48, DESTINATION, 4096, seed=seed).status
            good += status == "HALTED" and not memory.is_zero
            session.close()
            memory.clear()
        milliseconds = (monotonic() - started) * 1000 / count
    return {"rounds": count, "good": good, "milliseconds": round(milliseconds, 1)}


CASES: dict[str, Callable[[], dict[str, Json]]] = {
    "open-close": open_close,
    "dma": dma,
    "unmap": unmap,
    "read-only": read_only,
    "last-page": last_page,
    "close-in-flight": close_in_flight,
    "unmap-in-flight": unmap_in_flight,
    "reopen": reopen,
    "isolated": isolated,
    "few-rounds": lambda: rounds(5),
    "rounds": rounds,
}
