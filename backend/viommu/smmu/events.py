"""What the SMMU tells the trace."""

from dataclasses import dataclass

from viommu.trace import Event


@dataclass(frozen=True, slots=True)
class RegisterAccess(Event):
    """The guest read or wrote a register; `size` in bytes."""

    name: str
    write: bool
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class CommandConsumed(Event):
    """A command took effect. `index` is its place in the queue, `text` its fields, `value` its 128 bits."""

    opcode: str
    index: int
    text: str
    value: int


@dataclass(frozen=True, slots=True)
class CommandFailed(Event):
    """Consumption of commands stopped with CMDQ_CONS.ERR at the command at `index`."""

    error: str
    index: int


@dataclass(frozen=True, slots=True)
class SyncWaiting(Event):
    """A CMD_SYNC holds the queue until `transactions` in flight are done."""

    transactions: int


@dataclass(frozen=True, slots=True)
class SyncCompleted(Event):
    """A CMD_SYNC completed with the signal `signal`."""

    signal: str


@dataclass(frozen=True, slots=True)
class StructureFetched(Event):
    """An STE or a CD was read from `address` of guest memory."""

    structure: str
    stream_id: int
    substream_id: int | None
    address: int
    text: str


@dataclass(frozen=True, slots=True)
class Translated(Event):
    """`size` bytes from `iova` on were translated to `runs` ranges of physical addresses.

    `transaction` is its number; it is in flight from here.
    """

    stream_id: int
    substream_id: int | None
    iova: int
    size: int
    write: bool
    runs: int
    first: int
    transaction: int


@dataclass(frozen=True, slots=True)
class TranslatedPassed(Event):
    """A Translated transaction passed: `size` bytes from `address` on, which an ATS completion had told."""

    stream_id: int
    address: int
    size: int
    write: bool
    transaction: int


@dataclass(frozen=True, slots=True)
class Aborted(Event):
    """The transaction at `iova` was terminated; `event` is the event record's type, None for silence."""

    stream_id: int
    substream_id: int | None
    iova: int
    write: bool
    event: str | None


@dataclass(frozen=True, slots=True)
class TransactionHeld(Event):
    """The transaction at `iova` was stalled under `stag`, for the fault `event`.

    `stag` is None when there was no room to record it.
    """

    stream_id: int
    iova: int
    stag: int | None
    event: str


@dataclass(frozen=True, slots=True)
class EventRecorded(Event):
    """A record was written to the event queue."""

    event: str
    stream_id: int
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class EventLost(Event):
    """A record found the event queue full, disabled or unreachable."""

    event: str
    stream_id: int
    why: str


@dataclass(frozen=True, slots=True)
class GlobalErrorRaised(Event):
    """A bit of SMMU_GERROR became active."""

    error: str


@dataclass(frozen=True, slots=True)
class TranslationCompleted(Event):
    """An ATS Translation Request was answered: its status, and of a success where and how much, with RWX."""

    stream_id: int
    substream_id: int | None
    iova: int
    status: str
    address: int
    size: int
    permissions: str


@dataclass(frozen=True, slots=True)
class AtcInvalidationSent(Event):
    """A function was told to forget translations of `size` bytes from `address`."""

    stream_id: int
    substream_id: int | None
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class AtcInvalidationGivenUp(Event):
    """A function did not answer an Invalidate Request in time."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class PageRequested(Event):
    """A function sent a page request; `outcome` is `queued`, or why it was not."""

    stream_id: int
    substream_id: int | None
    address: int
    prg_index: int
    last: bool
    outcome: str


@dataclass(frozen=True, slots=True)
class PageResponded(Event):
    """A function was sent the response to a page request group, by software or automatically."""

    stream_id: int
    substream_id: int | None
    prg_index: int
    code: str
