"""Every stream's stays in domains, and what each detach still owes: CFGI, then CMD_SYNC."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from viommu.layouts.commands import (
    CFGI_ALL_RANGE,
    AtcInvalidateCommand,
    Opcode,
    StreamCommand,
    TlbiCommand,
)
from viommu.ledger.findings import Finding, Severity, Stay
from viommu.smmu.tlb import STAGE_2

Record = Mapping[str, Any]
_WORKING = ("translate", "bypass")
_OF_ONE_ASID = (Opcode.CMD_TLBI_NH_ASID.name, Opcode.CMD_TLBI_NH_VA.name)


class Invalidation(NamedTuple):
    """A command that was consumed, and whose effect a CMD_SYNC has still to complete."""

    seq: int
    opcode: str
    value: int

    def concerns(self, stream_id: int, domains: set[str]) -> bool:
        """Whether it can be what a detach of the stream from `domains` needs."""
        if self.opcode == Opcode.CMD_ATC_INV.name:
            return AtcInvalidateCommand(self.value).stream_id == stream_id
        if self.opcode.startswith("CMD_CFGI"):
            return _covers_stream(StreamCommand(self.value), stream_id)
        if self.opcode in _OF_ONE_ASID:
            command = TlbiCommand(self.value)
            return owner_name(command.vmid, command.asid) in domains
        return bool(domains)


class Detaches:
    """Follows streams through `StreamConfigured`, the commands, and what moves meanwhile.

    A stay ends when memory takes its domain away. The detach is complete when the structure that changed has been
    invalidated and a CMD_SYNC after that has completed; until then it is `open`.
    """

    def __init__(self) -> None:
        self.stays: list[Stay] = []
        self._now: dict[tuple[int, int | None], Stay] = {}
        self._open: list[Stay] = []
        self._counted: Stay | None = None
        self._late: dict[int, list[int]] = {}

    def configured(self, seq: int, record: Record) -> Iterator[Finding]:
        """Memory says something new of a stream. A detach that is open for it will not be completed any more."""
        key = record["stream_id"], record["substream_id"]
        if record["structure"] is not None:
            for stay in [s for s in self._open if (s.stream_id, s.substream_id) == key]:
                yield owed(stay, f"by #{seq}, where it changed again")
                self._open.remove(stay)
            left = self._now.pop(key, None)
            if left is not None:
                left.changed, left.structure = seq, record["structure"]
                self._open.append(left)
        if record["state"] in _WORKING:
            stay = Stay(*key, domain=domain_name(record), attached=seq)
            self._now[key] = stay
            self.stays.append(stay)

    def consumed(self, seq: int, opcode: str, value: int) -> None:
        """A command was consumed."""
        if opcode.startswith("CMD_CFGI"):
            command = StreamCommand(value)
            for stay in self._open:
                if stay.invalidated is None and _covers(command, stay):
                    stay.invalidated = seq

    def synced(self, seq: int) -> Iterator[Finding]:
        """A CMD_SYNC is complete, and with it what was invalidated."""
        for stay in list(self._open):
            if stay.invalidated is None:
                stay.syncs += 1
                continue
            stay.completed = seq
            self._open.remove(stay)
            if stay.syncs:
                yield Finding(
                    Severity.EXPOSURE if stay.window else Severity.NOTE,
                    "deferred-invalidation",
                    f"stream {stay.stream_id:#x} left {stay.domain}, and {stay.syncs:,} CMD_SYNC went by before the "
                    f"{stay.structure} was invalidated{_meanwhile(stay)}",
                    f"CMD_CFGI_{stay.structure}",
                    stay.stream_id,
                    _steps(stay),
                )

    def declared(self, seq: int, stream_id: int) -> Iterator[Finding]:
        """The driver says that the stream's detach is complete."""
        for stay in [s for s in self._open if s.stream_id == stream_id]:
            yield owed(stay, f"by #{seq}, where the driver said it was done")
            stay.completed = seq
            self._open.remove(stay)

    def moved(self, record: Record) -> None:
        """Bytes moved."""
        stay = self._counted = self._now.get((record["stream_id"], record["substream_id"]))
        if stay is not None:
            _count(stay, record, record["size"])

    def used(self, seq: int, record: Record) -> None:
        """A transaction used what a stale STE or CD says."""
        if not record["moved"]:
            return
        old = self._last_left((record["stream_id"], record["substream_id"]))
        if self._counted is not None:
            _count(self._counted, record, -record["size"])  # it was not by this one that they moved
        if old is None:
            return
        _count(old, record, record["size"])
        if old.completed is None:
            old.window += record["size"]
        else:
            old.late += record["size"]
            self._late.setdefault(id(old), []).append(seq)

    def fault(self, stream_id: int, name: str | None) -> None:
        """A transaction of the stream was refused, in silence when there is no name."""
        for stay in reversed(self.stays):
            if stay.stream_id == stream_id:
                if name is None:
                    stay.silent_aborts += 1
                else:
                    stay.faults[name] = stay.faults.get(name, 0) + 1
                return

    def domains(self, stream_id: int) -> set[str]:
        """The domains that the stream is in, or was in last."""
        stays = [stay for stay in self.stays if stay.stream_id == stream_id]
        return {stay.domain for stay in stays if stay.changed is None} | {
            stay.domain for stay in stays[-1:]
        }

    def close(self) -> None:
        """The account is closed: nobody is in a domain any more."""
        self._open.clear()
        self._now.clear()

    def owing(self) -> Iterator[Finding]:
        """What is not complete."""
        for stay in self._open:
            yield owed(stay, "by the end")

    def late(self) -> Iterator[Finding]:
        """What moved after a detach was complete."""
        for stay in self.stays:
            if stay.late:
                yield Finding(
                    Severity.VIOLATION,
                    "dma-after-detach",
                    f"{stay.late:,} bytes moved by {stay.domain} after stream {stay.stream_id:#x} had left it",
                    None,
                    stay.stream_id,
                    (stay.changed or 0, stay.completed or 0, *self._late[id(stay)]),
                )

    def _last_left(self, key: tuple[int, int | None]) -> Stay | None:
        for stay in reversed(self.stays):
            if (stay.stream_id, stay.substream_id) == key and stay.changed is not None:
                return stay
        return None


def owed(stay: Stay, until: str) -> Finding:
    """What a detach lacks: the invalidation, or what completes it."""
    if stay.invalidated is None:
        rule, command = "missing-invalidation", f"CMD_CFGI_{stay.structure}"
        what = f"the {stay.structure} was not invalidated"
    else:
        rule, command, what = "missing-sync", "CMD_SYNC", "no CMD_SYNC completed that"
    return Finding(
        Severity.VIOLATION,
        rule,
        f"stream {stay.stream_id:#x} left {stay.domain}, and {what} {until}{_meanwhile(stay)}",
        command,
        stay.stream_id,
        _steps(stay),
    )


def _meanwhile(stay: Stay) -> str:
    return f"; {stay.window:,} bytes moved meanwhile" if stay.window else ""


def _steps(stay: Stay) -> tuple[int, ...]:
    steps = (stay.changed, stay.invalidated, stay.completed)
    return tuple(step for step in steps if step is not None)


def domain_name(record: Record) -> str:
    """`ASID 3`, `VMID 7`, both, or `bypass`."""
    if record["state"] == "bypass":
        return "bypass"
    return owner_name(record["vmid"], record["asid"])


def owner_name(vmid: int, asid: int | None) -> str:
    """What TLB entries belong to. An ASID below 0 is one of the TLB's own: of stage 2, or of global entries."""
    if asid is None or asid == STAGE_2:
        return f"VMID {vmid}"
    name = "the global entries" if asid < 0 else f"ASID {asid}"
    return f"{name} of VMID {vmid}" if vmid else name


def _count(stay: Stay, record: Record, size: int) -> None:
    if record["write"]:
        stay.written += size
    else:
        stay.read += size


def _covers(command: StreamCommand, stay: Stay) -> bool:
    """Whether the command invalidates what changed; that of an STE takes the CDs with it (4.3.1)."""
    if not _covers_stream(command, stay.stream_id):
        return False
    match command.opcode:
        case Opcode.CMD_CFGI_STE | Opcode.CMD_CFGI_STE_RANGE:
            return True
        case Opcode.CMD_CFGI_CD_ALL:
            return stay.structure == "CD"
        case _:
            of_it = command.substream_id == (stay.substream_id or 0)
            return stay.structure == "CD" and of_it


def _covers_stream(command: StreamCommand, stream_id: int) -> bool:
    """Whether the command is about the stream."""
    if command.opcode != Opcode.CMD_CFGI_STE_RANGE:
        return command.stream_id == stream_id
    if command.leaf_or_range == CFGI_ALL_RANGE:
        return True
    shift = command.leaf_or_range + 1
    return command.stream_id >> shift == stream_id >> shift
