"""The PRI queue: page requests of functions in guest RAM, overflow, automatic responses (IHI 0070, chapter 8).

Left open by the text, and chosen here: the interrupt comes with every record, as that of the event queue does, unless
PRIQ_IRQ_CFG2.LO wants it with the last of a group only; a response of failure has no PASID.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from viommu.layouts.records import PAGE_REQUEST_SIZE, EventRecord, PageRequestRecord
from viommu.layouts.registers import QUEUE_OVERFLOW, GlobalError, QueueBase, Register
from viommu.memory import BusError, GuestMemory
from viommu.smmu.configuration import Configuration
from viommu.smmu.events import PageRequested, PageResponded
from viommu.smmu.faults import Access, Fault
from viommu.smmu.features import Features
from viommu.smmu.points import PageResponding, RecordWritten
from viommu.smmu.queues import Ring
from viommu.trace import Again, Defer, Replace, Skip, Tracer


class ResponseCode(IntEnum):
    """Of a PRG Response (8.3)."""

    SUCCESS = 0
    INVALID_REQUEST = 1
    RESPONSE_FAILURE = 15


class PageResponse(NamedTuple):
    """A PRG Response: how the page request group `prg_index` ended; `substream_id` None is without a PASID."""

    prg_index: int
    code: ResponseCode
    substream_id: int | None = None


class PageRequest(NamedTuple):
    """A page request message; `address` is of a page of 4 KiB."""

    stream_id: int
    substream_id: int | None
    address: int
    prg_index: int
    last: bool
    read: bool = False
    write: bool = False
    execute: bool = False
    privileged: bool = False

    @property
    def is_stop_marker(self) -> bool:
        """It stops a PASID, and asks for no page: nobody responds to it (8.2)."""
        asks = self.read or self.write
        return self.last and not asks and self.substream_id is not None


class PageRequestQueue:
    """Writes page requests where PRIQ_BASE and PRIQ_PROD say, and responds to those that it cannot write."""

    def __init__(
        self,
        memory: GuestMemory,
        features: Features,
        configuration: Configuration,
        tracer: Tracer,
        *,
        raise_error: Callable[[GlobalError], None],
        error_active: Callable[[GlobalError], bool],
        interrupt: Callable[[bool, bool], None],
        respond: Callable[[int, PageResponse], None],
        record_error: Callable[[EventRecord], None],
    ) -> None:
        """`interrupt` is told whether the request is the last of its group, and whether it was lost."""
        self.ring = Ring(PAGE_REQUEST_SIZE, features.event_queue_log2)
        self.enabled = False
        """CR0.PRIQEN, and SMMUEN."""
        self._implemented = features.pri
        self._memory = memory
        self._substreams = bool(features.substream_id_bits)
        self._configuration = configuration
        self._tracer = tracer
        self._raise_error = raise_error
        self._error_active = error_active
        self._interrupt = interrupt
        self._respond = respond
        self._record_error = record_error

    def reset(self) -> None:
        """As after reset: nothing queued."""
        self.ring.reset()
        self.enabled = False

    def read(self, register: int) -> int:
        """PRIQ_BASE, PRIQ_PROD or PRIQ_CONS."""
        if register == Register.PRIQ_BASE:
            return self.ring.base.value
        return (
            self.ring.cons if register == Register.PRIQ_CONS else self.ring.visible(self.ring.prod)
        )

    def write(self, register: int, value: int, enabled: bool) -> None:
        """Write one of them; but for PRIQ_CONS not while PRIQEN is 1. Without PRI they are reserved."""
        if not self._implemented:
            return
        position = value & (0xF_FFFF | QUEUE_OVERFLOW)
        if register == Register.PRIQ_CONS:
            self.ring.cons = position
        elif not enabled and register == Register.PRIQ_BASE:
            self.ring.base = QueueBase(value)
        elif not enabled:
            self.ring.prod = position

    def receive(self, request: PageRequest) -> None:
        """A function asks for a page."""
        outcome = self._receive(request)
        if self._tracer:
            self._tracer.emit(
                PageRequested(
                    request.stream_id,
                    request.substream_id,
                    request.address,
                    request.prg_index,
                    request.last,
                    outcome,
                )
            )

    def _receive(self, request: PageRequest) -> str:
        record = PageRequestRecord(
            stream_id=request.stream_id,
            substream_id=request.substream_id or 0,
            ssv=request.substream_id is not None,
            privileged=request.privileged,
            execute=request.execute,
            read=request.read,
            write=request.write,
            last=request.last,
            prg_index=request.prg_index,
            address=request.address & -(1 << 12),
        )
        if self._tracer.meddler is None:
            return self._enqueue(request, record)
        point = RecordWritten("pri", "PAGE_REQUEST", request.stream_id, record.value)
        match self._tracer.meddler(point):
            case Skip():
                return "dropped"
            case Replace(value):
                return self._enqueue(request, PageRequestRecord(value))
            case Again(count):
                for _ in range(count):
                    self._enqueue(request, record)
                return self._enqueue(request, record)
            case Defer(hold):
                hold.then(lambda: self._enqueue(request, record))
                return "deferred"
            case _:
                return self._enqueue(request, record)

    def _enqueue(self, request: PageRequest, record: PageRequestRecord) -> str:
        if not self.enabled:
            self._fail(request)
            return "PRIQEN is 0"
        if self._error_active(GlobalError.PRIQ_ABT_ERR):
            self._fail(request)
            return "PRIQ_ABT_ERR is active"
        ring = self.ring
        overflowed = bool((ring.prod ^ ring.cons) & QUEUE_OVERFLOW)
        if overflowed or ring.full:
            if not overflowed:
                ring.prod ^= QUEUE_OVERFLOW
            self._overflow(request)
            return "the queue overflowed"
        try:
            self._memory.write(ring.address(ring.prod), record.to_bytes())
        except BusError:
            self._raise_error(GlobalError.PRIQ_ABT_ERR)
            self._fail(request)
            return "the queue is not in memory"
        ring.prod = ring.after(ring.prod)
        self._interrupt(request.last, False)
        return "queued"

    def _fail(self, request: PageRequest) -> None:
        if not request.is_stop_marker:
            self.respond(request, ResponseCode.RESPONSE_FAILURE, None)

    def _overflow(self, request: PageRequest) -> None:
        """The request is lost; the last of a group has a response, so that the function tries again (8.1)."""
        if request.last and not request.is_stop_marker:
            try:
                self.respond(request, ResponseCode.SUCCESS, self._response_pasid(request))
            except Fault as fault:
                if fault.record is not None:
                    self._record_error(fault.record)
                self._fail(request)
        self._interrupt(request.last, True)

    def _response_pasid(self, request: PageRequest) -> int | None:
        """The PASID of an automatic response: IDR3.PPS is 0, so STE.PPAR decides. Raises `Fault`."""
        if request.substream_id is None or not self._substreams:
            return None
        ste = self._configuration.ste(Access(request.stream_id, request.substream_id))
        return request.substream_id if ste.ppar else None

    def respond(self, request: PageRequest, code: ResponseCode, substream_id: int | None) -> None:
        """Send the response to a request's group."""
        self.send(request.stream_id, PageResponse(request.prg_index, code, substream_id))

    def send(self, stream_id: int, response: PageResponse) -> None:
        """Send a response."""
        if self._tracer.meddler is None:
            self._send(stream_id, response)
            return
        point = PageResponding(stream_id, response.substream_id, response.prg_index, response.code)
        match self._tracer.meddler(point):
            case Skip():
                pass
            case Replace(value):
                # What is no code is a failure (PCIe, 10.4.2.2).
                known = value in list(ResponseCode)
                code = ResponseCode(value) if known else ResponseCode.RESPONSE_FAILURE
                self._send(stream_id, response._replace(code=code))
            case Again(count):
                for _ in range(1 + count):
                    self._send(stream_id, response)
            case Defer(hold):
                hold.then(lambda: self._send(stream_id, response))
            case _:
                self._send(stream_id, response)

    def _send(self, stream_id: int, response: PageResponse) -> None:
        if self._tracer:
            self._tracer.emit(
                PageResponded(
                    stream_id, response.substream_id, response.prg_index, response.code.name
                )
            )
        self._respond(stream_id, response)
