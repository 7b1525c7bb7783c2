"""What the witness tells the trace: what memory says, and what differs from it."""

from dataclasses import dataclass

from viommu.trace import Event


@dataclass(frozen=True, slots=True)
class StreamConfigured(Event):
    """Memory says something new of a stream; or, with `structure` None, it was looked at for the first time.

    `state` is `translate`, `bypass`, `abort` or the event that a transaction would meet. `structure`, STE or CD, made
    the difference. The rest is there where the stream is translated: `config` is STE.Config.
    """

    stream_id: int
    substream_id: int | None
    state: str
    structure: str | None
    config: str = ""
    vmid: int | None = None
    asid: int | None = None
    ttb0: int | None = None
    ttb1: int | None = None
    s2_ttb: int | None = None


@dataclass(frozen=True, slots=True)
class EntryStale(Event):
    """A cache was found to hold what memory no longer says: `entries` of it, together `size` bytes from `iova`.

    `cache` is TLB, STE, CD or ATC, and `command` is what removes them. A TLB entry belongs to `vmid` and `asid`, all
    others to a stream. `now` is what memory has instead. `outlived`: a CMD_SYNC has completed since memory changed;
    `taken`: what the entry maps by has another meaning by now, so that nobody can wait any longer.
    """

    cache: str
    command: str
    stream_id: int | None
    substream_id: int | None
    vmid: int | None
    asid: int | None
    iova: int
    size: int
    address: int
    entries: int
    now: str
    outlived: bool
    taken: bool


@dataclass(frozen=True, slots=True)
class EntriesGone(Event):
    """Of what was stale, `entries` are no longer held: `by` a command, or a reset."""

    cache: str
    stream_id: int | None
    substream_id: int | None
    vmid: int | None
    asid: int | None
    entries: int
    by: str


@dataclass(frozen=True, slots=True)
class StaleUse(Event):
    """A transaction was translated, or with `moved` its bytes were moved, by what memory no longer says.

    `size` bytes from `iova` on went to other places than memory says, the first of them to `address`. `cause` is the
    cache that made the difference, `held` whether it still has the entry. `now` is what memory says instead, `reused`
    what the page has become since, when that is known.
    """

    transaction: int
    stream_id: int
    substream_id: int | None
    iova: int
    size: int
    address: int
    write: bool
    moved: bool
    cause: str
    held: bool
    vmid: int | None
    asid: int | None
    now: str
    reused: str


@dataclass(frozen=True, slots=True)
class DomainRemembered(Event):
    """The TLB has `entries` of a domain that no stream uses; none any more when it is 0."""

    vmid: int
    asid: int
    entries: int


@dataclass(frozen=True, slots=True)
class DetachDeclared(Event):
    """A driver says that the detach of a stream is complete: from here on nobody may wait for anything of it."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class AccountClosed(Event):
    """What is pending stays as it is: the SMMU was switched off or reset, or the run is at its end."""

    why: str
