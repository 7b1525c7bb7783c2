"""Detach in each of its forms, and the way back."""

from collections.abc import Callable

from board import DESTINATION, SOURCE, Board, Json
from engine import RAND48, SUM64
from pool import HUGE

from viommu.driver.smmu import DetachMode

DATA_SIZE = HUGE


def detach(board: Board, how: DetachMode) -> dict[str, Json]:
    """A DMA goes through, then after the detach neither a read nor a write does, and after a new attach one does."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    driver.attach(stream_id, domain)
    attached = board.copy_works(domain)
    before = board.events()
    driver.detach(stream_id, how)
    read = board.refused(SUM64, SOURCE)
    write = board.refused(RAND48, DESTINATION)
    if how is DetachMode.SMMU_DISABLED:
        driver = board.fresh()
    domain = driver.create_domain()
    driver.attach(stream_id, domain)
    return {
        "stream_id": stream_id,
        "attached": attached,
        "before": before,
        "read": read,
        "write": write,
        "back": board.copy_works(domain),
        "events": board.events(),
    }


def detach_one_of_two(board: Board) -> dict[str, Json]:
    """Two endpoints share a domain; the one that stays attached does not notice that the other left."""
    driver = board.fresh()
    leaving, staying = board.engines
    domain = driver.create_domain()
    for engine in (leaving, staying):
        driver.attach(engine.stream_id, domain)
    attached = board.copy_works(domain)
    driver.detach(leaving.stream_id)
    read = board.refused(SUM64, SOURCE)
    domain.unmap_all()
    return {
        "attached": attached,
        "read": read,
        "back": board.copy_works(domain, engine=1),
        "events": board.events(),
    }


def freed(board: Board) -> dict[str, Json]:
    """A domain that is closed after the detach leaves nothing in the TLB: its ASID can be used again."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    first = driver.create_domain(asid=77)
    driver.attach(stream_id, first)
    attached = board.copy_works(first)
    driver.detach(stream_id)
    first.close()
    second = driver.create_domain(asid=77)
    driver.attach(stream_id, second)
    return {"stream_id": stream_id, "attached": attached, "read": board.refused(SUM64, SOURCE)}


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    "unmap": lambda board: detach(board, DetachMode.UNMAP),
    "ste-abort": lambda board: detach(board, DetachMode.STE_ABORT),
    "ste-invalid": lambda board: detach(board, DetachMode.STE_INVALID),
    "cd-invalid": lambda board: detach(board, DetachMode.CD_INVALID),
    "smmu-disabled": lambda board: detach(board, DetachMode.SMMU_DISABLED),
    "one-of-two": detach_one_of_two,
    "domain-closed": freed,
}
