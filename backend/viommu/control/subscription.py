"""The events that one client of a control socket wants, until it takes them."""

import time
from collections import deque
from collections.abc import Collection
from typing import Any

from viommu.trace import Event, Point

EVENT, LOST = "events.event", "events.lost"
"""The two notifications: an event, and how many there was no room for in its place."""


class Subscription:
    """Keeps at most `limit` events. What comes while it is full is lost, and counted where it is missing."""

    def __init__(self, kinds: Collection[str], streams: Collection[int], limit: int) -> None:
        """Without `kinds` every kind is wanted; with `streams` only what tells of one of them."""
        self._kinds, self._streams = frozenset(kinds), frozenset(streams)
        self._limit = limit
        self._start = time.monotonic()
        self._count = self._lost = 0
        # An event with its number and time; or a number of lost ones.
        self._queue: deque[tuple[int, float, Event] | int] = deque()

    def __bool__(self) -> bool:
        """There is something to take."""
        return bool(self._queue or self._lost)

    def offer(self, event: Event) -> bool:
        """Keep `event` if it is wanted; whether it was."""
        if self._kinds and event.kind not in self._kinds:
            return False
        if self._streams and getattr(event, "stream_id", None) not in self._streams:
            return False
        self._count += 1
        if len(self._queue) >= self._limit:
            self._lost += 1
            return True
        if self._lost:
            self._queue.append(self._lost)
            self._lost = 0
        self._queue.append((self._count, time.monotonic() - self._start, event))
        return True

    def take(self) -> dict[str, Any]:
        """The oldest of what there is to take, as a notification."""
        if not self._queue:
            lost, self._lost = self._lost, 0
            return _notification(LOST, {"count": lost})
        match self._queue.popleft():
            case int(lost):
                return _notification(LOST, {"count": lost})
            case number, seconds, event:
                told = {"seq": number, "time": round(seconds, 6), **event.as_dict()}
                return _notification(EVENT, told)


def _notification(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": parameters}


def known_kinds() -> dict[str, type[Event]]:
    """Every type of event that something here emits, by name."""
    found: dict[str, type[Event]] = {}
    parents: list[type[Event]] = [Event]
    while parents:
        for kind in parents.pop().__subclasses__():
            if not issubclass(kind, Point):
                parents.append(kind)
                found[kind.__name__] = kind
    return found
