"""The one stream of events: what happened in the models, for whoever wants to read along.

Event types are frozen dataclasses defined next to what emits them. With no reader an emitter does one truth test:

    if tracer:
        tracer.emit(CommandConsumed(...))
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """Root of everything that is emitted. Its fields are plain values: numbers, strings, flags."""

    @property
    def kind(self) -> str:
        """The name of the event's type."""
        return type(self).__name__

    def as_dict(self) -> dict[str, Any]:
        """The event as plain values, `kind` first, for JSON."""
        names = self.__dataclass_fields__
        return {"kind": self.kind, **{name: getattr(self, name) for name in names}}


class Tracer:
    """Hands each event to every reader, in the order in which they subscribed.

    A reader may emit: what it says comes after what it was called with, for every reader.
    """

    def __init__(self) -> None:
        self._readers: list[Callable[[Event], None]] = []
        self._pending: deque[Event] = deque()

    def subscribe(self, reader: Callable[[Event], None]) -> Callable[[], None]:
        """Call `reader` with every event from now on. Returns the function that ends it."""
        self._readers.append(reader)
        return lambda: self._readers.remove(reader)

    def __bool__(self) -> bool:
        return bool(self._readers)

    def emit(self, event: Event) -> None:
        """Hand `event` to the readers."""
        pending = self._pending
        pending.append(event)
        if len(pending) > 1:
            return  # by a reader: the call that it is in comes to it
        try:
            while pending:
                for reader in tuple(self._readers):
                    reader(pending[0])
                pending.popleft()
        finally:
            pending.clear()
