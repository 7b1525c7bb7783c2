"""How a transaction ends badly: with an event record, or in silence; at once, or after it stalled."""

from typing import NamedTuple

from viommu.layouts.records import EventRecord, EventType, FaultClass

_OF_CONFIGURATION = frozenset(
    {
        EventType.C_BAD_STREAMID,
        EventType.F_STE_FETCH,
        EventType.C_BAD_STE,
        EventType.F_STREAM_DISABLED,
        EventType.C_BAD_SUBSTREAMID,
        EventType.F_CD_FETCH,
        EventType.C_BAD_CD,
        EventType.F_CFG_CONFLICT,
        EventType.F_VMS_FETCH,
    }
)


class Access(NamedTuple):
    """What a transaction says of itself besides its address (3.3, 13.1)."""

    stream_id: int
    substream_id: int | None = None
    write: bool = False
    privileged: bool = False
    instruction: bool = False


class Stalled:
    """One stalled transaction. `resolution` is None until software answers; `stag` is None while there is no record."""

    __slots__ = ("__weakref__", "access", "address", "record", "resolution", "stag")

    def __init__(self, access: Access, address: int, stag: int | None, record: EventRecord) -> None:
        self.access, self.address, self.stag, self.record = access, address, stag, record
        self.resolution: str | None = None
        """`retry`, or `abort`."""


class Fault(Exception):
    """A transaction cannot go on. `record` is what goes to the event queue; None is an abort without an event.

    With `stall` the transaction waits for software's answer; with `merge` (STE.MEV) the record may stand for several.
    """

    def __init__(self, record: EventRecord | None, *, stall: bool = False) -> None:
        super().__init__("abort without an event" if record is None else str(record))
        self.record = record
        self.stall = stall
        self.merge = False
        self.hidden: EventRecord | None = None
        """What is not recorded because software does not want it."""


class TransactionAborted(Exception):
    """What the client device sees: an abort of the transaction at `address`. The event, if any, is recorded."""

    def __init__(self, access: Access, address: int, record: EventRecord | None) -> None:
        why = "" if record is None else f": {getattr(record.event, 'name', record.event)}"
        super().__init__(f"stream {access.stream_id:#x}: abort at {address:#x}{why}")
        self.access, self.address, self.record = access, address, record


def configuration_fault(event: EventType, access: Access, fetch_addr: int = 0) -> Fault:
    """A fault found before any translation: StreamID, SubstreamID, STE or CD (7.3.3 to 7.3.11).

    `fetch_addr` is the address of the structure, bytes, for F_STE_FETCH and F_CD_FETCH.
    """
    return Fault(
        EventRecord(
            event=event,
            stream_id=access.stream_id,
            # C_BAD_SUBSTREAMID has no SSV: its SubstreamID is always valid (7.3.9).
            ssv=access.substream_id is not None and event != EventType.C_BAD_SUBSTREAMID,
            substream_id=access.substream_id or 0,
            fetch_addr=fetch_addr & ~7,
        )
    )


def translation_fault(
    event: EventType,
    access: Access,
    address: int,
    fault_class: FaultClass = FaultClass.IN,
    fetch_addr: int = 0,
    *,
    stage_2: bool = False,
    ipa: int = 0,
) -> Fault:
    """A fault of translation (7.3.12 to 7.3.16). `address` is the input address, as it came.

    `ipa` is what stage 2 could not translate; its bits 51:12 are recorded. `fetch_addr` is for F_WALK_EABT.
    """
    return Fault(
        EventRecord(
            event=event,
            stream_id=access.stream_id,
            ssv=access.substream_id is not None,
            substream_id=access.substream_id or 0,
            pnu=access.privileged,
            # A write is never an instruction access (13.1.1).
            ind=access.instruction and not access.write,
            rnw=not access.write,
            s2=stage_2,
            fault_class=fault_class,
            address=address,
            fetch_addr=ipa & (1 << 52) - (1 << 12) if ipa else fetch_addr & ~7,
        )
    )


def fault_of(code: int | None, access: Access, address: int) -> Fault:
    """The fault with the event type `code`, as if the SMMU had found it at the input address; None is silence."""
    if code is None:
        return Fault(None)
    event = EventType(code)
    if event in _OF_CONFIGURATION:
        return configuration_fault(event, access)
    return translation_fault(event, access, address)


class TransactionStalled(Exception):
    """The client device waits: `stalled.resolution` becomes `retry` or `abort` when software has answered."""

    def __init__(self, stalled: Stalled) -> None:
        super().__init__(f"stream {stalled.access.stream_id:#x}: stalled at {stalled.address:#x}")
        self.stalled = stalled
