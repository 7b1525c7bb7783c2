"""What is not invalidated stays in force."""

from collections.abc import Callable

from board import DESTINATION, UNTOUCHED, Board, Json
from engine import RAND48, page_pattern
from pool import HUGE, PAGE, Scattered

from viommu.driver.stream_table import invalid_entry
from viommu.layouts.commands import Opcode, TlbiCommand

DATA_SIZE = HUGE


def write(board: Board, pages: Scattered, seed: int) -> dict[str, Json]:
    """One page by DMA to DESTINATION: how it went, and which of `pages` hold it now, by number."""
    board.destination.fill(UNTOUCHED)
    outcome = board.dma(RAND48, DESTINATION, PAGE, seed=seed)
    pattern = page_pattern(seed, DESTINATION)
    return {
        "status": outcome.status,
        "error_address": outcome.error_address,
        "landed": [number for number, page in enumerate(pages.pages()) if page == pattern],
        "stray_bytes": board.stray_bytes(pages),
        "events": board.events(),
    }


def unmapped_page(board: Board) -> dict[str, Json]:
    """A page that is unmapped without TLBI still receives DMA; after the TLBI it does not."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    driver.attach(stream_id, domain)
    pages = Scattered(board.destination, 1)
    domain.map_pages(DESTINATION, pages.frames)
    mapped = write(board, pages, 1)
    domain.unmap(DESTINATION, PAGE, invalidate=False)
    stale = write(board, pages, 2)
    domain.flush()
    return {
        "stream_id": stream_id,
        "mapped": mapped,
        "stale": stale,
        "flushed": write(board, pages, 3),
    }


def never_used(board: Board) -> dict[str, Json]:
    """A page that no DMA used was not cached: without TLBI its next DMA faults at once."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    driver.attach(stream_id, domain)
    pages = Scattered(board.destination, 1)
    domain.map_pages(DESTINATION, pages.frames)
    domain.unmap(DESTINATION, PAGE, invalidate=False)
    return {"stream_id": stream_id, "unmapped": write(board, pages, 1)}


def remapped_page(board: Board) -> dict[str, Json]:
    """An IOVA that is given to another page without TLBI still reaches the first one."""
    driver = board.fresh()
    domain = driver.create_domain()
    driver.attach(board.engines[0].stream_id, domain)
    pages = Scattered(board.destination, 2)
    domain.map_pages(DESTINATION, pages.frames[:1])
    mapped = write(board, pages, 1)
    domain.unmap(DESTINATION, PAGE, invalidate=False)
    domain.map_pages(DESTINATION, pages.frames[1:])
    stale = write(board, pages, 2)
    domain.flush()
    return {"mapped": mapped, "stale": stale, "flushed": write(board, pages, 3)}


def by_address(board: Board, *, asid: int, address: int) -> dict[str, Json]:
    """A TLBI for another ASID or another address does not help; the right one does."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain(asid=5)
    driver.attach(stream_id, domain)
    pages = Scattered(board.destination, 1)
    domain.map_pages(DESTINATION, pages.frames)
    write(board, pages, 1)
    domain.unmap(DESTINATION, PAGE, invalidate=False)
    results = []
    for own, place in ((asid, address), (5, DESTINATION)):
        opcode = Opcode.CMD_TLBI_NH_VA
        driver.commands.issue(TlbiCommand(opcode=opcode, asid=own, address=place, leaf=False))
        driver.commands.sync()
        results.append(write(board, pages, 2))
    return {"stream_id": stream_id, "stale": results[0], "flushed": results[1]}


def entry(board: Board) -> dict[str, Json]:
    """An STE that is made invalid without CFGI_STE is still used; after it, it is not."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    driver.attach(stream_id, domain)
    pages = Scattered(board.destination, 1)
    domain.map_pages(DESTINATION, pages.frames)
    mapped = write(board, pages, 1)
    driver.table.entry(stream_id)[0] = invalid_entry().value
    stale = write(board, pages, 2)
    driver.invalidate_stream(stream_id)
    return {
        "stream_id": stream_id,
        "mapped": mapped,
        "stale": stale,
        "flushed": write(board, pages, 3),
    }


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    "unmapped-page": unmapped_page,
    "never-used": never_used,
    "remapped-page": remapped_page,
    "other-asid": lambda board: by_address(board, asid=6, address=DESTINATION),
    "other-address": lambda board: by_address(board, asid=5, address=DESTINATION + PAGE),
    "ste": entry,
}
