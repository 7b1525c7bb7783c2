"""The filter by which a plan gets at an endpoint's DMA: a device object at the top of its stack."""

from array import array
from collections.abc import Callable
from contextlib import suppress

from viommu.endpoints.points import (
    DmaCompleting,
    DmaRead,
    DmaRequested,
    DmaTranslated,
    DmaWriting,
)
from viommu.endpoints.port import DmaFault, DmaPort, DmaStalled, HeldUntil
from viommu.smmu import Translation
from viommu.stack.filters import Abort, Diverted, Filter, Outcome, Request
from viommu.trace import Again, Defer, Hold, Point, Refuse, Replace, Skip, Tracer, Verdict, Wait

DMA_POINTS: frozenset[type[Point]] = frozenset(
    {DmaRequested, DmaTranslated, DmaWriting, DmaRead, DmaCompleting}
)
"""Those that only a filter can ask at."""


class FaultFilter(Filter):
    """Asks the meddler at each point of a DMA through `port`, and does what it says."""

    def __init__(self, port: DmaPort, tracer: Tracer) -> None:
        self._port, self._tracer = port, tracer
        self._holds: dict[int, Hold] = {}
        self._translations: dict[int, Translation] = {}
        # Who was held before it began, begins anew when it is released: then it goes on.
        self._released: list[tuple[int, bool, Hold]] = []

    def _ask(self, make: Callable[..., Point], request: Request, *rest: object) -> Verdict | None:
        if self._tracer.meddler is None:
            return None
        access = request.access
        return self._tracer.meddler(
            make(
                access.stream_id,
                access.substream_id,
                request.iova,
                request.size,
                access.write,
                *rest,
            )
        )

    def before_translation(self, request: Request) -> None:
        for waited in self._released:
            if waited[:2] == (request.iova, request.access.write) and waited[2].released:
                self._released.remove(waited)
                return
        match self._ask(DmaRequested, request):
            case Refuse():
                raise Abort("injected before translation")
            case Replace(value):
                request.iova = value
            case Wait(hold):
                self._released.append((request.iova, request.access.write, hold))
                raise DmaStalled(HeldUntil(request.iova, hold))

    def after_translation(self, request: Request, translation: Translation) -> None:
        runs = translation.runs
        match self._ask(DmaTranslated, request, runs[0]):
            case Refuse():
                raise Abort("injected after translation")
            case Replace(value):
                runs[0] = value
            case Wait(hold):
                self._holds[id(request)] = hold
        self._translations[id(request)] = translation

    def holds(self, request: Request) -> bool:
        hold = self._holds.get(id(request))
        return hold is not None and not hold.released

    def data(self, request: Request, data: memoryview) -> None:
        if request.access.write:
            self._write(request, data)
            return
        match self._ask(DmaRead, request, bytes(data)):
            case Skip():
                data[:] = bytes(len(data))
            case Replace(value):
                data[:] = value[: len(data)].ljust(len(data), b"\0")

    def _write(self, request: Request, data: memoryview) -> None:
        match self._ask(DmaWriting, request, bytes(data)):
            case Skip():
                raise Diverted
            case Replace(value) if len(value) < len(data):
                self._move(request, value)
                raise Diverted
            case Replace(value):
                data[:] = value[: len(data)]
            case Again(count):
                for _ in range(count):
                    self._move(request, data)
            case Defer(hold):
                write = self._later(request, bytes(data))
                hold.then(write)
                raise Diverted

    def _later(self, request: Request, data: bytes) -> Callable[[], None]:
        """The write of `data` to where the request goes now, which is made when the request is over.

        It is lost with its guest.
        """
        translation = _front(self._translations[id(request)], len(data))
        memory = self._port.memory
        guest = memory.guests

        def write() -> None:
            if memory.guests == guest:
                with suppress(DmaFault):  # the trace has it, and nobody waits for it
                    self._port.move(translation, data)

        return write

    def _move(self, request: Request, data: bytes | memoryview) -> None:
        if data:
            self._port.move(_front(self._translations[id(request)], len(data)), data)

    def moved(self, request: Request) -> None:
        match self._ask(DmaCompleting, request):
            case Wait(hold):
                self._holds[id(request)] = hold

    def completed(self, request: Request, outcome: Outcome) -> None:  # noqa: ARG002
        self._holds.pop(id(request), None)
        self._translations.pop(id(request), None)


def _front(translation: Translation, size: int) -> Translation:
    """The first `size` bytes of it; for the trace it is the same transaction."""
    runs: array[int] = array("Q")
    left = size
    for address, length in zip(translation.runs[::2], translation.runs[1::2], strict=True):
        part = min(left, length)
        if part:
            runs.extend((address, part))
        left -= part
    front = Translation(translation.access, translation.iova, runs, size - left)
    front.number = translation.number
    return front
