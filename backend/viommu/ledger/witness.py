"""The witness: looks into guest memory when an event comes, and tells of it in events of its own."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from viommu.endpoints.port import DmaMoved
from viommu.layouts.commands import Opcode, StreamCommand
from viommu.layouts.registers import Cr0
from viommu.ledger.events import (
    AccountClosed,
    DomainRemembered,
    StaleUse,
    StreamConfigured,
)
from viommu.ledger.holdings import Holdings
from viommu.ledger.pages import Pages
from viommu.smmu.context import StreamContext
from viommu.smmu.events import (
    Aborted,
    CommandConsumed,
    RegisterAccess,
    SyncCompleted,
    Translated,
    TranslatedPassed,
)
from viommu.smmu.inspection import Inspection, StreamView
from viommu.smmu.model import Smmu
from viommu.smmu.tlb import OUTPUT, Tag
from viommu.smmu.translation import Translation
from viommu.trace import Event

_TRANSACTIONS = 4096  # that are remembered: many more than can be in flight
_STREAMS = 1024  # that are watched, of those that are blocked
_OF_ONE_STREAM = (Opcode.CMD_CFGI_STE.name, Opcode.CMD_CFGI_CD.name, Opcode.CMD_CFGI_CD_ALL.name)


@dataclass(slots=True)
class _Seen:
    """A transaction: where it went when it left the SMMU, what memory said of its stream then, and which cache knew
    better.
    """

    translation: Translation
    runs: "array[int]"
    view: StreamView | None
    cause: str | None


class Witness:
    """Subscribes to the events of `smmu` and adds its own, until it is closed."""

    def __init__(self, smmu: Smmu) -> None:
        self._smmu = smmu
        self._inspection = Inspection(smmu)
        self._streams: dict[tuple[int, int | None], StreamView] = {}
        self._contexts: dict[Tag, StreamContext] = {}
        self._remembered: dict[Tag, int] = {}
        self._transactions: dict[int, _Seen] = {}
        self._pages = Pages(smmu.memory, self._domains)
        self._holdings = Holdings(smmu, self._inspection, self._pages)
        handlers: dict[type[Event], Callable[[Any], None]] = {
            RegisterAccess: self._accessed,
            CommandConsumed: self._consumed,
            SyncCompleted: self._synced,
            Translated: self._translated,
            TranslatedPassed: self._passed,
            Aborted: self._aborted,
            DmaMoved: self._moved,
        }
        self._handlers = handlers
        self._unsubscribe = smmu.tracer.subscribe(self._see)

    def close(self) -> None:
        """Look a last time, and end. Idempotent."""
        if self._smmu.transactions.enabled:
            self._close_account("the run ended")
        self._unsubscribe()
        self._unsubscribe = lambda: None

    def _see(self, event: Event) -> None:
        if self._smmu.transactions.enabled:
            handler = self._handlers.get(type(event))
            if handler is not None:
                handler(event)
        elif self._streams:
            self._forget("the SMMU is off")

    def _emit(self, events: Iterable[Event]) -> None:
        for event in events:
            self._smmu.tracer.emit(event)

    # What comes

    def _accessed(self, event: RegisterAccess) -> None:
        if event.write and event.name == "CMDQ_PROD":
            self._look()  # before the commands that tell of it
        elif event.write and event.name == "CR0" and not Cr0(event.value & 0xFFFF_FFFF).smmuen:
            self._close_account("SMMUEN was cleared")

    def _consumed(self, event: CommandConsumed) -> None:
        if event.opcode in _OF_ONE_STREAM:
            command = StreamCommand(event.value)
            self._watch(command.stream_id, None)
            if event.opcode == Opcode.CMD_CFGI_CD.name and command.substream_id:
                self._watch(command.stream_id, command.substream_id)
        if self._holdings:
            self._emit(self._holdings.gone(event.opcode))

    def _synced(self, _: SyncCompleted) -> None:
        self._look()
        self._check(outlived=True)
        if not self._holdings:
            self._pages.settle()
        self._pages.copy()
        attached = self._attached()
        for tag in list(self._contexts):
            entries = 0 if tag in attached else self._smmu.tlb.count(tag)
            if entries != self._remembered.get(tag, 0):
                self._remembered[tag] = entries
                self._emit([DomainRemembered(tag.vmid, tag.asid, entries)])
            if tag not in attached and not entries:
                del self._contexts[tag]

    def _translated(self, event: Translated) -> None:
        view = self._watch(event.stream_id, event.substream_id)
        translation = self._smmu.in_flight.newest
        seen = _Seen(translation, translation.runs, view, None)
        self._remember(event.transaction, seen)
        seen.cause = self._compare(event.transaction, seen, view, moved=False)

    def _passed(self, event: TranslatedPassed) -> None:
        translation = self._smmu.in_flight.newest
        self._remember(event.transaction, _Seen(translation, translation.runs, None, "ATC"))

    def _aborted(self, event: Aborted) -> None:
        self._watch(event.stream_id, event.substream_id)

    def _moved(self, event: DmaMoved) -> None:
        seen = self._transactions.pop(event.transaction, None)
        if seen is not None:
            view = self._watch(event.stream_id, event.substream_id)
            self._compare(event.transaction, seen, view, moved=True)

    # Streams

    def _watch(self, stream_id: int, substream_id: int | None) -> StreamView:
        """What memory says of a stream, which is looked at from now on."""
        key = stream_id, substream_id
        view = self._inspection.stream(stream_id, substream_id)
        before = self._streams.get(key)
        if before is view:
            return view
        if before is None:
            self._make_room()
        structure = None if before is None else self._inspection.differing(before, view)
        self._streams[key] = view
        if before is None or structure is not None:
            context = view.context
            if context is not None:
                self._know(context)
            self._emit([_configured(key, view, structure)])
        return view

    def _make_room(self) -> None:
        """Look no more at streams that nothing goes through, once there are so many: their next command tells."""
        if len(self._streams) >= _STREAMS:
            for key in [key for key, view in self._streams.items() if view.fault is not None]:
                del self._streams[key]
                self._inspection.forget(*key)

    def _look(self) -> None:
        for key in list(self._streams):
            self._watch(*key)

    def _know(self, context: StreamContext) -> None:
        for tag in context.tags:
            known = self._contexts.get(tag)
            if known == context:
                continue  # the same object as before: what was found to be good by it stays so
            if known is not None and _roots(known) != _roots(context) and tag == context.tag:
                self._emit(self._holdings.disown(tag))
            self._contexts[tag] = context
        stage_2 = context.stage_2
        if context.stage_1 is not None and stage_2 is not None:
            self._contexts[stage_2.tag] = StreamContext(None, stage_2, (stage_2.tag,), False)

    def _domains(self) -> list[StreamContext]:
        """What translates a stream now, each once."""
        found = [view.context for view in self._streams.values() if view.context is not None]
        return list({_roots(context): context for context in found}.values())

    def _attached(self) -> set[Tag]:
        tags = {tag for context in self._domains() for tag in context.tags}
        return tags | {c.stage_2.tag for c in self._domains() if c.stage_2 is not None}

    # Transactions

    def _remember(self, number: int, seen: _Seen) -> None:
        while len(self._transactions) >= _TRANSACTIONS:
            del self._transactions[next(iter(self._transactions))]
        self._transactions[number] = seen

    def _compare(self, number: int, seen: _Seen, view: StreamView, *, moved: bool) -> str | None:
        """Tell of a transaction that goes where memory does not let it; the cache that lets it."""
        translation = seen.translation
        access, iova = translation.access, translation.iova
        allowed, fault = self._inspection.translate(view, access, iova, translation.size)
        stray = differing(iova, _front(seen.runs, translation.size), allowed)
        if not stray:
            return None
        at, _, address = stray[0]
        cause = seen.cause or self._cause(seen, view)
        held = self._holds(cause, seen, at, address)
        if held:
            self._check(outlived=False)
        runs = array("Q", [number for _, size, address in stray for number in (address, size)])
        self._pages.watch(runs)
        tag = None
        if seen.view is not None and seen.view.context is not None:
            tag = seen.view.context.tag
        self._emit(
            [
                StaleUse(
                    number,
                    access.stream_id,
                    access.substream_id,
                    at,
                    sum(size for _, size, _ in stray),
                    address,
                    access.write,
                    moved,
                    cause,
                    held,
                    None if tag is None else tag.vmid,
                    None if tag is None else tag.asid,
                    _at(at - iova, allowed) or fault or "another address",
                    self._pages.reused(runs) if moved else "",
                )
            ]
        )
        return cause

    def _cause(self, seen: _Seen, view: StreamView) -> str:
        """Whether configuration made the difference, or the table entries themselves did."""
        access = seen.translation.access
        assert seen.view is not None
        return (
            self._inspection.differing(seen.view, view)
            or self._inspection.stale_structure(access.stream_id, access.substream_id or 0)
            or "TLB"
        )

    def _holds(self, cause: str, seen: _Seen, iova: int, address: int) -> bool:
        access = seen.translation.access
        if cause == "ATC":
            function = self._smmu.ats_port.functions.get(access.stream_id)
            return function is not None and any(
                held.address <= address < held.address + held.size for held in function.held()
            )
        if cause == "TLB":
            assert seen.view is not None
            context = seen.view.context
            for tag in () if context is None else context.tags:
                entry = self._smmu.tlb.find(tag, iova)
                if entry is not None:
                    start = entry.slot & OUTPUT & -(1 << entry.shift)
                    return start <= address < start + (1 << entry.shift)
            return False
        return self._inspection.stale_structure(access.stream_id, access.substream_id or 0) == cause

    # Accounts

    def _check(self, *, outlived: bool) -> None:
        self._emit(self._holdings.gone("eviction") if self._holdings else ())
        self._emit(self._holdings.check(self._contexts, self._attached(), outlived=outlived))

    def _close_account(self, why: str) -> None:
        self._look()
        self._check(outlived=False)
        self._forget(why)

    def _forget(self, why: str) -> None:
        self._streams.clear()
        self._contexts.clear()
        self._remembered.clear()
        self._transactions.clear()
        self._holdings.forget()
        self._pages.forget()
        self._emit([AccountClosed(why)])


def _configured(
    key: tuple[int, int | None], view: StreamView, structure: str | None
) -> StreamConfigured:
    context = view.context
    if context is None:
        return StreamConfigured(*key, view.state, structure)
    assert view.ste is not None
    stage_1, stage_2 = context.stage_1, context.stage_2
    return StreamConfigured(
        *key,
        view.state,
        structure,
        view.ste.config.name,
        context.tag.vmid,
        None if stage_1 is None else stage_1.asid,
        stage_1.low.address if stage_1 is not None and stage_1.low.enabled else None,
        stage_1.high.address if stage_1 is not None and stage_1.high.enabled else None,
        None if stage_2 is None else stage_2.address,
    )


def _roots(context: StreamContext) -> object:
    """What makes two contexts one domain: the tables, and what they are tagged with."""
    stage_1, stage_2 = context.stage_1, context.stage_2
    first = None if stage_1 is None else (stage_1.low.address, stage_1.high.address)
    return context.tag, first, None if stage_2 is None else stage_2.address


def differing(iova: int, used: "array[int]", allowed: "array[int]") -> list[tuple[int, int, int]]:
    """The parts (input address, bytes, output address) of a transaction that `allowed` does not send to the same place.

    Both are runs: address, length, address, length, …
    """
    if used == allowed:
        return []
    parts: list[tuple[int, int, int]] = []
    place = place_2 = 0  # in the runs
    done = done_2 = 0  # of the run
    while place < len(used):
        address, length = used[place] + done, used[place + 1] - done
        if place_2 < len(allowed):
            other = allowed[place_2] + done_2
            size = min(length, allowed[place_2 + 1] - done_2)
        else:
            other, size = -1, length
        if other != address:
            last = parts[-1] if parts else None
            if last is not None and last[0] + last[1] == iova and last[2] + last[1] == address:
                parts[-1] = last[0], last[1] + size, last[2]
            else:
                parts.append((iova, size, address))
        iova += size
        done, done_2 = done + size, done_2 + size
        if done == used[place + 1]:
            place, done = place + 2, 0
        if place_2 < len(allowed) and done_2 == allowed[place_2 + 1]:
            place_2, done_2 = place_2 + 2, 0
    return parts


def _front(runs: "array[int]", size: int) -> "array[int]":
    """The first `size` bytes of runs; a transaction becomes shorter where what is behind the SMMU lets less pass."""
    if sum(runs[1::2]) == size:
        return runs
    front: array[int] = array("Q")
    for address, length in zip(runs[::2], runs[1::2], strict=True):
        if size > 0:
            front.extend((address, min(length, size)))
        size -= length
    return front


def _at(offset: int, runs: "array[int]") -> str:
    """The address that `offset` goes to, empty when it is beyond the runs."""
    for address, length in zip(runs[::2], runs[1::2], strict=True):
        if offset < length:
            return f"{address + offset:#x}"
        offset -= length
    return ""
