"""Attach: to domains by every form of table, to bypass, two endpoints at once."""

from collections.abc import Callable

from board import DESTINATION, SOURCE, UNTOUCHED, Board, Json
from engine import MEMCPY, SUM64
from pool import HUGE, PAGE, Scattered

from viommu.driver.queues import Completion
from viommu.layouts.tables import S1Format

DATA_SIZE = HUGE


def attach(
    board: Board, *, split: int | None = 8, completion: Completion | None = None
) -> dict[str, Json]:
    """Refused before the attach, translated after it, refused after the detach."""
    driver = board.fresh(split=split, completion=completion)
    engine = board.engines[0]
    domain = driver.create_domain()
    before = board.refused(SUM64, SOURCE)
    driver.attach(engine.stream_id, domain)
    attached = board.copy_works(domain, pages=4)
    driver.detach(engine.stream_id)
    after = board.refused(MEMCPY, SOURCE, destination=DESTINATION)
    return {
        "stream_id": engine.stream_id,
        "before": before,
        "attached": attached,
        "after": after,
        "events": board.events(),
    }


def bypass(board: Board) -> dict[str, Json]:
    """An IOVA is a physical address."""
    driver = board.fresh()
    engine = board.engines[0]
    driver.attach_bypass(engine.stream_id)
    source, destination = Scattered(board.source, 1), Scattered(board.destination, 1)
    copied = board.copy(source, destination, source.frames[0], destination.frames[0])
    driver.attach_abort(engine.stream_id)
    after = board.refused(MEMCPY, source.frames[0], destination=destination.frames[0])
    return {"attached": copied, "after": after, "events": board.events()}


def two_domains(board: Board) -> dict[str, Json]:
    """Both engines use the same IOVAs, at the same time; each reaches the pages of its own domain."""
    driver = board.fresh()
    size = DATA_SIZE // 2
    sources = Scattered(board.source), Scattered(board.destination)
    board.fill(sources[0])
    board.destination.fill(UNTOUCHED)
    half = size // PAGE
    for place, engine in enumerate(board.engines):
        domain = driver.create_domain()
        frames = sources[0].frames[place * half : (place + 1) * half]
        domain.map_pages(SOURCE, frames)
        domain.map_pages(DESTINATION, sources[1].frames[place * half : (place + 1) * half])
        driver.attach(engine.stream_id, domain)
    frames_of = [board.frame(engine) for engine in range(2)]
    for frame in frames_of:
        frame.start(MEMCPY, SOURCE, size, destination=DESTINATION)
    outcomes = [frame.wait() for frame in frames_of]
    return {
        "status": [outcome.status for outcome in outcomes],
        "pages": 2 * half,
        "right_pages": board.right_pages(sources[1]),
        "events": board.events(),
    }


def same_page_apart(board: Board) -> dict[str, Json]:
    """What one domain maps, the other's endpoint cannot reach."""
    driver = board.fresh()
    first, second = board.engines
    one, two = driver.create_domain(), driver.create_domain()
    driver.attach(first.stream_id, one)
    driver.attach(second.stream_id, two)
    attached = board.copy_works(one)
    refused = board.refused(SUM64, SOURCE, engine=1)
    return {"stream_id": second.stream_id, "attached": attached, "after": refused}


def context_table(board: Board, layout: S1Format) -> dict[str, Json]:
    """A CD table for 2^11 substreams: one DMA without a SubstreamID and two with, each in a domain of its own."""
    driver = board.fresh()
    engine = board.engines[0]
    result: dict[str, Json] = {"stream_id": engine.stream_id}
    sources, destinations = Scattered(board.source, 3), Scattered(board.destination, 3)
    board.fill(sources)
    board.destination.fill(UNTOUCHED)
    status: list[Json] = []
    for place, substream_id in enumerate((0, 1, 0x7FF)):
        domain = driver.create_domain()
        domain.map_pages(SOURCE, sources.frames[place : place + 1])
        domain.map_pages(DESTINATION, destinations.frames[place : place + 1])
        driver.attach(
            engine.stream_id,
            domain,
            substream_id=substream_id,
            substream_bits=11,
            context_format=layout,
        )
    for by in (None, 1, 0x7FF):
        frame = board.frame()
        frame.start(MEMCPY, SOURCE, PAGE, destination=DESTINATION, substream_id=by)
        status.append(frame.wait().status)
    result["status"] = status
    result["right_pages"] = board.right_pages(destinations)
    result["stray_bytes"] = board.stray_bytes(destinations)
    result["events"] = board.events()
    result["after"] = board.refused(SUM64, SOURCE, substream_id=0x7FE)
    return result


def input_size(board: Board, bits: int, *, upper: bool = False) -> dict[str, Json]:
    """The last page of the range translates, the one after it does not."""
    driver = board.fresh()
    engine = board.engines[0]
    if upper:
        domain = driver.create_domain(lower_bits=None, upper_bits=bits)
        begin, to = (1 << 64) - (1 << bits), (1 << 64) - 16 * PAGE
        outside = begin - PAGE
    else:
        domain = driver.create_domain(lower_bits=bits)
        begin, to = 0, (1 << bits) - PAGE
        outside = 1 << bits
    driver.attach(engine.stream_id, domain)
    source, destination = Scattered(board.source, 1), Scattered(board.destination, 1)
    domain.map_pages(begin, source.frames)
    domain.map_pages(to, destination.frames)
    attached = board.copy(source, destination, begin, to)
    return {
        "stream_id": engine.stream_id,
        "attached": attached,
        "events": board.events(),
        "outside": outside,
        "after": board.refused(SUM64, outside),
    }


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    "linear": lambda board: attach(board, split=None),
    "two-level-6": lambda board: attach(board, split=6),
    "two-level-8": lambda board: attach(board, split=8),
    "two-level-10": lambda board: attach(board, split=10),
    "sync-by-cons": lambda board: attach(board, completion=Completion.CONS),
    "sync-by-sev": lambda board: attach(board, completion=Completion.SEV),
    "sync-by-msi": lambda board: attach(board, completion=Completion.MSI),
    "bypass": bypass,
    "two-domains": two_domains,
    "isolation": same_page_apart,
    "cd-linear": lambda board: context_table(board, S1Format.LINEAR),
    "cd-4k": lambda board: context_table(board, S1Format.TWO_LEVEL_4K),
    "cd-64k": lambda board: context_table(board, S1Format.TWO_LEVEL_64K),
    "ttbr0-48": lambda board: input_size(board, 48),
    "ttbr0-39": lambda board: input_size(board, 39),
    "ttbr0-32": lambda board: input_size(board, 32),
    "ttbr0-30": lambda board: input_size(board, 30),
    "ttbr0-25": lambda board: input_size(board, 25),
    "ttbr1-48": lambda board: input_size(board, 48, upper=True),
    "ttbr1-39": lambda board: input_size(board, 39, upper=True),
    "ttbr1-25": lambda board: input_size(board, 25, upper=True),
}
