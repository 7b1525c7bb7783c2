"""What guest memory says now, and what the SMMU still holds of what it said before.

An inspection walks the same tables by the same code as the SMMU does, with caches of its own that it empties before
each look. It neither changes the SMMU's caches nor guest memory, and it records no event.
"""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from viommu.layouts.tables import ContextDescriptor, Eats, SteConfig, StreamTableEntry
from viommu.memory import BusError
from viommu.smmu.configuration import NO_STAGE_1, Configuration
from viommu.smmu.context import (
    StreamContext,
    decode_stage_2,
    translates_stage_1,
    translates_stage_2,
)
from viommu.smmu.faults import Access, Fault
from viommu.smmu.model import Smmu
from viommu.smmu.onlooker import Loaded, Onlooker
from viommu.smmu.points import StructureRead
from viommu.smmu.tlb import (
    CLEAN,
    FLAGS,
    OUTPUT,
    PRIV_EXECUTE,
    PRIV_READ,
    PRIV_WRITE,
    USER_EXECUTE,
    USER_READ,
    USER_WRITE,
    Entry,
    Tag,
    Tlb,
)
from viommu.smmu.translation import Translator
from viommu.smmu.walk import Walker
from viommu.trace import Point, Tracer

Runs = array  # of type code "Q": address, length, address, length, …

_USER = USER_READ | USER_WRITE | USER_EXECUTE
_READ, _WRITE = PRIV_READ | USER_READ, PRIV_WRITE | USER_WRITE
_SIGN = 0xFF << 56
_ROWS = 4096  # of the TLB that are remembered as good


@dataclass(frozen=True, slots=True)
class StreamView:
    """What memory says governs a stream, or one substream of it.

    `fault` is the event that a transaction would meet, `abort` when it would meet none; else `context` is what
    translates, and None is bypass. Structures that were not reached are None.
    """

    ste_address: int | None
    ste: StreamTableEntry | None
    cd_address: int | None
    cd: ContextDescriptor | None
    fault: str | None
    context: StreamContext | None

    @property
    def state(self) -> str:
        """`translate`, `bypass`, `abort`, or the name of an event."""
        return self.fault or ("bypass" if self.context is None else "translate")


class Descriptor(NamedTuple):
    """A descriptor that was read at `address`, by a walk of `stage` that was at `level`."""

    address: int
    content: int
    level: int | None
    stage: int | None


class Walk(NamedTuple):
    """A walk: the descriptors on the way, and the entry that it ends in or the fault that it meets."""

    descriptors: list[Descriptor]
    entry: Entry | None
    fault: str | None


class StaleTranslation(NamedTuple):
    """A TLB entry that allows more than memory does. `now` is what memory has there: a fault, or an address."""

    tag: Tag
    iova: int
    entry: Entry
    now: str | int


class StaleStructure(NamedTuple):
    """A cached STE or CD that says something else than memory."""

    structure: str
    stream_id: int
    substream_id: int | None


class _Row(NamedTuple):
    """A row of the TLB that said what memory says, and all that this depends on."""

    context: StreamContext
    slots: bytes
    loads: list[Loaded]

    def covers(self, context: StreamContext, row: "array[int]", memory: Onlooker) -> bool:
        """Whether nothing of it has changed."""
        same = context is self.context and row.tobytes() == self.slots
        return same and memory.still_says(self.loads)


class Inspection:
    """Looks at the tables of `smmu`, and at its caches."""

    def __init__(self, smmu: Smmu) -> None:
        self._smmu = smmu
        self._features = features = replace(smmu.features, caching="normal")
        self._memory = memory = Onlooker(smmu.memory)
        self._tlb = Tlb()
        self._tracer = nobody = Tracer()  # reads along, or meddles, but for `walk`
        walker = Walker(memory, self._tlb, nobody, features)
        self._configuration = Configuration(memory, features, walker, nobody)
        self._translator = Translator(
            memory, self._configuration, self._tlb, walker, features, nobody
        )
        # Of a row of the TLB all entries are looked at together.
        ahead = replace(features, caching="hostile")
        self._row_translator = Translator(
            memory, self._configuration, self._tlb, walker, ahead, nobody
        )
        self._rows: dict[tuple[Tag, int, int], _Row] = {}
        self._views: dict[tuple[int, int | None], tuple[object, list[Loaded], StreamView]] = {}

    # Memory

    def stream(self, stream_id: int, substream_id: int | None = None) -> StreamView:
        """What memory says of a stream. The same object as before while it says the same."""
        real = self._smmu.configuration
        registers = real.base.value, real.base_cfg.value, real.e2h
        key = stream_id, substream_id
        known = self._views.get(key)
        if known is not None and known[0] == registers and self._memory.still_says(known[1]):
            return known[2]
        loads: list[Loaded] = []
        self._memory.loads = loads
        view = self._look(Access(stream_id, substream_id))
        self._views[key] = registers, loads, view
        return view

    def forget(self, stream_id: int, substream_id: int | None = None) -> None:
        """Keep nothing of `stream` for its next call."""
        self._views.pop((stream_id, substream_id), None)

    def _look(self, access: Access) -> StreamView:
        shadow, real = self._configuration, self._smmu.configuration
        shadow.invalidate_all()
        self._tlb.invalidate_all()
        shadow.base, shadow.base_cfg, shadow.e2h = real.base, real.base_cfg, real.e2h
        found: dict[str, tuple[int, object]] = {}
        shadow.fetched = lambda name, _, address, content: found.update({name: (address, content)})
        fault, context = None, None
        try:
            _, context = shadow.lookup(access, 0)
        except Fault as met:
            fault = _name(met)
        ste_address, ste = found.get("STE", (None, None))
        cd_address, cd = found.get("CD", (None, None))
        assert ste is None or isinstance(ste, StreamTableEntry)
        assert cd is None or isinstance(cd, ContextDescriptor)
        return StreamView(ste_address, ste, cd_address, cd, fault, context)

    def translate(
        self, view: StreamView, access: Access, iova: int, size: int
    ) -> "tuple[Runs[int], str | None]":
        """Where memory lets an access of a stream go now, and the fault that ends it before `size` bytes."""
        runs: array[int] = array("Q")
        if view.fault is not None:
            return runs, view.fault
        assert view.ste is not None
        self._tlb.invalidate_all()
        self._memory.loads = []
        access = self._configuration.overridden(view.ste, access)
        done = 0
        try:
            while done < size:
                part = (
                    self._translator.bypass(access, iova + done, size - done)
                    if view.context is None
                    else self._translator.through(view.context, access, iova + done, size - done)
                )
                runs.extend(part.runs)
                done += part.size
        except Fault as fault:
            return runs, _name(fault)
        return runs, None

    def walk(self, access: Access, iova: int) -> Walk:
        """The walk of one address, from the first table of its domain."""
        view = self.stream(access.stream_id, access.substream_id)
        if view.fault is not None or view.context is None:
            return Walk([], None, view.fault)
        assert view.ste is not None
        self._tlb.invalidate_all()
        self._memory.loads = []
        access = self._configuration.overridden(view.ste, access)
        entry, fault = None, None
        read: list[Descriptor] = []

        def note(point: Point) -> None:
            if isinstance(point, StructureRead):
                read.append(Descriptor(point.address, point.value, point.level, point.stage))

        self._tracer.meddler = note
        try:
            entry = self._translator.page(view.context, access, iova)
        except Fault as met:
            fault = _name(met)
        finally:
            self._tracer.meddler = None
        return Walk(read, entry, fault)

    # Caches

    def stale_structures(self) -> Iterator[StaleStructure]:
        """The cached STEs and CDs that differ from memory in what they mean."""
        cached = self._smmu.configuration
        for stream_id in list(cached.cached_stes):
            if self.stale_structure(stream_id, NO_STAGE_1) is not None:
                yield StaleStructure("STE", stream_id, None)
        for stream_id, substream_id in list(cached.cached_contexts):
            if self.stale_structure(stream_id, substream_id) == "CD":
                yield StaleStructure("CD", stream_id, substream_id)

    def stale_structure(self, stream_id: int, substream_id: int) -> str | None:
        """Which cached structure of a stream differs from memory: `STE`, `CD`, or none."""
        cached = self._smmu.configuration
        view = self.stream(stream_id)
        held = cached.cached_stes.get(stream_id)
        if held is not None and self.effect(held) != self.effect(view.ste):
            return "STE"
        context = cached.cached_contexts.get((stream_id, substream_id))
        if context is None or context.stage_1 is None:
            return None
        if view.context is None or view.context.stage_1 is None or substream_id:
            view = self.stream(stream_id, substream_id)
        now = None if view.context is None else view.context.stage_1
        return None if now == context.stage_1 else "CD"

    def effect(self, ste: StreamTableEntry | None) -> object:
        """What of an STE counts (5.2): two with the same effect need no invalidation between them."""
        if ste is None or not ste.valid:
            return None
        if ste.config not in (SteConfig.BYPASS, *_TRANSLATES):
            return SteConfig.ABORT
        first = stage_2 = eats = None
        if translates_stage_1(ste):
            first = (
                ste.s1_context_ptr,
                ste.s1_cd_max,
                ste.s1_cd_max and (ste.s1_format, ste.s1_dss),
                ste.strw,
                ste.s1_stalld,
            )
        if translates_stage_2(ste):
            stage_2 = decode_stage_2(ste, self._features)
        if ste.config in _TRANSLATES:
            eats = ste.s2_vmid, ste.mev, ste.eats if self._features.ats else Eats.DISABLED
        return ste.config, first, stage_2, eats, ste.privcfg, ste.instcfg

    def stale_translations(
        self, contexts: Mapping[Tag, StreamContext]
    ) -> Iterator[StaleTranslation]:
        """The TLB entries that allow more than the tables of the domains that `contexts` tells of.

        Entries of other tags are left alone: nobody knows their tables.
        """
        for tag in self._smmu.tlb.tags():
            context = contexts.get(tag)
            if context is None:
                continue
            for first, shift, row in self._smmu.tlb.rows(tag):
                key = tag, first, shift
                known = self._rows.get(key)
                if known is not None and known.covers(context, row, self._memory):
                    continue
                self._rows.pop(key, None)
                table = self._row_of(context, first, shift, row)
                self._tlb.invalidate_all()
                self._memory.loads = []
                good, fresh = True, None
                for index, slot in enumerate(row):
                    if not slot or (fresh is not None and fresh[index] == slot):
                        continue
                    entry, iova = Entry(shift, slot), first + (index << shift)
                    now = self._now(context, entry, iova)
                    if now is not None:
                        good = False
                        yield StaleTranslation(tag, iova, entry, now)
                    elif fresh is None and (found := self._tlb.row(tag, iova)) is not None:
                        fresh = found[1]  # and what the walk found beside it
                if good and table is not None:
                    if len(self._rows) >= _ROWS:
                        self._rows.clear()
                    self._rows[key] = table

    def _row_of(
        self, context: StreamContext, first: int, shift: int, row: "array[int]"
    ) -> "_Row | None":
        """What a look at a row of the TLB depends on, as it is before that look; None when that is not one table."""
        index = next((index for index, slot in enumerate(row) if slot), None)
        if index is None or (context.stage_1 is not None and context.stage_2 is not None):
            return None
        self._tlb.invalidate_all()
        loads: list[Loaded] = []
        self._memory.loads = loads
        if self._now(context, Entry(shift, row[index]), first + (index << shift)) is not None:
            return None
        if len(row) > 1:
            # The whole table instead of one descriptor of it; being read it is on record.
            place = loads.pop().address & -(8 * len(row))
            try:
                self._memory.read(place, 8 * len(row))
            except BusError:
                return None
        return _Row(context, row.tobytes(), loads)

    def _now(self, context: StreamContext, held: Entry, iova: int) -> str | int | None:
        """What memory has where an entry is; None when it allows all that the entry does."""
        for tag in context.tags:
            found = self._tlb.find(tag, iova)
            if found is not None and _covers(found, held, iova):
                return None
        address = iova | _SIGN if iova >> 55 else iova
        try:
            found = self._row_translator.page(context, _permitted(held.slot), address)
        except Fault as fault:
            return _name(fault)
        if _covers(found, held, iova):
            return None
        address = _output(found, iova)
        return "less permission" if address == _output(held, iova) else address

    def differing(self, before: StreamView, now: StreamView) -> str | None:
        """Which structure made the difference between two views of one stream: `STE`, `CD`, or none in meaning."""
        if before is now:
            return None
        if self.effect(before.ste) != self.effect(now.ste):
            return "STE"
        return None if (before.fault, before.context) == (now.fault, now.context) else "CD"


_TRANSLATES = (SteConfig.S1_TRANSLATE, SteConfig.S2_TRANSLATE, SteConfig.NESTED)


def _name(fault: Fault) -> str:
    record = fault.record or fault.hidden
    return "abort" if record is None else record.event.name


def _output(entry: Entry, iova: int) -> int:
    inside = (1 << entry.shift) - 1
    return entry.slot & OUTPUT & ~inside | iova & inside


def _covers(found: Entry, held: Entry, iova: int) -> bool:
    """Whether `found` allows all that `held` does. What the SMMU itself may make writable counts as writable."""
    if _output(found, iova) != _output(held, iova):
        return False
    allowed = found.slot | (_WRITE if found.slot & CLEAN else 0)
    return not held.slot & FLAGS & (_READ | _WRITE | PRIV_EXECUTE | USER_EXECUTE) & ~allowed


def _permitted(slot: int) -> Access:
    """An access that a slot lets through."""
    return Access(
        0,
        write=not slot & _READ and bool(slot & _WRITE),
        privileged=not slot & _USER,
        instruction=not slot & (_READ | _WRITE),
    )
