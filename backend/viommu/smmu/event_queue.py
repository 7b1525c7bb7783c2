"""The event queue: records in guest RAM, overflow, loss (IHI 0070, 7.2 and 7.4)."""

from collections.abc import Callable

from viommu.layouts.records import EVENT_RECORD_SIZE, EventRecord
from viommu.layouts.registers import QUEUE_OVERFLOW, GlobalError
from viommu.memory import BusError, GuestMemory
from viommu.smmu.events import EventLost, EventRecorded
from viommu.smmu.features import Features
from viommu.smmu.queues import Ring
from viommu.trace import Tracer


class EventQueue:
    """Writes records where EVENTQ_BASE and EVENTQ_PROD say."""

    def __init__(
        self,
        memory: GuestMemory,
        features: Features,
        tracer: Tracer,
        *,
        raise_error: Callable[[GlobalError], None],
        error_active: Callable[[GlobalError], bool],
        interrupt: Callable[[], None],
    ) -> None:
        self.ring = Ring(EVENT_RECORD_SIZE, features.event_queue_log2)
        self.enabled = False
        self._memory = memory
        self._tracer = tracer
        self._raise_error = raise_error
        self._error_active = error_active
        self._interrupt = interrupt

    def record(self, record: EventRecord) -> None:
        """Write `record`, or lose it as 7.2 and 7.4 prescribe.

        The interrupt is triggered with every record, not only when the queue was empty: a choice that spares software
        the race between its last look and its write of EVENTQ_CONS.
        """
        ring = self.ring
        if not self.enabled:
            self._lost(record, "EVENTQEN is 0")
            return
        if self._error_active(GlobalError.EVENTQ_ABT_ERR):
            self._lost(record, "EVENTQ_ABT_ERR is active")
            return
        if ring.full:
            if not (ring.prod ^ ring.cons) & QUEUE_OVERFLOW:
                ring.prod ^= QUEUE_OVERFLOW
            self._lost(record, "the queue is full")
            return
        try:
            self._memory.write(ring.address(ring.prod), record.to_bytes())
        except BusError:
            # The record is lost and PROD stays: a choice (7.2 leaves it open).
            self._raise_error(GlobalError.EVENTQ_ABT_ERR)
            self._lost(record, "the queue is not in memory")
            return
        index = ring.prod & (1 << ring.log2size) - 1
        ring.prod = ring.after(ring.prod)
        if self._tracer:
            self._tracer.emit(EventRecorded(_name(record), record.stream_id, index, str(record)))
        self._interrupt()

    def _lost(self, record: EventRecord, why: str) -> None:
        if self._tracer:
            self._tracer.emit(EventLost(_name(record), record.stream_id, why))


def _name(record: EventRecord) -> str:
    return getattr(record.event, "name", hex(record.event))
