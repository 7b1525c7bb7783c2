"""Where a meddler can interfere with the SMMU: a fetch, a cache, a command, a record, an interrupt.

Each says in its docstring what each verdict does there. `value` is what `Replace` replaces.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from viommu.layouts.records import EventType
from viommu.layouts.registers import CommandError
from viommu.trace import Again, BusAbort, Defer, Point, Refuse, Replace, Skip, Verdict, Wait

UNSUPPORTED_REQUEST, COMPLETER_ABORT = 1, 4
"""Completion Status of PCIe (2.2.9)."""

_Verdicts = frozenset[type[Verdict]]


class Structure(StrEnum):
    """What the SMMU reads in memory for a transaction."""

    STE = "STE"
    STE_LEVEL_1 = "L1STD"
    CD = "CD"
    CD_LEVEL_1 = "L1CD"
    DESCRIPTOR = "TTD"


@dataclass(frozen=True, slots=True)
class StructureRead(Point):
    """A structure of `size` bytes was read from `address` for the transaction at `iova`; `value` is little-endian.

    `level` and `stage` are those of a descriptor, else None. BusAbort: the fetch aborts. Replace: another content.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({BusAbort, Replace})

    structure: Structure
    stream_id: int
    substream_id: int | None
    iova: int | None
    write: bool
    address: int
    size: int
    value: int
    level: int | None = None
    stage: int | None = None

    @property
    def value_bits(self) -> int:
        """As many as the structure has."""
        return 8 * self.size


@dataclass(frozen=True, slots=True)
class TransactionArrived(Point):
    """A transaction asks for translation. Refuse: it is aborted, with that event or in silence.

    Replace: it is translated at another input address.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Refuse, Replace})
    codes: ClassVar[Mapping[str, int]] = EventType.__members__

    stream_id: int
    substream_id: int | None
    iova: int
    size: int
    write: bool

    @property
    def value(self) -> int:
        """The input address."""
        return self.iova


@dataclass(frozen=True, slots=True)
class TlbLookup(Point):
    """The TLB is asked for `iova`. Skip: it has nothing."""

    verdicts: ClassVar[_Verdicts] = frozenset({Skip})

    stream_id: int
    substream_id: int | None
    iova: int
    write: bool


@dataclass(frozen=True, slots=True)
class TlbFill(Point):
    """The TLB remembers that 2^`shift` bytes around `iova` go to `value`. Skip: it does not. Replace: to elsewhere."""

    verdicts: ClassVar[_Verdicts] = frozenset({Skip, Replace})

    stream_id: int
    substream_id: int | None
    iova: int
    write: bool
    shift: int
    value: int


@dataclass(frozen=True, slots=True)
class CommandFetched(Point):
    """The command `value` of `index` was read. Refuse: consumption stops with that CMDQ_CONS.ERR.

    Replace: another command. Wait: it is consumed later. Again: it takes effect more than once.
    Skip: it is consumed without effect: what it invalidates is kept. Defer: it is consumed, and takes effect later.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Refuse, Replace, Wait, Again, Skip, Defer})
    codes: ClassVar[Mapping[str, int]] = {
        error.name: error for error in CommandError if error is not CommandError.CERROR_NONE
    }

    opcode: str
    stream_id: int | None
    index: int
    value: int

    @property
    def value_bits(self) -> int:
        """A command has 16 bytes."""
        return 128


@dataclass(frozen=True, slots=True)
class CommandCompleting(Point):
    """The command took effect, and CONS is about to move on. Wait: it moves later."""

    verdicts: ClassVar[_Verdicts] = frozenset({Wait})

    opcode: str
    stream_id: int | None
    index: int


@dataclass(frozen=True, slots=True)
class SyncBarrier(Point):
    """A CMD_SYNC is about to wait for `transactions`. Skip: it does not wait."""

    verdicts: ClassVar[_Verdicts] = frozenset({Skip})

    index: int
    transactions: int


@dataclass(frozen=True, slots=True)
class SyncCompleting(Point):
    """A CMD_SYNC is about to complete by `signal`. Wait: later, or never. Skip: CONS moves on, the signal is lost.

    Again: the signal is sent more than once. Replace: the word of the message is another. Defer: CONS moves on, the
    signal comes later.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Wait, Skip, Again, Replace, Defer})

    signal: str
    index: int
    value: int


@dataclass(frozen=True, slots=True)
class RecordWritten(Point):
    """A record of 256 or 128 bits is about to go to the event or the PRI queue. Skip: it is dropped.

    Replace: another content. Again: it is written more than once. Defer: it is written later.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Skip, Replace, Again, Defer})

    queue: str
    event: str
    stream_id: int
    value: int

    @property
    def value_bits(self) -> int:
        """An event record has 32 bytes, a page request 16."""
        return 256 if self.queue == "event" else 128


@dataclass(frozen=True, slots=True)
class InterruptRaised(Point):
    """The SMMU is about to interrupt because of `cause`. Skip: it is lost. Again: there are more. Defer: it is late."""

    verdicts: ClassVar[_Verdicts] = frozenset({Skip, Again, Defer})

    cause: str


@dataclass(frozen=True, slots=True)
class AtsRequested(Point):
    """A function asks for a translation. Refuse: Unsupported Request (`UR`) or Completer Abort (`CA`, PCIe 2.2.9)."""

    verdicts: ClassVar[_Verdicts] = frozenset({Refuse})
    codes: ClassVar[Mapping[str, int]] = {"UR": UNSUPPORTED_REQUEST, "CA": COMPLETER_ABORT}

    stream_id: int
    substream_id: int | None
    iova: int


@dataclass(frozen=True, slots=True)
class AtsCompleting(Point):
    """A translation is about to be answered with the address `value`. Replace: another one.

    Wait: the answer is late.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Replace, Wait})

    stream_id: int
    substream_id: int | None
    iova: int
    size: int
    value: int


@dataclass(frozen=True, slots=True)
class AtcInvalidating(Point):
    """A function is about to be told to forget. Skip: it is not, and a completion comes all the same.

    Refuse: it is not, and none comes. Defer: it is told later. Again: it is told more than once.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Skip, Refuse, Defer, Again})

    stream_id: int
    substream_id: int | None
    iova: int
    size: int


@dataclass(frozen=True, slots=True)
class PageResponding(Point):
    """A function is about to get the response `value` to a page request group. Skip: it is lost. Defer: it is late.

    Replace: another code. Again: it comes more than once.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Skip, Defer, Replace, Again})

    stream_id: int
    substream_id: int | None
    prg_index: int
    value: int


POINTS: tuple[type[Point], ...] = (
    TransactionArrived,
    StructureRead,
    TlbLookup,
    TlbFill,
    CommandFetched,
    CommandCompleting,
    SyncBarrier,
    SyncCompleting,
    RecordWritten,
    InterruptRaised,
    AtsRequested,
    AtsCompleting,
    AtcInvalidating,
    PageResponding,
)
