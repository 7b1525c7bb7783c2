"""The SMMU as client devices see it: a transaction is translated, aborted or stalled (IHI 0070, 3.3 and 3.12)."""

from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from viommu.layouts.commands import Opcode, StreamCommand
from viommu.layouts.records import EventRecord, EventType
from viommu.smmu.barrier import InFlight
from viommu.smmu.configuration import Configuration
from viommu.smmu.event_queue import EventQueue
from viommu.smmu.events import Aborted, StructureFetched, TransactionHeld, Translated
from viommu.smmu.faults import Access, Fault, TransactionAborted, TransactionStalled, fault_of
from viommu.smmu.points import TransactionArrived
from viommu.smmu.stall import StallTable
from viommu.smmu.translation import Translation, Translator
from viommu.trace import Refuse, Replace, Tracer

_MOST_HINTS = 64


class Transactions:
    """Takes transactions while the registers say how: `enabled` is SMMUEN, `global_abort` is GBPA.ABORT."""

    def __init__(
        self,
        configuration: Configuration,
        translator: Translator,
        events: EventQueue,
        in_flight: InFlight,
        stalls: StallTable,
        tracer: Tracer,
        *,
        records_bad_stream: Callable[[], bool],
    ) -> None:
        self.enabled = False
        self.global_abort = False
        self.failed = False
        """Service failure mode: nothing goes through (12.3)."""
        self._hints: deque[StreamCommand] = deque()
        self._configuration = configuration
        self._translator = translator
        self._events = events
        self._in_flight = in_flight
        self._stalls = stalls
        self._tracer = tracer
        self._records_bad_stream = records_bad_stream

    def reset(self) -> None:
        """As after reset: everything passes by."""
        self.enabled = self.global_abort = False
        self._hints.clear()

    def translate(self, access: Access, iova: int, size: int) -> Translation:
        """Translate `size` bytes from `iova`, or as many as go through before the first fault.

        The transaction is in flight from here until it is retired. Raises `TransactionAborted`, or
        `TransactionStalled`, when the first byte does not go through; the event is recorded then.
        """
        try:
            translation = self._route(access, iova, size)
        except Fault as fault:
            self._refuse(fault, access, iova)
            raise TransactionAborted(access, iova, fault.record) from None
        self._in_flight.add(translation)
        if self._tracer:
            self._report(translation, access)
        return translation

    def translate_ranges(self, access: Access, ranges: "array[int]") -> Translation:
        """`translate` for a transaction whose bytes are at `ranges` (address, length, …) of input addresses."""
        try:
            translation = self._route_ranges(access, ranges)
        except Fault as fault:
            self._refuse(fault, access, ranges[0])
            raise TransactionAborted(access, ranges[0], fault.record) from None
        self._in_flight.add(translation)
        if self._tracer:
            self._report(translation, access)
        return translation

    def _report(self, translation: Translation, access: Access) -> None:
        translation.number = self._in_flight.next_number()
        self._tracer.emit(
            Translated(
                access.stream_id,
                access.substream_id,
                translation.iova,
                translation.size,
                access.write,
                len(translation.runs) // 2,
                translation.runs[0],
                translation.number,
            )
        )

    def _refuse(self, fault: Fault, access: Access, iova: int) -> None:
        """Record what is to be recorded. Raises `TransactionStalled` when the transaction shall wait."""
        record = fault.record
        if fault.stall and record is not None:
            self._stall(record, access, iova)
        if self._tracer:
            name = None if record is None else record.event.name
            self._tracer.emit(
                Aborted(access.stream_id, access.substream_id, iova, access.write, name)
            )
        if record is None:
            return
        # C_BAD_STREAMID only on request (6.3.12).
        if record.event != EventType.C_BAD_STREAMID or self._records_bad_stream():
            self._events.record(record, merge=fault.merge)

    def _stall(self, record: EventRecord, access: Access, iova: int) -> NoReturn:
        """Record the fault of a transaction that waits; without room for that it is held back (7.2.1)."""
        recorded = self._events.writable and not self._stalls.full
        stall = self._stalls.add if recorded else self._stalls.hold
        stalled = stall(access, iova, record)
        if self._tracer:
            self._tracer.emit(
                TransactionHeld(access.stream_id, iova, stalled.stag, record.event.name)
            )
        if recorded:
            self._events.record(record)
        raise TransactionStalled(stalled)

    def _route(self, access: Access, iova: int, size: int) -> Translation:
        if self._tracer.meddler is not None:
            iova = self._meddled(access, iova, size)
        if self.failed:
            raise Fault(None)
        if self.enabled:
            self._configuration.fetched = self._fetched if self._tracer else None
            return self._translator.translate(access, iova, size)
        if self.global_abort:
            raise Fault(None)
        try:
            return self._translator.bypass(access, iova, size)
        except Fault:
            raise Fault(None) from None  # no event while SMMUEN is 0 (7.2)

    def _meddled(self, access: Access, iova: int, size: int) -> int:
        """The input address that a meddler wants. Raises the `Fault` that it wants."""
        assert self._tracer.meddler is not None
        point = TransactionArrived(access.stream_id, access.substream_id, iova, size, access.write)
        match self._tracer.meddler(point):
            case Refuse(code):
                raise fault_of(code, access, iova)
            case Replace(value):
                return int(value)
            case _:
                return iova

    def _route_ranges(self, access: Access, ranges: "array[int]") -> Translation:
        if self.enabled:
            self._configuration.fetched = self._fetched if self._tracer else None
            return self._translator.translate_ranges(access, ranges)
        if self.global_abort:
            raise Fault(None)
        try:
            return self._translator.bypass_ranges(access, ranges)
        except Fault:
            raise Fault(None) from None  # no event while SMMUEN is 0 (7.2)

    def _fetched(self, structure: str, access: Access, address: int, content: object) -> None:
        self._tracer.emit(
            StructureFetched(
                structure, access.stream_id, access.substream_id, address, str(content)
            )
        )

    def prefetch(self, command: StreamCommand) -> None:
        """A hint (4.2): the caches are filled when there is nothing else to do, or not at all if there are too many."""
        if len(self._hints) < _MOST_HINTS:
            self._hints.append(command)

    @property
    def has_hints(self) -> bool:
        """`follow_hint` has something to do."""
        return bool(self._hints)

    def follow_hint(self) -> None:
        """Fill the caches as the oldest hint says; a fault on the way is nobody's business."""
        command = self._hints.popleft()
        substream_id = command.substream_id if command.ssv else None
        access = Access(command.stream_id, substream_id, privileged=True)
        if not self.enabled:
            return
        address = command.value >> 64 & ~0xFFF
        with suppress(Fault):
            if command.opcode == Opcode.CMD_PREFETCH_ADDR:
                self._translator.translate(access, address, 1)
            else:
                self._configuration.lookup(access, 0)
