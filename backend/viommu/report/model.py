"""The parts of a time line, and how neighbours become one when there are too many of them."""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]

_EVENTS = 4
_FINEST = 1e-6  # seconds: what a trace tells apart
_RELATED = 32


@dataclass(slots=True, eq=False)
class Item:
    """Something that took from `begin` to `end`, in seconds; an instant when they are the same.

    `tone` is how to take it: `good`, `bad`, `warn`, or nothing. `sort` is what it has in common with the neighbours
    that it may become one with; `count` says how many it stands for. `events` has some of those that it is made of. It
    stays what it is while it is `open`, and if it is `evidence` of something.
    """

    kind: str
    title: str
    begin: float
    end: float
    tone: str = ""
    sort: str = ""
    events: list[Record] = field(default_factory=list)
    related: list["Item"] = field(default_factory=list)
    count: int = 1
    size: int = 0
    row: int = 0
    open: bool = False
    evidence: bool = False
    _into: "Item | None" = None

    def current(self) -> "Item":
        """Itself, or what it has become part of."""
        item = self
        while item._into is not None:
            item = item._into
        return item

    def add(self, event: Record) -> None:
        """Keep `event` as one of those that it is made of."""
        if len(self.events) < _EVENTS:
            self.events.append(event)
        else:
            self.events[-1] = event

    def relate(self, other: "Item") -> None:
        """The two belong together. Of very many, some are remembered."""
        for one, another in ((self, other), (other, self)):
            if len(one.related) < _RELATED:
                one.related.append(another)

    def absorb(self, other: "Item") -> None:
        """Become one with a neighbour that follows."""
        other._into = self
        self.end = max(self.end, other.end)
        self.count += other.count
        self.size += other.size
        self.related += other.related[: _RELATED - len(self.related)]
        if self.title != other.title:
            self.title = self.sort
        if self.tone != other.tone:
            self.tone = "bad" if "bad" in (self.tone, other.tone) else ""
        for event in other.events[-1:]:
            self.add(event)
        other.events, other.related = [], []


@dataclass(slots=True, eq=False)
class Lane:
    """Items of one sort in one place, in the order in which they began."""

    group: str
    name: str
    items: list[Item] = field(default_factory=list)

    def merge(self, grain: float) -> None:
        """Make one of items of the same sort that lie within `grain` seconds."""
        last: dict[str, Item] = {}
        kept: list[Item] = []
        for item in sorted(self.items, key=lambda each: each.begin):
            before = last.get(item.sort)
            fixed = item.open or item.evidence
            if fixed or before is None or item.end - before.begin >= grain:
                kept.append(item)
                if not fixed:
                    last[item.sort] = item
            else:
                before.absorb(item)
        self.items = kept

    def pack(self) -> None:
        """Give items that overlap different rows, as few as possible."""
        self.items.sort(key=lambda item: (item.begin, -item.end))
        busy: list[tuple[float, int]] = []
        free: list[int] = []
        rows = 0
        for item in self.items:
            while busy and busy[0][0] <= item.begin:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if not free:
                heapq.heappush(free, rows)
                rows += 1
            item.row = heapq.heappop(free)
            heapq.heappush(busy, (item.end, item.row))


class Lanes:
    """All lanes. With more than `budget` items, neighbours become one until half of that is left."""

    def __init__(self, budget: int) -> None:
        self._limit, self._total = budget, 0
        self._lanes: dict[tuple[str, str], Lane] = {}
        self.grain = 0.0
        """Items of the same sort that lay within so many seconds have become one; 0 when none have."""

    def add(self, group: str, name: str, item: Item) -> Item:
        """Put `item` into the lane `name` of `group`. Returns it."""
        lane = self._lanes.get((group, name))
        if lane is None:
            lane = self._lanes[group, name] = Lane(group, name)
        lane.items.append(item)
        self._total += 1
        if self._total > self._limit:
            self._shrink()
        return item

    def _shrink(self) -> None:
        """With the grain of now, and a coarser one while that is not enough; what is fixed stays."""
        target = self._limit // 2
        longest = max(item.end for item in self) - min(item.begin for item in self)
        self._merge()
        while self._total > target and self.grain <= longest:
            self.grain = max(2 * self.grain, _FINEST)
            self._merge()
        self._limit = max(self._limit, 2 * self._total)

    def _merge(self) -> None:
        for lane in self._lanes.values():
            lane.merge(self.grain)
        self._total = sum(len(lane.items) for lane in self._lanes.values())

    def __iter__(self) -> Iterator[Item]:
        return (item for lane in self._lanes.values() for item in lane.items)

    def packed(self) -> list[Lane]:
        """The lanes, each with its items in rows."""
        for lane in self._lanes.values():
            lane.pack()
        return list(self._lanes.values())
