"""Reads what a witness says of caches: entries that memory no longer backs, and who used them."""

from viommu.report.context import Context, Handler
from viommu.report.model import Item, Record

_LANE = "Stale"
_CACHES = 4096  # whose entries are remembered
_KEY = ("cache", "stream_id", "substream_id", "vmid", "asid")


class Stale:
    """Stale entries are a span, from when they were first seen until the last of them is gone."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._spans: dict[tuple[object, ...], Item] = {}
        self._entries: dict[tuple[object, ...], int] = {}
        self.handlers: dict[str, Handler] = {
            "EntryStale": self._stale,
            "EntriesGone": self._gone,
            "StaleUse": self._used,
            "DomainRemembered": self._remembered,
        }

    def _stale(self, record: Record) -> Item:
        context, key = self._context, _key(record)
        span = self._spans.get(key)
        if span is None:
            if len(self._spans) >= _CACHES:
                context.close(self._spans.pop(next(iter(self._spans))))
            span = self._spans[key] = context.open(
                record, self._group(record), _LANE, "stale",
                f"{_owner(record)} needs {record['command']}",
                sort=f"stale {record['cache']} entries", tone="warn",
            )  # fmt: skip
            self._entries[key] = 0
        else:
            span.add(record)
        self._entries[key] += record["entries"]
        return span

    def _gone(self, record: Record) -> Item | None:
        key = _key(record)
        span = self._spans.get(key)
        if span is None:
            return None
        self._entries[key] -= record["entries"]
        if self._entries[key] > 0:
            span.add(record)
            return span
        del self._spans[key]
        return self._context.close(span, record)

    def _used(self, record: Record) -> Item:
        context = self._context
        what = "moved" if record["moved"] else "translated"
        item = context.item(
            record, context.stream(record), "Faults", "fault",
            f"{record['size']:,} bytes at {record['iova']:#x} {what} by a stale {record['cause']}",
            sort=f"{what} by a stale {record['cause']}", tone="warn",
        )  # fmt: skip
        if context.last is not None and context.last.kind == "dma":
            item.relate(context.last)
        for key, span in self._spans.items():
            if key[0] == record["cause"] and _concerns(key, record):
                item.relate(span)
        return item

    def _remembered(self, record: Record) -> Item:
        context = self._context
        return context.item(
            record, context.smmu, _LANE, "stale",
            f"{record['entries']:,} entries of ASID {record['asid']} outlive its last stream",
            sort="domains remembered",
        )  # fmt: skip

    def _group(self, record: Record) -> str:
        context = self._context
        return context.smmu if record["stream_id"] is None else context.stream(record)

    def finish(self) -> None:
        """What is stale now stays so."""
        for span in self._spans.values():
            span.title += " (still there at the end)"
            self._context.close(span, tone="bad")


def _key(record: Record) -> tuple[object, ...]:
    return tuple(record[name] for name in _KEY)


def _owner(record: Record) -> str:
    if record["stream_id"] is None:
        return f"{record['cache']} of ASID {record['asid']}"
    return f"{record['cache']}"


def _concerns(key: tuple[object, ...], record: Record) -> bool:
    """A TLB entry belongs to a VMID and an ASID, all others to a stream."""
    _, stream_id, _, *owner = key
    if stream_id is None:
        return owner == [record["vmid"], record["asid"]]
    return bool(stream_id == record["stream_id"])
