"""What the readers of the different events have in common."""

from collections.abc import Callable
from typing import Any

from viommu.report.model import Item, Lanes, Record

Handler = Callable[[Record], Item | None]

_STREAMS = 64
_MANY = "further streams"


class Context:
    """Where readers put items. `prefix` tells the host's SMMU from the guest's.

    `last` is what the event before made, for what belongs to it.
    """

    def __init__(self, lanes: Lanes, prefix: str = "") -> None:
        self._lanes = lanes
        self._prefix = prefix
        self._streams: set[int] = set()
        self.smmu = f"{prefix}SMMU"
        self.now = 0.0
        self.last: Item | None = None

    def stream(self, record: Record) -> str:
        """The group of the record's stream. A guest can name any number of them."""
        stream_id = record["stream_id"]
        if stream_id not in self._streams:
            if len(self._streams) == _STREAMS:
                return f"{self._prefix}{_MANY}"
            self._streams.add(stream_id)
        return f"{self._prefix}stream {stream_id:#x}"

    def group(self, name: str) -> str:
        """The group of a function, or of what else has a name."""
        return f"{self._prefix}function {name}"

    def item(
        self, record: Record, group: str, lane: str, kind: str, title: str, **more: Any
    ) -> Item:
        """An instant, made of `record`. What else is given goes to `Item`."""
        time = self.now
        item = Item(kind, title, time, time, **{"sort": title, **more})
        item.add(record)
        return self._lanes.add(group, lane, item)

    def open(
        self, record: Record, group: str, lane: str, kind: str, title: str, **more: Any
    ) -> Item:
        """An item that lasts until it is closed."""
        return self.item(record, group, lane, kind, title, open=True, **more)

    def close(self, item: Item, record: Record | None = None, tone: str | None = None) -> Item:
        """The item ends now."""
        item.end = self.now
        item.open = False
        if record is not None:
            item.add(record)
        if tone is not None:
            item.tone = tone
        return item
