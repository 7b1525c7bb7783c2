"""The ledger: follows every stream from attach to detach by the events alone, and says what was not as it must be.

    ledger = Ledger()
    stop = ledger.follow(tracer)            # online, or
    ledger = Ledger.of_file(path)           # from a trace file
    verdict = ledger.verdict()

A table that changed and an invalidation that is still to come are no finding but a window, in which DMA may use what
the caches hold. The window ends well when the right command and then a CMD_SYNC are complete. It ends badly when that
can no longer come: the account is closed (SMMU off, end of the run), the driver says that it is done, or what was
taken away has been given to somebody else.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from viommu.layouts.registers import Cr0
from viommu.ledger.cache_debts import CacheDebts
from viommu.ledger.detaches import Detaches, Invalidation, owner_name
from viommu.ledger.findings import Finding, Severity, Verdict
from viommu.trace import Event, Tracer

Record = Mapping[str, Any]
Handler = Callable[[int, Record], Iterable[Finding]]
_INVALIDATIONS = ("CMD_CFGI", "CMD_TLBI", "CMD_ATC_INV")
_TRANSACTIONS = 4096  # that are remembered
_EVIDENCE = 16
_WORD = 4


@dataclass(slots=True)
class _Repeated:
    """How often something was there, and where it was first."""

    times: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, seq: int) -> None:
        self.times += 1
        if len(self.first) < _EVIDENCE:
            self.first.append(seq)


class Ledger:
    """Reads events in their order, each as the plain values that a line of a trace file has."""

    def __init__(self) -> None:
        self._events = 0
        self._witnessed = False
        self._findings: list[Finding] = []
        self._detaches = Detaches()
        self._debts = CacheDebts()
        self._enabled = True
        self._unsynced: list[Invalidation] = []
        self._sync_began: int | None = None
        self._barrier = 0
        self._translated: dict[int, int] = {}
        self._silent: dict[int, _Repeated] = {}
        self._lost: dict[tuple[int, str, str], _Repeated] = {}
        self._remembered: dict[tuple[int, int], tuple[int, int]] = {}
        self._handlers: dict[str, Handler] = {
            "RegisterAccess": self._accessed,
            "CommandConsumed": self._consumed,
            "SyncWaiting": self._waiting,
            "SyncCompleted": self._synced,
            "Translated": self._remember,
            "TranslatedPassed": self._remember,
            "DmaMoved": self._moved,
            "Aborted": self._aborted,
            "EventRecorded": self._recorded,
            "EventLost": self._event_lost,
            "AtcInvalidationGivenUp": self._given_up,
            "StreamConfigured": self._configured,
            "EntryStale": self._debts.stale,
            "EntriesGone": self._gone,
            "StaleUse": self._used,
            "DomainRemembered": self._domain_remembered,
            "DetachDeclared": self._declared,
            "AccountClosed": self._closed,
        }

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """A ledger that has read a trace file. Raises `OSError`, and `ValueError` for a file that is no trace."""
        ledger = cls()
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    ledger.read(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}: line {number} is no event of a trace") from error
        return ledger

    def follow(self, tracer: Tracer) -> Callable[[], None]:
        """Read what `tracer` hands out from now on. Returns the function that ends it."""

        def see(event: Event) -> None:
            if event.kind in self._handlers:
                self.read(event.as_dict())
            else:
                self._events += 1

        return tracer.subscribe(see)

    def read(self, record: Record) -> None:
        """Take one event in. What has no `seq` is numbered from 1 on."""
        self._events += 1
        handler = self._handlers.get(record["kind"])
        if handler is not None:
            self._findings += handler(record.get("seq", self._events), record)

    def verdict(self) -> Verdict:
        """What the run amounts to if it ends here. Reading may go on."""
        findings = [
            *self._findings,
            *self._owing(),
            *self._detaches.late(),
            *self._notes(),
        ]
        findings = list(_merged(findings))
        findings.sort(key=lambda finding: -finding.severity)
        return Verdict(tuple(findings), tuple(self._detaches.stays), self._events, self._witnessed)

    # Commands

    def _accessed(self, _: int, record: Record) -> Iterable[Finding]:
        if record["write"] and record["name"] == "CR0" and record["size"] >= _WORD:
            self._enabled = Cr0(record["value"] & 0xFFFF_FFFF).smmuen
        return ()

    def _consumed(self, seq: int, record: Record) -> Iterable[Finding]:
        opcode = record["opcode"]
        if opcode == "CMD_ATC_INV" and not self._enabled:
            return ()  # it is ignored (4.5.1)
        if opcode.startswith(_INVALIDATIONS):
            self._unsynced.append(Invalidation(seq, opcode, record["value"]))
            self._detaches.consumed(seq, opcode, record["value"])
        return ()

    def _waiting(self, seq: int, _: Record) -> Iterable[Finding]:
        self._sync_began = seq
        return ()

    def _synced(self, seq: int, _: Record) -> Iterable[Finding]:
        if self._unsynced:
            self._barrier = self._sync_began or seq
            self._unsynced.clear()
        self._sync_began = None
        return [*self._detaches.synced(seq), *self._debts.synced(seq)]

    def _owing(self) -> Iterator[Finding]:
        """What can no longer come well if nothing more comes."""
        owing = [*self._detaches.owing()]
        owing += self._debts.owing(bool(self._unsynced))
        return self._told_once(owing, self._unsynced, "by the end")

    @staticmethod
    def _told_once(
        owing: list[Finding], unsynced: list[Invalidation], until: str
    ) -> Iterator[Finding]:
        """A detach and a cache may owe the same command; and only if nobody does, one for CMD_SYNC alone is due."""
        told = set()
        for finding in owing:
            what = finding.command, finding.stream_id
            if finding.stream_id is None or what not in told:
                told.add(what)
                yield finding
        if unsynced and all(command != "CMD_SYNC" for command, _ in told):
            opcodes = ", ".join(sorted({each.opcode for each in unsynced}))
            yield Finding(
                Severity.VIOLATION,
                "missing-sync",
                f"no CMD_SYNC completed {opcodes} {until}",
                "CMD_SYNC",
                None,
                tuple(each.seq for each in unsynced[:_EVIDENCE]),
            )

    def _closed(self, _: int, record: Record) -> Iterable[Finding]:  # noqa: ARG002
        findings = [*self._owing()]
        self._unsynced.clear()
        self._detaches.close()
        self._debts.close()
        self._remembered.clear()
        return findings

    def _declared(self, seq: int, record: Record) -> Iterator[Finding]:
        stream_id = record["stream_id"]
        domains = self._detaches.domains(stream_id)
        unsynced = [each for each in self._unsynced if each.concerns(stream_id, domains)]
        owing = [*self._detaches.declared(seq, stream_id)]
        owing += self._debts.declared(seq, stream_id, domains, bool(unsynced))
        yield from self._told_once(owing, unsynced, f"by #{seq}, where the driver said it was done")
        self._unsynced = [each for each in self._unsynced if not each.concerns(stream_id, domains)]

    def _configured(self, seq: int, record: Record) -> Iterable[Finding]:
        self._witnessed = True
        return self._detaches.configured(seq, record)

    # Transactions

    def _remember(self, seq: int, record: Record) -> Iterable[Finding]:
        while len(self._translated) >= _TRANSACTIONS:
            del self._translated[next(iter(self._translated))]
        self._translated[record["transaction"]] = seq
        return ()

    def _moved(self, seq: int, record: Record) -> Iterator[Finding]:
        self._detaches.moved(record)
        began = self._translated.pop(record["transaction"], seq)
        if began < self._barrier:
            yield Finding(
                Severity.VIOLATION,
                "in-flight-after-sync",
                f"the SMMU completed a CMD_SYNC while a transaction of stream {record['stream_id']:#x} was in "
                "flight that had been translated before it",
                None,
                record["stream_id"],
                (began, self._barrier, seq),
            )

    def _used(self, seq: int, record: Record) -> Iterable[Finding]:
        if record["cause"] in ("STE", "CD"):
            self._detaches.used(seq, record)
            return ()
        return self._debts.used(seq, record)

    def _gone(self, seq: int, record: Record) -> Iterable[Finding]:
        self._debts.gone(seq, record)
        return ()

    def _domain_remembered(self, seq: int, record: Record) -> Iterable[Finding]:
        self._remembered[record["vmid"], record["asid"]] = seq, record["entries"]
        return ()

    # Faults

    def _aborted(self, seq: int, record: Record) -> Iterable[Finding]:
        if record["event"] is None:
            self._detaches.fault(record["stream_id"], None)
            self._silent.setdefault(record["stream_id"], _Repeated()).add(seq)
        return ()

    def _recorded(self, _: int, record: Record) -> Iterable[Finding]:
        self._detaches.fault(record["stream_id"], record["event"])
        return ()

    def _event_lost(self, seq: int, record: Record) -> Iterable[Finding]:
        key = record["stream_id"], record["event"], record["why"]
        self._lost.setdefault(key, _Repeated()).add(seq)
        return ()

    def _given_up(self, seq: int, record: Record) -> Iterator[Finding]:
        stream_id = record["stream_id"]
        yield Finding(
            Severity.EXPOSURE,
            "atc-unanswered",
            f"the function of stream {stream_id:#x} did not answer an invalidation: what it holds is unknown",
            "CMD_ATC_INV",
            stream_id,
            (seq,),
        )

    def _notes(self) -> Iterator[Finding]:
        for (vmid, asid), (seq, entries) in self._remembered.items():
            if entries:
                yield Finding(
                    Severity.NOTE,
                    "domain-remembered",
                    f"{entries:,} TLB entries of {owner_name(vmid, asid)} outlived its last stream: they must go "
                    "before its tables or its ASID are used again",
                    "CMD_TLBI_NH_ASID",
                    None,
                    (seq,),
                )
        for (stream_id, event, why), lost in self._lost.items():
            yield Finding(
                Severity.NOTE,
                "fault-lost",
                f"{lost.times:,} {event} of stream {stream_id:#x} did not reach software: {why}",
                None,
                stream_id,
                tuple(lost.first),
            )
        for stream_id, silent in self._silent.items():
            yield Finding(
                Severity.NOTE,
                "silent-abort",
                f"{silent.times:,} transactions of stream {stream_id:#x} were aborted without an event",
                None,
                stream_id,
                tuple(silent.first),
            )


def _merged(findings: list[Finding]) -> Iterator[Finding]:
    """What was found again in the same words but for numbers, or for the same reason, once."""
    found: dict[object, list[Finding]] = {}
    for finding in findings:
        key = finding.severity, finding.rule, finding.command, finding.stream_id
        found.setdefault(key, []).append(finding)
    for same in found.values():
        first = same[0]
        times = "" if len(same) == 1 else f" ({len(same):,} times)"
        yield replace(first, text=first.text + times)
