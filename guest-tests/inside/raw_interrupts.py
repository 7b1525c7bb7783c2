"""Wired interrupts: of the SMMU for an event and an error, of the engine for a command that ended."""

from collections.abc import Callable
from time import monotonic, sleep

from board import DESTINATION, Board, Json
from engine import RAND48, SUM64
from pool import HUGE, PAGE, Scattered
from uio import Interrupt

from viommu.driver.errors import CommandQueueError
from viommu.layouts.commands import Command

DATA_SIZE = HUGE
NO_COMMAND = 0xEE


def count(source: Interrupt, at_least: int) -> int:
    """The interrupts that came: as many as expected, and those that come in a moment more."""
    total, deadline = source.take(), monotonic() + 5
    while total < at_least and monotonic() < deadline:
        sleep(0.002)
        total += source.take()
    sleep(0.02)
    return total + source.take()


def event(board: Board) -> dict[str, Json]:
    """One interrupt for one event, none for a DMA that goes through, none while they are switched off."""
    with Interrupt(board.smmu) as source:
        driver = board.fresh(interrupts=True)
        domain = driver.create_domain()
        driver.attach(board.engines[0].stream_id, domain)
        works = board.copy_works(domain)
        quiet = count(source, 0)
        counts: list[Json] = []
        status: list[Json] = []
        events: list[Json] = []
        for _ in range(3):
            status.append(board.dma(SUM64, 0, PAGE).status)
            counts.append(count(source, 1))
            events += board.events()
        driver.set_interrupts(False)
        status.append(board.dma(SUM64, 0, PAGE).status)
        off = count(source, 0)
    return {
        "works": works,
        "quiet": quiet,
        "counts": counts,
        "status": status,
        "events": events,
        "off": off,
    }


def global_error(board: Board) -> dict[str, Json]:
    """One interrupt for a command queue error."""
    with Interrupt(board.smmu) as source:
        driver = board.fresh(interrupts=True)
        quiet = count(source, 0)
        driver.commands.issue(Command(NO_COMMAND))
        raised = count(source, 1)
        code = 0
        try:
            driver.commands.sync()
        except CommandQueueError as error:
            code = error.code
        driver.set_interrupts(False)
    return {"quiet": quiet, "count": raised, "code": code}


def completion(board: Board) -> dict[str, Json]:
    """One interrupt for a command that asked for it, complete or aborted, and none for one that did not."""
    driver = board.fresh()
    domain = driver.create_domain()
    domain.map_pages(DESTINATION, Scattered(board.destination, 4).frames)
    driver.attach(board.engines[0].stream_id, domain)
    with Interrupt(board.engines[0].function) as source:
        status: list[Json] = [board.dma(RAND48, DESTINATION, 4 * PAGE).status]
        counts: list[Json] = [count(source, 0)]
        for begin in (DESTINATION, DESTINATION, 0):
            frame = board.frame()
            frame.start(RAND48, begin, 4 * PAGE, interrupt=True)
            counts.append(count(source, 1))
            status.append(frame.wait().status)
    return {"counts": counts, "status": status, "events": board.events()}


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    "event": event,
    "global-error": global_error,
    "completion": completion,
}
