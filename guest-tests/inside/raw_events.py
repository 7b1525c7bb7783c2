"""Refused DMA: what the engine sees, and what lands in the event queue."""

from collections.abc import Callable

from board import DESTINATION, SOURCE, UNTOUCHED, Board, Json
from engine import MEMCPY, RAND48, SUM64
from pool import HUGE, PAGE, Scattered

from viommu.driver.domain import Domain
from viommu.driver.page_tables import READ_ONLY, READ_WRITE, Access
from viommu.driver.smmu import DetachMode, SmmuDriver
from viommu.layouts.page_tables import TableDescriptor
from viommu.layouts.tables import (
    ContextTableLevel1,
    S1Default,
    S1Format,
    StreamTableEntry,
    StreamTableLevel1,
)

DATA_SIZE = HUGE
NOWHERE = 0x60_0000_0000
"""A physical address without memory, on either machine."""
OUT_OF_SIZE = 1 << 40
IPS_BITS = 36


def attached(board: Board, access: Access = READ_WRITE) -> tuple[SmmuDriver, Domain, int]:
    """A stream in a domain that maps one page of destination memory at DESTINATION."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    domain.map_pages(DESTINATION, Scattered(board.destination, 1).frames, access)
    driver.attach(stream_id, domain)
    return driver, domain, stream_id


def access(board: Board, access: Access, **options: int) -> dict[str, Json]:
    """A write, then a read, of a page that `access` describes."""
    _, _, stream_id = attached(board, access)
    board.destination.fill(UNTOUCHED)
    write = board.dma(RAND48, DESTINATION, PAGE, **options)
    write_events = board.events()
    read = board.dma(SUM64, DESTINATION, PAGE, **options)
    return {
        "stream_id": stream_id,
        "write": {"status": write.status, "events": write_events, "bytes": board.stray_bytes()},
        "read": {"status": read.status, "events": board.events()},
    }


def unmapped(board: Board, **options: int) -> dict[str, Json]:
    """A read and a write where nothing is mapped."""
    _, _, stream_id = attached(board)
    return {
        "stream_id": stream_id,
        "read": board.refused(SUM64, SOURCE + 0x10, **options),
        "write": board.refused(RAND48, SOURCE + 0x20, **options),
    }


def half_way(board: Board) -> dict[str, Json]:
    """Three pages are mapped of the four that are written: what is before the fault lands, the rest does not."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    source, destination = Scattered(board.source, 4), Scattered(board.destination, 3)
    domain.map_pages(SOURCE, source.frames)
    domain.map_pages(DESTINATION, destination.frames)
    driver.attach(stream_id, domain)
    copied = board.copy(source, destination, SOURCE, DESTINATION)
    return {"stream_id": stream_id, "copy": copied, "events": board.events()}


def address_size(board: Board) -> dict[str, Json]:
    """A descriptor whose output is wider than CD.IPS."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    domain.map(SOURCE, OUT_OF_SIZE, PAGE)
    domain.output_bits = IPS_BITS
    driver.attach(stream_id, domain)
    return {"stream_id": stream_id, "read": board.refused(SUM64, SOURCE)}


def walk_abort(board: Board) -> dict[str, Json]:
    """A table descriptor that points where there is no memory."""
    _, domain, stream_id = attached(board)
    assert domain.lower is not None
    # Level 0 has 512 GiB a descriptor.
    slot = 3
    link = TableDescriptor(valid=True, table=True, next_table=NOWHERE)
    board.poke(domain.lower.root + 8 * slot, link.value)
    iova = (slot << 39) + (5 << 30)
    return {
        "stream_id": stream_id,
        "iova": iova,
        "fetch_addr": NOWHERE + 8 * 5,
        "read": board.refused(SUM64, iova),
    }


def stream_id_outside(board: Board, *, split: int | None) -> dict[str, Json]:
    """A StreamID that the table has no entry for: above a linear table, or without a second level."""
    board.fresh(split=split, log2size=4 if split is None else None)
    return {
        "stream_id": board.engines[0].stream_id,
        "read": board.refused(SUM64, SOURCE),
        "write": board.refused(RAND48, DESTINATION),
    }


def ste_fetch(board: Board) -> dict[str, Json]:
    """A second-level stream table that is not in memory."""
    driver = board.fresh(split=8)
    stream_id = board.engines[0].stream_id
    link = StreamTableLevel1(span=9, l2_ptr=NOWHERE)
    board.poke(driver.table.base.addr, link.value)
    return {
        "stream_id": stream_id,
        "fetch_addr": NOWHERE + 64 * stream_id,
        "read": board.refused(SUM64, SOURCE),
    }


def illegal_ste(board: Board) -> dict[str, Json]:
    """An STE that is valid and says something ILLEGAL: more substreams than there are."""
    driver, _, stream_id = attached(board)
    words = driver.table.entry(stream_id)
    entry = StreamTableEntry(words[0])
    entry.s1_cd_max = 31
    words[0] = entry.value
    driver.invalidate_stream(stream_id)
    return {"stream_id": stream_id, "read": board.refused(SUM64, DESTINATION)}


def cd_fetch(board: Board) -> dict[str, Json]:
    """A CD that is not in memory."""
    driver, _, stream_id = attached(board)
    words = driver.table.entry(stream_id)
    entry = StreamTableEntry(words[0])
    entry.s1_context_ptr = NOWHERE
    words[0] = entry.value
    driver.invalidate_stream(stream_id)
    return {
        "stream_id": stream_id,
        "fetch_addr": NOWHERE,
        "read": board.refused(SUM64, DESTINATION),
    }


def substreams(board: Board) -> dict[str, Json]:
    """Substreams outside the CD table, without a CD, with a CD that is not in memory; and faults of one that exists."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    driver.attach(
        stream_id,
        domain,
        substream_id=1,
        substream_bits=11,
        context_format=S1Format.TWO_LEVEL_4K,
        default=S1Default.TERMINATE,
    )
    entry = StreamTableEntry(driver.table.entry(stream_id)[0])
    # CDs of 64 and on: the second descriptor of level 1.
    link = ContextTableLevel1(valid=True, l2_ptr=NOWHERE)
    board.poke(entry.s1_context_ptr + 8, link.value)
    return {
        "stream_id": stream_id,
        "outside": board.refused(SUM64, SOURCE, substream_id=0x800),
        "no_leaf": board.refused(SUM64, SOURCE, substream_id=0x200),
        "no_cd": board.refused(SUM64, SOURCE, substream_id=2),
        "no_memory": board.refused(SUM64, SOURCE, substream_id=65),
        "fetch_addr": NOWHERE + 64,
        "unmapped": board.refused(SUM64, SOURCE, substream_id=1),
        "none": board.refused(SUM64, SOURCE),
    }


def no_substreams(board: Board) -> dict[str, Json]:
    """A SubstreamID where the STE has none to offer: with one CD, and in bypass."""
    driver, _, stream_id = attached(board)
    translated = board.refused(SUM64, DESTINATION, substream_id=1)
    driver.attach_bypass(stream_id)
    bypassed = board.refused(SUM64, board.source.bases[0], substream_id=1)
    return {"stream_id": stream_id, "translated": translated, "bypassed": bypassed}


def no_bus_master(board: Board) -> dict[str, Json]:
    """A function that may not do DMA: the SMMU sees nothing of it."""
    attached(board)
    function = board.engines[0].function
    function.set_bus_master(False)
    try:
        refused = board.refused(RAND48, DESTINATION)
    finally:
        function.set_bus_master(True)
    outcome = board.dma(RAND48, DESTINATION, PAGE)
    return {"refused": refused, "again": outcome.status, "events": board.events()}


def gbpa(board: Board) -> dict[str, Json]:
    """The SMMU off: GBPA aborts, or lets through."""
    driver, _, _ = attached(board)
    driver.disable(abort=True)
    aborted = board.refused(RAND48, DESTINATION)
    driver.disable(abort=False)
    source, destination = Scattered(board.source, 1), Scattered(board.destination, 1)
    copied = board.copy(source, destination, source.frames[0], destination.frames[0])
    driver.disable(abort=True)
    return {
        "aborted": aborted,
        "bypassed": copied,
        "again": board.refused(RAND48, destination.frames[0]),
    }


def overflow(board: Board) -> dict[str, Json]:
    """Six faults for a queue of four: four records stay, the overflow is seen once, and the queue goes on."""
    driver = board.fresh(event_queue_log2=2)
    stream_id = board.engines[0].stream_id
    driver.attach(stream_id, driver.create_domain())
    for page in range(6):
        board.dma(SUM64, SOURCE + page * PAGE, PAGE)
    first = board.events()
    overflows = driver.event_queue.overflows
    after = board.refused(SUM64, SOURCE + 6 * PAGE)
    return {
        "stream_id": stream_id,
        "first": first,
        "overflows": overflows,
        "after": after,
        "overflows_after": driver.event_queue.overflows,
    }


def both_directions(board: Board) -> dict[str, Json]:
    """A copy whose source is there and whose destination is not, and the other way round."""
    driver = board.fresh()
    stream_id = board.engines[0].stream_id
    domain = driver.create_domain()
    domain.map_pages(SOURCE, Scattered(board.source, 1).frames)
    driver.attach(stream_id, domain)
    return {
        "stream_id": stream_id,
        "no_destination": board.refused(MEMCPY, SOURCE, destination=DESTINATION),
        "no_source": board.refused(MEMCPY, DESTINATION, destination=SOURCE),
    }


def invalid(board: Board, how: DetachMode) -> dict[str, Json]:
    """An invalid STE or CD: reads and writes alike."""
    driver, _, stream_id = attached(board)
    driver.detach(stream_id, how)
    return {
        "stream_id": stream_id,
        "read": board.refused(SUM64, DESTINATION),
        "write": board.refused(RAND48, DESTINATION),
    }


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    "unmapped": unmapped,
    "unmapped-privileged": lambda board: unmapped(board, privileged=True),
    "unmapped-instruction": lambda board: unmapped(board, instruction=True),
    "both-directions": both_directions,
    "half-way": half_way,
    "read-only": lambda board: access(board, READ_ONLY),
    "privileged-page": lambda board: access(board, Access(privileged=True)),
    "privileged-page-by-privileged": lambda board: access(
        board, Access(privileged=True), privileged=True
    ),
    "never-executed": lambda board: access(board, Access(), instruction=True),
    "executable": lambda board: access(board, Access(execute=True), instruction=True),
    "access-flag": lambda board: access(board, Access(accessed=False)),
    "address-size": address_size,
    "walk-abort": walk_abort,
    "bad-streamid-linear": lambda board: stream_id_outside(board, split=None),
    "bad-streamid-two-level": lambda board: stream_id_outside(board, split=8),
    "ste-fetch": ste_fetch,
    "ste-invalid": lambda board: invalid(board, DetachMode.STE_INVALID),
    "ste-illegal": illegal_ste,
    "cd-fetch": cd_fetch,
    "cd-invalid": lambda board: invalid(board, DetachMode.CD_INVALID),
    "ste-abort": lambda board: invalid(board, DetachMode.STE_ABORT),
    "substreams": substreams,
    "no-substreams": no_substreams,
    "no-bus-master": no_bus_master,
    "gbpa": gbpa,
    "overflow": overflow,
}
