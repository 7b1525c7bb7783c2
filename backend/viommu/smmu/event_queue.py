"""The event queue: records in guest RAM, overflow, loss (IHI 0070, 7.2 and 7.4)."""

from collections.abc import Callable

from viommu.layouts.records import EVENT_RECORD_SIZE, EventRecord, EventType
from viommu.layouts.registers import QUEUE_OVERFLOW, GlobalError
from viommu.memory import BusError, GuestMemory
from viommu.smmu.events import EventLost, EventRecorded
from viommu.smmu.features import Features
from viommu.smmu.points import RecordWritten
from viommu.smmu.queues import Ring
from viommu.trace import Again, Defer, Replace, Skip, Tracer


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
        self.failed = False
        """Service failure mode."""
        self._last = (-1, 0)  # the position behind the last record, and what it said
        self._memory = memory
        self._tracer = tracer
        self._raise_error = raise_error
        self._error_active = error_active
        self._interrupt = interrupt

    def reset(self) -> None:
        """As after reset: nothing queued."""
        self.ring.reset()
        self.enabled = False
        self._last = (-1, 0)

    def record(self, record: EventRecord, *, merge: bool = False) -> None:
        """Write `record`, or lose it as 7.2 and 7.4 prescribe.

        With `merge`, one that says the same as the last record, which software has not read yet, is left out (7.3.1).

        The interrupt is triggered with every record, not only when the queue was empty: a choice that spares software
        the race between its last look and its write of EVENTQ_CONS.
        """
        said = _told_apart(record)
        if merge and not self.ring.empty and self._last == (self.ring.prod, said):
            return
        if self._tracer.meddler is not None:
            self._record_meddled(record)
        elif self._write(record):
            self._last = self.ring.prod, said

    def _record_meddled(self, record: EventRecord) -> None:
        assert self._tracer.meddler is not None
        point = RecordWritten("event", _name(record), record.stream_id, record.value)
        match self._tracer.meddler(point):
            case Skip():
                pass
            case Replace(value):
                self._write(EventRecord(value))
            case Again(count):
                for _ in range(1 + count):
                    self._write(record)
            case Defer(hold):
                hold.then(lambda: self._write(record))
            case _:
                self._write(record)

    @property
    def writable(self) -> bool:
        """A record finds room (7.2.1). Stalled transactions wait for this."""
        return (
            self.enabled
            and not self.failed
            and not self.ring.full
            and not self._error_active(GlobalError.EVENTQ_ABT_ERR)
        )

    def _write(self, record: EventRecord) -> bool:
        ring = self.ring
        if self.failed:
            return self._lost(record, "service failure mode")
        if not self.enabled:
            return self._lost(record, "EVENTQEN is 0")
        if self._error_active(GlobalError.EVENTQ_ABT_ERR):
            return self._lost(record, "EVENTQ_ABT_ERR is active")
        if ring.full:
            if not (ring.prod ^ ring.cons) & QUEUE_OVERFLOW:
                ring.prod ^= QUEUE_OVERFLOW
            return self._lost(record, "the queue is full")
        try:
            self._memory.write(ring.address(ring.prod), record.to_bytes())
        except BusError:
            # The record is lost and PROD stays: a choice (7.2 leaves it open).
            self._raise_error(GlobalError.EVENTQ_ABT_ERR)
            return self._lost(record, "the queue is not in memory")
        index = ring.prod & ring.index_mask
        ring.prod = ring.after(ring.prod)
        if self._tracer:
            self._tracer.emit(EventRecorded(_name(record), record.stream_id, index, str(record)))
        self._interrupt()
        return True

    def _lost(self, record: EventRecord, why: str) -> bool:
        if self._tracer:
            self._tracer.emit(EventLost(_name(record), record.stream_id, why))
        return False


def _name(record: EventRecord) -> str:
    return getattr(record.event, "name", hex(record.event))


def _told_apart(record: EventRecord) -> int:
    """What tells events apart that may be merged: of the address of a fault of translation only the page (7.3.13)."""
    if EventType.F_TRANSLATION <= record.event <= EventType.F_PERMISSION:
        return record.value & ~(0xFFF << EventRecord.address.low)
    return record.value
