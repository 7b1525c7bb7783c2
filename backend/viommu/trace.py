"""The one stream of events: what happened in the models, for whoever wants to read along; and points, where what
happens next can be made to go wrong.

Event types are frozen dataclasses defined next to what emits them. With no reader an emitter does one truth test:

    if tracer:
        tracer.emit(CommandConsumed(...))

A point is an event that is answered. Without a meddler it costs one look at an attribute, and is never made:

    if tracer.meddler is not None:
        verdict = tracer.meddler(CommandFetched(...))
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """Root of everything that is emitted. Its fields are plain values: numbers, strings, flags.

    In JSON anything else is told as Python shows it.
    """

    @property
    def kind(self) -> str:
        """The name of the event's type."""
        return type(self).__name__

    def as_dict(self) -> dict[str, Any]:
        """The event as plain values, `kind` first, for JSON."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}


# What can be done at a point, as far as the point's type says that it can.


@dataclass(frozen=True, slots=True)
class Verdict:
    """Root of what a meddler can answer. None is: go on."""


@dataclass(frozen=True, slots=True)
class Skip(Verdict):
    """Do not do it, and go on as if it had been done."""


@dataclass(frozen=True, slots=True)
class Replace(Verdict):
    """Go on with `value` instead of what the point shows as its `value`."""

    value: Any


@dataclass(frozen=True, slots=True)
class Again(Verdict):
    """Do it, and then `count` times more."""

    count: int = 1


@dataclass(frozen=True, slots=True)
class Refuse(Verdict):
    """Let it fail with the error `code` of its kind: an event type, a command error. None fails in silence."""

    code: int | None = None


@dataclass(frozen=True, slots=True)
class BusAbort(Verdict):
    """Let the access to memory end in an external abort."""


class Hold:
    """Something waits until `release` is called; then everyone who said so with `then` goes on."""

    def __init__(self) -> None:
        self.released = False
        self._proceed: list[Callable[[], object]] = []

    def then(self, proceed: Callable[[], object]) -> None:
        """Call `proceed` when it is released; at once when it was."""
        if self.released:
            proceed()
        else:
            self._proceed.append(proceed)

    def release(self) -> None:
        """Go on. Releasing twice does nothing."""
        self.released = True
        waiting, self._proceed = self._proceed, []
        for proceed in waiting:
            proceed()


@dataclass(frozen=True, slots=True)
class Wait(Verdict):
    """Do it, and all that comes behind it, when `hold` is released, which may be never."""

    hold: Hold


@dataclass(frozen=True, slots=True)
class Defer(Verdict):
    """Go on as if it had been done, and do it when `hold` is released, which may be never."""

    hold: Hold


@dataclass(frozen=True, slots=True)
class Point(Event):
    """Root of the places where a meddler is asked. `verdicts` are those that the place understands."""

    verdicts: ClassVar[frozenset[type[Verdict]]] = frozenset()
    codes: ClassVar[Mapping[str, int]] = {}
    """The errors by which `Refuse` can let it fail, by name; in silence it always can."""

    @property
    def value_bits(self) -> int:
        """The width of the `value` of a point that understands `Replace` by a number."""
        return 64


class Tracer:
    """Hands each event to every reader, in the order in which they subscribed; and each point to the `meddler`.

    A reader may emit: what it says comes after what it was called with, for every reader.
    """

    def __init__(self) -> None:
        self._readers: list[Callable[[Event], None]] = []
        self._pending: deque[tuple[Event, bool]] = deque()
        self.caused = False
        """The event that a reader is called with was emitted while something was done on purpose."""
        self.meddler: Callable[[Point], Verdict | None] | None = None
        """Decides at each point what goes wrong; set while somebody wants that."""

    def subscribe(self, reader: Callable[[Event], None]) -> Callable[[], None]:
        """Call `reader` with every event from now on. Returns the function that ends it."""
        self._readers.append(reader)
        return lambda: self._readers.remove(reader)

    def __bool__(self) -> bool:
        return bool(self._readers)

    @contextmanager
    def causing(self) -> Iterator[None]:
        """What is emitted meanwhile, and what readers say to that, is `caused`."""
        before, self.caused = self.caused, True
        try:
            yield
        finally:
            self.caused = before

    def emit(self, event: Event) -> None:
        """Hand `event` to the readers."""
        pending, caused = self._pending, self.caused
        pending.append((event, caused))
        if len(pending) > 1:
            return  # by a reader: the call that it is in comes to it
        try:
            while pending:
                event, self.caused = pending[0]
                for reader in tuple(self._readers):
                    reader(event)
                pending.popleft()
        finally:
            self.caused = caused
            pending.clear()
