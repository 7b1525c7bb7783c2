"""DMA of 4 KiB, 2 MiB and 64 MiB, both ways, every byte looked at from the guest's side."""

from collections.abc import Callable
from time import monotonic

from board import DESTINATION, LARGEST, SOURCE, UNTOUCHED, Board, Json
from engine import MEMCPY, RAND48, SUM64, page_pattern, sum64
from pool import HUGE, PAGE, Scattered

DATA_SIZE = LARGEST


def scattered(board: Board, size: int) -> dict[str, Json]:
    """Pages in no order: copied, written by the device alone, and read by the device alone."""
    driver = board.fresh()
    engine = board.engines[0]
    domain = driver.create_domain()
    driver.attach(engine.stream_id, domain)
    count = size // PAGE
    source = Scattered(board.source, count, seed=11)
    destination = Scattered(board.destination, count, seed=17)
    started = monotonic()
    domain.map_pages(SOURCE, source.frames)
    domain.map_pages(DESTINATION, destination.frames)
    mapped = monotonic()

    result: dict[str, Json] = {"copy": board.copy(source, destination, SOURCE, DESTINATION)}

    # To memory alone. The pages of one command are alike, so parts of it have seeds of their own.
    board.destination.fill(UNTOUCHED)
    parts = 4 if count >= 4 else 1
    right, status = 0, []
    for part in range(parts):
        begin = DESTINATION + part * size // parts
        status.append(board.dma(RAND48, begin, size // parts, seed=part + 100).status)
    pages = list(destination.pages())
    for part in range(parts):
        pattern = page_pattern(part + 100, DESTINATION)
        own = pages[part * count // parts : (part + 1) * count // parts]
        right += sum(page == pattern for page in own)
    result["write"] = {
        "status": [*status],
        "right_pages": right,
        "stray_bytes": board.stray_bytes(destination),
    }

    # From memory alone: the sum over pages does not depend on their order.
    outcome = board.dma(SUM64, SOURCE, size)
    if count == len(board.source) // PAGE:
        expected = sum64(board.source.view)
    else:
        expected = sum(sum64(source.page(number)) for number in range(count)) & (1 << 64) - 1
    result["read"] = {"status": outcome.status, "sum": outcome.sum, "expected": expected}
    result["events"] = board.events()
    started_unmap = monotonic()
    result["unmapped"] = len(domain.unmap(SOURCE, size)) + len(domain.unmap(DESTINATION, size))
    result["milliseconds"] = {
        "map": round((mapped - started) * 500),
        "unmap": round((monotonic() - started_unmap) * 500),
    }
    result["after"] = board.refused(MEMCPY, SOURCE, destination=DESTINATION)
    result["stream_id"] = engine.stream_id
    return result


def block(board: Board) -> dict[str, Json]:
    """A 2 MiB block each way, and across the border of two blocks."""
    driver = board.fresh()
    engine = board.engines[0]
    domain = driver.create_domain()
    driver.attach(engine.stream_id, domain)
    for place in range(2):
        domain.map(SOURCE + place * HUGE, board.source.bases[place], HUGE)
        domain.map(DESTINATION + place * HUGE, board.destination.bases[1 - place], HUGE)
    kinds: list[Json] = [mapping.size for mapping in domain.tables[0].mappings()]
    view = board.source.view
    for page in range(2 * HUGE // PAGE):
        view[page * PAGE : (page + 1) * PAGE] = board.random_page(page)
    board.destination.fill(UNTOUCHED)
    outcome = board.dma(MEMCPY, SOURCE, 2 * HUGE, destination=DESTINATION)
    into = board.destination.view
    right = bytes(into[HUGE : 2 * HUGE]) == bytes(view[:HUGE])
    right = right and bytes(into[:HUGE]) == bytes(view[HUGE : 2 * HUGE])
    blank = bytes(into[2 * HUGE : 3 * HUGE]) == bytes([UNTOUCHED]) * HUGE
    return {
        "status": outcome.status,
        "mappings": kinds,
        "right": right,
        "beyond_is_blank": blank,
        "events": board.events(),
    }


def unaligned(board: Board) -> dict[str, Json]:
    """A DMA that begins and ends inside pages touches nothing of them beside its range."""
    driver = board.fresh()
    engine = board.engines[0]
    domain = driver.create_domain()
    driver.attach(engine.stream_id, domain)
    source, destination = Scattered(board.source, 3), Scattered(board.destination, 3)
    board.fill(source)
    board.destination.fill(UNTOUCHED)
    domain.map_pages(SOURCE, source.frames)
    domain.map_pages(DESTINATION, destination.frames)
    first, size = 0xABD, 0x1357
    outcome = board.dma(MEMCPY, SOURCE + first, size, destination=DESTINATION + first + 3)
    sent = b"".join(source.pages())[first : first + size]
    got = b"".join(destination.pages())
    blank = bytes([UNTOUCHED])
    expected = blank * (first + 3) + sent
    return {
        "status": outcome.status,
        "right": got == expected + blank * (len(got) - len(expected)),
        "stray_bytes": board.stray_bytes(destination),
        "events": board.events(),
    }


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    "4k": lambda board: scattered(board, PAGE),
    "2m": lambda board: scattered(board, HUGE),
    "64m": lambda board: scattered(board, LARGEST),
    "block": block,
    "unaligned": unaligned,
}
