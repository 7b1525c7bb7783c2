"""The functions at the other end of the SMMU's ATS port: who they are, and what they still have to answer.

IHI 0070, 3.9.1 and 4.5. In hardware the Root Complex stands in between; here a function is called directly.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from viommu.smmu.barrier import InFlight
from viommu.smmu.events import AtcInvalidationGivenUp, AtcInvalidationSent
from viommu.smmu.points import AtcInvalidating
from viommu.smmu.pri_queue import PageResponse
from viommu.trace import Again, Defer, Refuse, Skip, Tracer

INVALIDATE_QUEUE_DEPTH = 32
"""How many Invalidate Requests a function takes before it answers one: PCIe tells them apart by so many tags."""


class InvalidateRequest(NamedTuple):
    """An ATS Invalidate Request: `size` bytes, a power of two, from `address`, which is aligned to it.

    Without a PASID (`substream_id` None) it concerns the translations of every PASID too. `global_` is the Global
    Invalidate flag.
    """

    substream_id: int | None
    address: int
    size: int
    global_: bool = False


class HeldTranslation(NamedTuple):
    """What a function remembers: `size` bytes from `iova` go to `address`, for reading, for writing, or both."""

    substream_id: int | None
    privileged: bool
    iova: int
    size: int
    address: int
    read: bool
    write: bool


class AtsFunction(Protocol):
    """A PCIe function that has an address translation cache."""

    def held(self) -> Iterable[HeldTranslation]:
        """What its cache has: hardware would not tell, a laboratory does."""
        ...

    def invalidate(self, request: InvalidateRequest, complete: Callable[[], None]) -> None:
        """Forget translations. `complete` is called when nothing that used them is in flight any more.

        That may be at once, later, or never. Calling it twice does nothing.
        """
        ...

    def page_response(self, response: PageResponse) -> None:
        """A page request group has its answer."""
        ...


class _Invalidation:
    """One Invalidate Request that waits for its completion."""

    __slots__ = ("stream_id",)

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


class AtsPort:
    """Sends requests to functions and waits for their completions."""

    def __init__(self, tracer: Tracer) -> None:
        self.failed = False
        """A function did not answer: the next CMD_SYNC must not complete (3.9.1.4)."""
        self._functions: dict[int, AtsFunction] = {}
        self._outstanding: dict[int, _Invalidation] = {}
        self._waiting = InFlight()
        self._tracer = tracer

    def __len__(self) -> int:
        """How many Invalidate Requests are not answered."""
        return len(self._outstanding)

    @property
    def oldest(self) -> object | None:
        """What stands for the Invalidate Request that waits longest; None when all are answered."""
        return next(iter(self._outstanding.values()), None)

    @property
    def functions(self) -> Mapping[int, AtsFunction]:
        """The functions, by StreamID."""
        return self._functions

    def connect(self, stream_id: int, function: AtsFunction) -> None:
        """`function` is what sends and receives as `stream_id`."""
        self._functions[stream_id] = function

    def full(self, stream_id: int) -> bool:
        """The function takes no more Invalidate Requests before it has answered one."""
        waiting = sum(each.stream_id == stream_id for each in self._outstanding.values())
        return waiting >= INVALIDATE_QUEUE_DEPTH

    def invalidate(self, stream_id: int, request: InvalidateRequest) -> None:
        """Send an Invalidate Request. One for a stream that has no such function is ignored (4.5)."""
        function = self._functions.get(stream_id)
        if function is None:
            return
        if self._tracer:
            self._tracer.emit(
                AtcInvalidationSent(stream_id, request.substream_id, request.address, request.size)
            )
        invalidation = _Invalidation(stream_id)
        self._outstanding[id(invalidation)] = invalidation
        self._waiting.add(invalidation)
        if self._tracer.meddler is None:
            function.invalidate(request, lambda: self._complete(invalidation))
        else:
            self._invalidate_meddled(function, invalidation, request)

    def _invalidate_meddled(
        self, function: AtsFunction, invalidation: _Invalidation, request: InvalidateRequest
    ) -> None:
        def send() -> None:
            function.invalidate(request, lambda: self._complete(invalidation))

        assert self._tracer.meddler is not None
        point = AtcInvalidating(
            invalidation.stream_id, request.substream_id, request.address, request.size
        )
        match self._tracer.meddler(point):
            case Skip():
                self._complete(invalidation)
            case Refuse():
                pass
            case Defer(hold):
                hold.then(send)
            case Again(count):
                for _ in range(1 + count):
                    send()
            case _:
                send()

    def _complete(self, invalidation: _Invalidation) -> None:
        if self._outstanding.pop(id(invalidation), None) is not None:
            self._waiting.retire(invalidation)

    def respond(self, stream_id: int, response: PageResponse) -> None:
        """Send a PRG Response, if there is somebody."""
        function = self._functions.get(stream_id)
        if function is not None:
            function.page_response(response)

    def when_done(self, proceed: Callable[[], None]) -> int:
        """Call `proceed` when all that is outstanding now is answered or given up. Returns how many that are."""
        return self._waiting.when_done(proceed)

    def give_up(self) -> int:
        """The time of ATS is over (3.9.1.4): what is outstanding has failed. Returns how many that were.

        A completion that comes later is ignored.
        """
        given_up = list(self._outstanding.values())
        if not given_up:
            return 0
        self.failed = True
        if self._tracer:
            for invalidation in given_up:
                self._tracer.emit(AtcInvalidationGivenUp(invalidation.stream_id))
        for invalidation in given_up:
            self._complete(invalidation)
        return len(given_up)

    def forget(self) -> None:
        """The SMMU was reset: nobody waits for anything."""
        self.failed = False
        self._waiting.forget_waiters()
        for invalidation in list(self._outstanding.values()):
            self._complete(invalidation)
