"""ATS as a function sees it: Translation Requests and Translated transactions (IHI 0070, 3.9.1, 13.6 and 13.7).

The text leaves open, and this model chooses: a completion carries one translation, as large as the page or block is;
a request with NW set is not granted W; PASIDs on Translated transactions are ignored (IDR3.PASIDTT is 0); an address
of a Translated transaction above the OAS is an abort (3.9.1.1); ATSCHK counts at once, without an invalidation of
STEs; EATS 0b11 behaves as 0b00, there are no device permission tables.
"""

from array import array
from enum import Enum
from typing import NamedTuple

from viommu.layouts.records import BadTranslationRequestRecord, EventRecord, EventType, FaultClass
from viommu.layouts.tables import Eats, SteConfig, StreamTableEntry
from viommu.smmu.barrier import InFlight
from viommu.smmu.configuration import Configuration
from viommu.smmu.context import StreamContext, stream_context
from viommu.smmu.event_queue import EventQueue
from viommu.smmu.events import Aborted, TranslatedPassed, TranslationCompleted
from viommu.smmu.faults import Access, Fault, TransactionAborted, translation_fault
from viommu.smmu.features import Features
from viommu.smmu.points import COMPLETER_ABORT, AtsCompleting, AtsRequested
from viommu.smmu.tlb import Entry
from viommu.smmu.translation import MAX_RANGE, Translation, Translator
from viommu.trace import Hold, Refuse, Replace, Tracer, Wait

_TRANSLATES = (SteConfig.S1_TRANSLATE, SteConfig.S2_TRANSLATE, SteConfig.NESTED)
_OUTPUT = (1 << 52) - (1 << 12)


class AtsStatus(Enum):
    """How a Translation Request completes."""

    SUCCESS = "SC"
    UNSUPPORTED_REQUEST = "UR"
    COMPLETER_ABORT = "CA"


class TranslationCompletion(NamedTuple):
    """What a Translation Request is answered with. Only a success has the rest.

    `size` bytes, a power of two, from `address`, which is aligned to it, are what the page of the asked address
    goes to. `read` and `write` both False: no access. U, G and N are never set.
    """

    status: AtsStatus
    address: int = 0
    size: int = 0
    read: bool = False
    write: bool = False
    execute: bool = False
    privileged: bool = False
    untranslated: bool = False
    global_: bool = False
    no_snoop: bool = False
    hold: Hold | None = None
    """It arrives only when this is released."""

    @property
    def entry(self) -> int:
        """The Translation Completion Data Entry, 64 bits (PCIe, 10.2.3): S with its size below the address."""
        address = (
            self.address | (self.size >> 1) - (1 << 12) if self.size > 1 << 12 else self.address
        )
        flags = (
            (self.read, 0),
            (self.write, 1),
            (self.untranslated, 2),
            (self.execute, 3),
            (self.privileged, 4),
            (self.global_, 5),
            (self.no_snoop, 10),
            (self.size > 1 << 12, 11),
        )
        return address | sum(bool(flag) << place for flag, place in flags)


class Ats:
    """Answers functions while the registers say how."""

    def __init__(
        self,
        features: Features,
        configuration: Configuration,
        translator: Translator,
        events: EventQueue,
        in_flight: InFlight,
        tracer: Tracer,
    ) -> None:
        self.enabled = False
        """CR0.SMMUEN."""
        self.failed = False
        """Service failure mode."""
        self.checks = False
        """CR0.ATSCHK."""
        self.records_errors = False
        """CR2.REC_CFG_ATS."""
        self.records_bad_stream = False
        """CR2.RECINVSID."""
        self._features = features
        self._configuration = configuration
        self._translator = translator
        self._events = events
        self._in_flight = in_flight
        self._tracer = tracer
        self._unit = 1 << min(features.granules)  # the smallest translation unit

    # Translation Requests (3.9.1.2)

    def request(
        self, access: Access, iova: int, span: int = 1, *, no_write: bool = False
    ) -> TranslationCompletion:
        """Answer a Translation Request for `span` units from `iova`; the answer concerns the first of them.

        Of `access` the privilege and `instruction`, which asks for permission to execute, count with a SubstreamID
        only; `no_write` is the request's NW flag. It never raises: a fault is part of the answer.
        """
        if access.substream_id is None:
            access = access._replace(privileged=False, instruction=False)
        access = access._replace(write=False)
        try:
            completion = self._refused(access, iova) or self._answer(access, iova, span, no_write)
        except Fault as fault:
            completion = self._refuse(fault, access)
        if self._tracer.meddler is not None and completion.size:
            completion = self._meddled(completion, access, iova)
        if self._tracer:
            granted = (completion.read, completion.write, completion.execute)
            self._tracer.emit(
                TranslationCompleted(
                    access.stream_id,
                    access.substream_id,
                    iova,
                    completion.status.name,
                    completion.address,
                    completion.size,
                    "".join(c for c, g in zip("rwx", granted, strict=True) if g),
                )
            )
        return completion

    def _refused(self, access: Access, iova: int) -> TranslationCompletion | None:
        """The failure that a meddler wants."""
        if self._tracer.meddler is None:
            return None
        point = AtsRequested(access.stream_id, access.substream_id, iova)
        match self._tracer.meddler(point):
            case Refuse(code):
                unsupported = code != COMPLETER_ABORT
                status = AtsStatus.UNSUPPORTED_REQUEST if unsupported else AtsStatus.COMPLETER_ABORT
                return TranslationCompletion(status)
            case _:
                return None

    def _meddled(
        self, completion: TranslationCompletion, access: Access, iova: int
    ) -> TranslationCompletion:
        assert self._tracer.meddler is not None
        point = AtsCompleting(
            access.stream_id, access.substream_id, iova, completion.size, completion.address
        )
        match self._tracer.meddler(point):
            case Replace(value):
                return completion._replace(address=int(value) & _OUTPUT & -completion.size)
            case Wait(hold):
                return completion._replace(hold=hold)
            case _:
                return completion

    def _answer(
        self, access: Access, iova: int, span: int, no_write: bool
    ) -> TranslationCompletion:
        unsupported = TranslationCompletion(AtsStatus.UNSUPPORTED_REQUEST)
        if not self._features.ats or self.failed:
            return unsupported
        if not self.enabled:
            self._disallowed(access, iova, span, no_write)
            return unsupported
        self._translator.refresh()
        ste = self._configuration.ste(access)
        if ste.config != SteConfig.BYPASS and ste.config not in _TRANSLATES:
            return unsupported
        eats = self._eats(ste)
        if not eats:
            self._disallowed(access, iova, span, no_write)
            return unsupported
        write = (
            None if no_write else self._page(access._replace(instruction=False, write=True), iova)
        )
        read = self._page(access._replace(instruction=False), iova)
        execute = self._page(access, iova) if access.instruction and read else None
        found = read or write
        if found is None:
            return self._nothing(access)
        if eats == Eats.SPLIT_STAGE:
            found = self._first_stage(
                access._replace(instruction=False, write=read is None), iova, found
            )
        shift, slot = found
        return TranslationCompletion(
            AtsStatus.SUCCESS,
            slot & _OUTPUT & -(1 << shift),
            1 << shift,
            read is not None,
            write is not None,
            execute is not None,
            access.privileged,
        )

    def _eats(self, ste: StreamTableEntry) -> int:
        """The effective value of EATS (5.2)."""
        if ste.config not in _TRANSLATES:
            return 0
        if ste.eats == Eats.SPLIT_STAGE:
            return Eats.SPLIT_STAGE if self.checks else 0
        return Eats.FULL if ste.eats == Eats.FULL else 0

    def _page(self, access: Access, iova: int) -> Entry | None:
        """Where the page of `iova` goes; None when `access` has no permission. Raises `Fault`."""
        access, context = self._configuration.lookup(access, iova)
        if context is None:
            # Stage 1 is skipped and there is no other (13.6.4).
            if iova >> self._features.output_address_bits:
                raise translation_fault(EventType.F_ADDR_SIZE, access, iova)
            return Entry(self._unit.bit_length() - 1, iova & -self._unit)
        try:
            return self._translator.page(context, access, iova)
        except Fault as fault:
            # Of what the tables lie in, it is a refusal of everything (3.9.1.2).
            record = fault.record
            if (
                record is not None
                and record.event == EventType.F_PERMISSION
                and record.fault_class == FaultClass.IN
            ):
                return None
            raise

    def _first_stage(self, access: Access, iova: int, found: Entry) -> Entry:
        """The IPA instead of the physical address, for split-stage ATS (13.6.3, 13.6.5)."""
        access, context = self._configuration.lookup(access, iova)
        if context is None or context.stage_1 is None:
            return Entry(found.shift, iova & -(1 << found.shift))
        shift, slot = self._translator.first_stage(context, access, iova)
        smaller = min(shift, found.shift)
        ipa = slot & _OUTPUT & -(1 << shift) | iova & (1 << shift) - 1
        return Entry(smaller, ipa & -(1 << smaller))

    def _nothing(self, access: Access) -> TranslationCompletion:
        """No access; the size of such an answer is one unit (3.9.1.2)."""
        return TranslationCompletion(
            AtsStatus.SUCCESS, size=self._unit, privileged=access.privileged
        )

    def _refuse(self, fault: Fault, access: Access) -> TranslationCompletion:
        """Faults of translation are the function's business, errors of configuration are nobody's but on request."""
        record = fault.record
        # Without a record it is a fault of translation too, which STE or CD do not want to be recorded.
        if record is None or EventType.F_TRANSLATION <= record.event <= EventType.F_PERMISSION:
            return self._nothing(access)
        self.record_error(record)
        return TranslationCompletion(AtsStatus.COMPLETER_ABORT)

    def record_error(self, record: EventRecord) -> None:
        """Record an error of configuration, if software wants it: 3.9.1.2, 8.1."""
        if record.event == EventType.C_BAD_STREAMID and not self.records_bad_stream:
            return
        if self.records_errors:
            self._events.record(record)

    def _disallowed(self, access: Access, iova: int, span: int, no_write: bool) -> None:
        """F_BAD_ATS_TREQ (7.3.6)."""
        record = BadTranslationRequestRecord(
            event=EventType.F_BAD_ATS_TREQ,
            ssv=access.substream_id is not None,
            substream_id=access.substream_id or 0,
            stream_id=access.stream_id,
            read=True,
            write=not no_write,
            execute=access.instruction,
            priv=access.privileged,
            span=min(span, 0xFF),
            address=iova & -(1 << 12),
        )
        self._events.record(EventRecord(record.value))

    # Translated transactions (3.9.1.3)

    def translated(self, access: Access, addresses: "array[int]") -> Translation:
        """Let a Translated transaction pass to the ranges `addresses` (address, length, …), or to their front.

        They are physical addresses; with split-stage ATS, IPAs. The transaction is in flight from here until it is
        retired. Raises `TransactionAborted` when the first byte does not go through.
        """
        access = access._replace(substream_id=None, privileged=False, instruction=False)
        iova = addresses[0]
        try:
            translation = self._pass(access, addresses)
        except Fault as fault:
            record = fault.record
            if self._tracer:
                name = None if record is None else record.event.name
                self._tracer.emit(Aborted(access.stream_id, None, iova, access.write, name))
            if record is not None:
                self._events.record(record, merge=fault.merge)
            raise TransactionAborted(access, iova, record) from None
        self._in_flight.add(translation)
        if self._tracer:
            translation.number = self._in_flight.next_number()
            self._tracer.emit(
                TranslatedPassed(
                    access.stream_id, iova, translation.size, access.write, translation.number
                )
            )
        return translation

    def _pass(self, access: Access, addresses: "array[int]") -> Translation:
        if not self._features.ats or self.failed:
            raise Fault(None)
        if not self.enabled:
            raise _forbidden(access, addresses[0])
        context = self._checked(access, addresses[0]) if self.checks else None
        runs: array[int] = array("Q")
        size = 0
        for address, length in zip(addresses[::2], addresses[1::2], strict=True):
            try:
                part = self._pass_one(context, access, address, min(length, MAX_RANGE - size))
            except Fault:
                if not size:
                    raise
                break
            runs.extend(part.runs)
            size += part.size
            if part.size < length:
                break
        return Translation(access, addresses[0], runs, size)

    def _checked(self, access: Access, address: int) -> tuple[StreamContext, Access] | None:
        """The checks of ATSCHK; what stage 2 has still to do, if it has. Raises `Fault`."""
        self._translator.refresh()
        try:
            ste = self._configuration.ste(access)
        except Fault:
            if self.records_errors:
                raise
            raise Fault(None) from None
        if ste.config != SteConfig.BYPASS and ste.config not in _TRANSLATES:
            raise Fault(None)
        eats = self._eats(ste)
        if not eats:
            raise _forbidden(access, address)
        if eats == Eats.FULL:
            return None
        context = stream_context(ste, None, self._features)
        assert context is not None
        return context, self._configuration.overridden(ste, access)

    def _pass_one(
        self, checked: tuple[StreamContext, Access] | None, access: Access, address: int, size: int
    ) -> Translation:
        limit = 1 << self._features.output_address_bits
        if checked is None:
            if address >= limit:
                raise Fault(None)
            size = min(size, limit - address)
            return Translation(access, address, array("Q", (address, size)), size)
        if address >= limit:
            # An IPA above the IAS is a fault of stage 1 (3.9.1.3).
            raise translation_fault(EventType.F_ADDR_SIZE, access, address)
        context, access = checked
        return self._translator.through(context, access, address, size)


def _forbidden(access: Access, address: int) -> Fault:
    """F_TRANSL_FORBIDDEN (7.3.8)."""
    return Fault(
        EventRecord(
            event=EventType.F_TRANSL_FORBIDDEN,
            stream_id=access.stream_id,
            rnw=not access.write,
            address=address,
        )
    )
