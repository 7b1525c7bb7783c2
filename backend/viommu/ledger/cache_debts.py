"""What the caches hold that they should not, by owner, and how each debt ends: in time, late, or never."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from viommu.ledger.detaches import owner_name
from viommu.ledger.findings import Finding, Severity

Record = Mapping[str, Any]
Owner = tuple[str, int | None, int | None, int | None, int | None]
_EVIDENCE = 16  # events that are kept of one debt


@dataclass(slots=True)
class _Debt:
    """Stale entries of one owner. `gone` is when the last of them went; a CMD_SYNC after that pays the debt.

    `syncs` are the CMD_SYNCs that completed while there were any, `users` the transactions that used one.
    """

    cache: str
    name: str
    stream_id: int | None
    command: str
    entries: int = 0
    most: int = 0
    gone: int | None = None
    syncs: int = 0
    bytes: int = 0
    users: set[int] = field(default_factory=set)
    evidence: list[int] = field(default_factory=list)

    def note(self, seq: int) -> None:
        if len(self.evidence) < _EVIDENCE:
            self.evidence.append(seq)

    def finding(self, severity: Severity, rule: str, text: str, command: str | None) -> Finding:
        used = ""
        if self.users:
            plural = "" if len(self.users) == 1 else "s"
            used = f"; used by {len(self.users):,} transaction{plural}, {self.bytes:,} bytes moved"
        return Finding(
            severity, rule, f"{text}{used}", command, self.stream_id, tuple(self.evidence)
        )

    @property
    def text(self) -> str:
        entries = f"{self.most:,} {self.cache} entr{'y' if self.most == 1 else 'ies'}"
        return f"{entries} of {self.name}"


class CacheDebts:
    """Follows `EntryStale`, `EntriesGone` and the uses of what is stale."""

    def __init__(self) -> None:
        self._debts: dict[Owner, _Debt] = {}

    def stale(self, seq: int, record: Record) -> Iterator[Finding]:
        """Entries were found to be stale."""
        debt = self._debt(record, record["cache"], record["command"])
        debt.note(seq)
        debt.command = record["command"]
        debt.entries += record["entries"]
        debt.most = max(debt.most, debt.entries)
        debt.gone = None
        if record["outlived"]:
            debt.syncs = max(debt.syncs, 1)
        if record["taken"]:
            yield debt.finding(
                Severity.VIOLATION,
                "missing-invalidation",
                f"the TLB maps {record['iova']:#x} to {record['address']:#x} for {debt.name}, and memory says "
                f"{record['now']} already",
                debt.command,
            )

    def gone(self, seq: int, record: Record) -> None:
        """Stale entries are no longer held."""
        debt = self._debts.get(_owner(record, record["cache"]))
        if debt is not None:
            debt.entries -= record["entries"]
            debt.note(seq)
            if debt.entries <= 0:
                debt.gone = seq

    def used(self, seq: int, record: Record) -> Iterator[Finding]:
        """A transaction used a stale translation."""
        command = "CMD_ATC_INV" if record["cause"] == "ATC" else "CMD_TLBI_NH_VA"
        debt = self._debt(record, record["cause"], command)
        debt.note(seq)
        if not debt.entries and debt.gone is None:
            debt.gone = seq  # only the transaction itself knows of it any more
        debt.users.add(record["transaction"])
        if record["moved"]:
            debt.bytes += record["size"]
        if record["reused"]:
            what = "write to" if record["write"] else "read of"
            yield debt.finding(
                Severity.VIOLATION,
                "page-reuse",
                f"a {what} {record['iova']:#x} of stream {record['stream_id']:#x} touched a page that was unmapped "
                f"and used again: {record['reused']}",
                debt.command if record["held"] else "CMD_SYNC",
            )

    def synced(self, seq: int) -> Iterator[Finding]:
        """A CMD_SYNC is complete: what went before it is paid."""
        for owner, debt in list(self._debts.items()):
            if debt.gone is None:
                debt.syncs += 1
                continue
            del self._debts[owner]
            if debt.syncs:
                debt.note(seq)
                yield debt.finding(
                    Severity.EXPOSURE if debt.users else Severity.NOTE,
                    "deferred-invalidation",
                    f"{debt.text} outlived {debt.syncs} CMD_SYNC before invalidation",
                    debt.command,
                )
            elif debt.users:
                yield debt.finding(
                    Severity.NOTE,
                    "invalidation-window",
                    f"what {debt.name} had unmapped was used until the invalidation was complete",
                    None,
                )

    def declared(
        self, seq: int, stream_id: int, domains: set[str], unsynced: bool
    ) -> Iterator[Finding]:
        """The driver says that nothing of the stream and of its domains is held any more."""
        for owner, debt in list(self._debts.items()):
            if debt.stream_id == stream_id or debt.name in domains:
                debt.note(seq)
                yield _never(debt, f"by #{seq}, where the driver said it was done", unsynced)
                del self._debts[owner]

    def owing(self, unsynced: bool) -> Iterator[Finding]:
        """What was not paid; `unsynced` when invalidations wait for a CMD_SYNC."""
        for debt in self._debts.values():
            yield _never(debt, "by the end", unsynced)

    def close(self) -> None:
        """The account is closed."""
        self._debts.clear()

    def _debt(self, record: Record, cache: str, command: str) -> _Debt:
        owner = _owner(record, cache)
        debt = self._debts.get(owner)
        if debt is None:
            stream_id = record["stream_id"]
            if cache == "TLB":
                stream_id, name = None, owner_name(record["vmid"] or 0, record["asid"])
            else:
                name = f"stream {stream_id:#x}"
            debt = self._debts[owner] = _Debt(cache, name, stream_id, command)
        return debt


def _owner(record: Record, cache: str) -> Owner:
    if cache == "TLB":
        return cache, None, None, record["vmid"], record["asid"]
    return cache, record["stream_id"], record["substream_id"], None, None


def _never(debt: _Debt, until: str, unsynced: bool) -> Finding:
    if debt.gone is None or not unsynced:
        return debt.finding(
            Severity.VIOLATION,
            "missing-invalidation",
            f"{debt.text} not invalidated {until}",
            debt.command,
        )
    return debt.finding(
        Severity.VIOLATION,
        "missing-sync",
        f"no CMD_SYNC completed the invalidation for {debt.name} {until}",
        "CMD_SYNC",
    )
