"""Who has subscribed to the events, and the methods by which they do."""

from collections.abc import Callable, Hashable
from difflib import get_close_matches
from typing import Annotated, Generic, TypeVar

from pydantic import Field

from viommu.control.methods import Methods
from viommu.control.protocol import Refused
from viommu.control.subscription import Subscription, known_kinds
from viommu.trace import Event, Tracer

Client = TypeVar("Client", bound=Hashable)


class Subscribers(Generic[Client]):
    """Registers `events.subscribe`, `events.unsubscribe` and `events.kinds`.

    The events of `tracer` are read while somebody wants them; `ready` is called with a client that has some to take.
    """

    def __init__(self, tracer: Tracer, methods: Methods, ready: Callable[[Client], object]) -> None:
        self.caller: Client | None = None
        """The client whose call is carried out."""
        self._tracer, self._ready = tracer, ready
        self._subscriptions: dict[Client, Subscription] = {}
        self._end: Callable[[], None] = lambda: None
        methods.add("events.subscribe", self.subscribe)
        methods.add("events.unsubscribe", self.unsubscribe)
        methods.add("events.kinds", self.kinds)

    def of(self, client: Client) -> Subscription | None:
        """What a client has subscribed to."""
        return self._subscriptions.get(client)

    def drop(self, client: Client) -> None:
        """A client wants no events any more."""
        if self._subscriptions.pop(client, None) is not None and not self._subscriptions:
            self._end()

    def subscribe(
        self,
        kinds: list[str] = [],  # noqa: B006 - nobody changes it
        streams: list[int] = [],  # noqa: B006
        limit: Annotated[int, Field(ge=1, le=10_000)] = 1000,
    ) -> None:
        """Send the caller events from here on: of these kinds or of all, of these streams or of all."""
        if self.caller is None:
            raise Refused("events go to a client of the control socket, and nobody else")
        known = known_kinds()
        for kind in kinds:
            if kind not in known:
                close = " or ".join(get_close_matches(kind, known)) or "what events.kinds lists"
                raise Refused(f"there is no kind of event {kind!r}: try {close}")
        if not self._subscriptions:
            self._end = self._tracer.subscribe(self._read)
        self._subscriptions[self.caller] = Subscription(kinds, streams, limit)

    def unsubscribe(self) -> None:
        """Send the caller no more events; those that wait are dropped."""
        if self.caller is not None:
            self.drop(self.caller)

    def kinds(self) -> list[dict[str, str]]:
        """List the kinds of events, and what each tells."""
        return [
            {"kind": name, "tells": (kind.__doc__ or "").partition("\n")[0]}
            for name, kind in sorted(known_kinds().items())
        ]

    def _read(self, event: Event) -> None:
        for client, subscription in self._subscriptions.items():
            if subscription.offer(event):
                self._ready(client)
