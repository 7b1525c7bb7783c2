"""Reads what happens to transactions: DMA, its faults and the records of them, ATS and PRI."""

from viommu.report.context import Context, Handler
from viommu.report.model import Item, Record

_IN_FLIGHT = 4096  # that are remembered; a run can leave any number behind

Key = tuple[object, ...]


class Transactions:
    """DMA is a span from its translation to where its bytes moved, or to where it was refused."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._in_flight: dict[Key, Item] = {}
        self._held: dict[Key, Item] = {}
        self._asked: dict[Key, Item] = {}
        self._fault: dict[int, Item] = {}
        self.handlers: dict[str, Handler] = {
            "Translated": self._translated,
            "DmaMoved": self._moved,
            "DmaRefused": self._refused,
            "Aborted": self._aborted,
            "TransactionHeld": self._stalled,
            "EventRecorded": self._recorded,
            "EventLost": self._lost,
            "TranslationCompleted": self._completed,
            "PageRequested": self._page_requested,
            "PageResponded": self._page_responded,
        }

    def _translated(self, record: Record) -> Item:
        context = self._context
        held = self._held.pop(_place(record), None)
        item = context.open(
            record, context.stream(record), "DMA", "dma",
            f"{_direction(record)} of {record['size']:,} bytes at {record['iova']:#x}",
            sort=f"DMA {_direction(record)}", size=record["size"],
        )  # fmt: skip
        if held is not None:
            context.close(held, record).relate(item)
        _remember(self._in_flight, _key(record), item)
        return item

    def _moved(self, record: Record) -> Item:
        item = self._in_flight.pop(_key(record), None)
        if item is not None:
            return self._context.close(item, record, "good")
        context = self._context  # behind no SMMU
        return context.item(
            record, context.stream(record), "DMA", "dma",
            f"{_direction(record)} of {record['size']:,} bytes at {record['iova']:#x}",
            sort=f"DMA {_direction(record)}", size=record["size"], tone="good",
        )  # fmt: skip

    def _refused(self, record: Record) -> Item:
        context = self._context
        begun = next((i for i in self._in_flight.values() if _same_access(i, record)), None)
        if begun is not None:  # memory refused what the SMMU had let through
            del self._in_flight[_key(begun.events[0])]
            context.close(begun, record, "bad")
            return begun
        item = context.item(
            record, context.stream(record), "DMA", "dma",
            f"{_direction(record)} at {record['iova']:#x} refused: {record['why']}",
            sort=f"DMA {_direction(record)} refused", tone="bad",
        )  # fmt: skip
        fault = self._fault.get(record["stream_id"])
        if fault is not None and _same_access(fault, record):
            item.relate(fault)
        return item

    def _aborted(self, record: Record) -> Item:
        context = self._context
        name = record["event"] or "silent abort"
        item = context.item(
            record, context.stream(record), "Faults", "fault",
            f"{name}: {_direction(record)} at {record['iova']:#x}",
            sort=name, tone="bad" if record["event"] else "warn",
        )  # fmt: skip
        if (held := self._held.pop(_place(record), None)) is not None:
            context.close(held, record, "bad").relate(item)
        self._fault[record["stream_id"]] = item
        return item

    def _stalled(self, record: Record) -> Item:
        context = self._context
        stag = "no room for a record" if record["stag"] is None else f"STAG {record['stag']:#x}"
        item = context.open(
            record, context.stream(record), "Faults", "fault",
            f"stalled by {record['event']} at {record['iova']:#x} ({stag})",
            sort=f"stalled by {record['event']}", tone="warn",
        )  # fmt: skip
        _remember(self._held, _place(record), item)
        self._fault[record["stream_id"]] = item
        return item

    def _recorded(self, record: Record) -> Item:
        context = self._context
        title = f"record {record['event']}"
        group = context.stream(record)
        item = context.item(record, group, "Records", "record", title, tone="bad")
        return self._with_fault(item, record)

    def _lost(self, record: Record) -> Item:
        context = self._context
        item = context.item(
            record, context.stream(record), "Records", "record",
            f"record {record['event']} lost: {record['why']}",
            sort=f"record {record['event']} lost", tone="warn",
        )  # fmt: skip
        return self._with_fault(item, record)

    def _with_fault(self, item: Item, record: Record) -> Item:
        fault = self._fault.get(record["stream_id"])
        if fault is not None and fault.events and fault.events[-1].get("event") == record["event"]:
            item.relate(fault)
        return item

    # ATS and PRI

    def _completed(self, record: Record) -> Item:
        context = self._context
        return context.item(
            record, context.stream(record), "ATS", "dma",
            f"translation of {record['iova']:#x}: {record['status']} {record['permissions']}",
            sort=f"translation {record['status']}",
            tone="good" if record["status"] == "SUCCESS" else "warn",
        )  # fmt: skip

    def _page_requested(self, record: Record) -> Item:
        context = self._context
        queued = record["outcome"] == "queued"
        item = (context.open if queued else context.item)(
            record, context.stream(record), "PRI", "dma",
            f"page request for {record['address']:#x}, group {record['prg_index']}: {record['outcome']}",
            sort=f"page request {record['outcome']}", tone="" if queued else "warn",
        )  # fmt: skip
        if queued:
            _remember(self._asked, (record["stream_id"], record["prg_index"]), item)
        return item

    def _page_responded(self, record: Record) -> Item:
        item = self._asked.pop((record["stream_id"], record["prg_index"]), None)
        if item is not None:
            return self._context.close(item, record)
        context = self._context
        title = f"page response {record['code']}"
        return context.item(record, context.stream(record), "PRI", "dma", title)

    def finish(self) -> None:
        """What is in flight now stays so."""
        for waiting in (self._in_flight, self._held, self._asked):
            for item in waiting.values():
                self._context.close(item)
                item.title += " (still open at the end)"


def _remember(items: dict[Key, Item], key: Key, item: Item) -> None:
    if len(items) >= _IN_FLIGHT:
        items.pop(next(iter(items))).open = False
    if (before := items.pop(key, None)) is not None:
        before.open = False
    items[key] = item


def _key(record: Record) -> Key:
    if "transaction" in record:
        return (record["transaction"],)
    return record["stream_id"], record["substream_id"], record["iova"], record["write"]


def _place(record: Record) -> Key:
    return record["stream_id"], record["iova"]


def _direction(record: Record) -> str:
    return "write" if record["write"] else "read"


def _same_access(item: Item, record: Record) -> bool:
    """Whether the refused access is that of `item`, or a part of it."""
    if not item.events:
        return False
    first = item.events[0]
    behind: int = record["iova"] - first["iova"]
    return bool(
        first["stream_id"] == record["stream_id"]
        and first.get("write", record["write"]) == record["write"]
        and 0 <= behind < max(first.get("size", 1), 1)
    )
