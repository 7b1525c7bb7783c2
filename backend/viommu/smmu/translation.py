"""A transaction's way through the SMMU: configuration, TLB, walks, permissions (IHI 0070, 3.3.3 and 3.4)."""

from array import array
from collections.abc import Callable

from viommu import hot
from viommu.layouts.records import EventType, FaultClass
from viommu.memory import BusError, GuestMemory
from viommu.smmu.configuration import Configuration
from viommu.smmu.context import Stage2, StreamContext, as_configured
from viommu.smmu.faults import Access, Fault, translation_fault
from viommu.smmu.features import Features
from viommu.smmu.points import TlbFill, TlbLookup
from viommu.smmu.tlb import CLEAN, FLAGS, OUTPUT, Entry, Tlb
from viommu.smmu.walk import Leaf, Walker, needed_flags, select_base
from viommu.trace import Replace, Skip, Tracer

MAX_RANGE = 1 << 21
"""The most bytes that one translation covers."""


class Translation:
    """Where a range of input addresses goes: `runs` (address, length, …) of `size` bytes together.

    `number` tells it apart in the trace; it is 0 while nobody reads along.
    """

    __slots__ = ("access", "iova", "number", "runs", "size")

    def __init__(self, access: Access, iova: int, runs: "array[int]", size: int) -> None:
        self.access, self.iova, self.runs, self.size = access, iova, runs, size
        self.number = 0


class Translator:
    """Translates ranges with the caches that it is given. It raises `Fault` and records nothing."""

    def __init__(
        self,
        memory: GuestMemory,
        configuration: Configuration,
        tlb: Tlb,
        walker: Walker,
        features: Features,
        tracer: Tracer,
    ) -> None:
        self._memory = memory
        self._tracer = tracer
        self._configuration = configuration
        self._tlb = tlb
        self._walker = walker
        self._output_address_bits = features.output_address_bits
        self._ahead = features.caching == "hostile"
        self._forgetful = features.caching == "none"

    def translate(self, access: Access, iova: int, size: int) -> Translation:
        """Translate `size` bytes from `iova`, or as many as go through before the first fault.

        Raises `Fault` when not even the first byte does. The rest of a range is a transaction of its own: its fault is
        raised, and recorded, when somebody asks for it.
        """
        self.refresh()
        access, context = self._configuration.lookup(access, iova)
        if context is None:
            return self.bypass(access, iova, size)
        return self.through(context, access, iova, size)

    def translate_ranges(self, access: Access, ranges: "array[int]") -> Translation:
        """`translate` for a transaction whose bytes are at `ranges` (address, length, …)."""
        self.refresh()
        access, context = self._configuration.lookup(access, ranges[0])
        if context is None:
            return self.bypass_ranges(access, ranges)
        try:
            return _over(ranges, access, lambda address: self.page(context, access, address))
        except Fault as fault:
            raise _configured(fault, context) from None

    def refresh(self) -> None:
        """A new transaction begins: a profile without caches forgets what it knew."""
        if self._forgetful:
            self._configuration.invalidate_all()
            self._tlb.invalidate_all()

    def through(self, context: StreamContext, access: Access, iova: int, size: int) -> Translation:
        """`translate` for a context that is known."""
        size = min(size, MAX_RANGE, (1 << 64) - iova)
        runs: array[int] = array("Q")
        done = 0
        try:
            while done < size:
                done += self._translate_some(context, access, iova + done, size - done, runs)
        except Fault as fault:
            if not done:
                raise _configured(fault, context) from None
        return Translation(access, iova, runs, done)

    def page(self, context: StreamContext, access: Access, address: int) -> Entry:
        """The page or block that maps `address`, with permission for `access`. Raises the `Fault` as it is met."""
        runs: array[int] = array("Q")
        self._translate_some(context, access, address, 1, runs)
        for tag in context.tags:
            found = self._tlb.find(tag, address)
            if found is not None and found.slot & ~FLAGS == runs[0] & -(1 << found.shift) & OUTPUT:
                return found
        return Entry(12, runs[0] & OUTPUT)  # evicted since: what is known of it is its page

    def first_stage(self, context: StreamContext, access: Access, address: int) -> Entry:
        """The page or block of stage 1 alone, whose output is an IPA when there is a stage 2. Raises `Fault`."""
        stage_1 = context.stage_1
        assert stage_1 is not None
        base = select_base(stage_1, access, address)
        return self._walker.stage_1(stage_1, context.stage_2, base, access, address).entry

    def bypass(self, access: Access, iova: int, size: int) -> Translation:
        """An address that no stage translates must fit the output address size (3.4)."""
        limit = 1 << self._output_address_bits
        if iova >= limit:
            raise translation_fault(EventType.F_ADDR_SIZE, access, iova)
        size = min(size, MAX_RANGE, limit - iova)
        return Translation(access, iova, array("Q", (iova, size)), size)

    def bypass_ranges(self, access: Access, ranges: "array[int]") -> Translation:
        """`bypass` for `ranges` (address, length, …)."""

        def everything(address: int) -> Entry:
            self.bypass(access, address, 1)
            return Entry(self._output_address_bits, 0)

        return _over(ranges, access, everything)

    def _translate_some(
        self, context: StreamContext, access: Access, address: int, size: int, runs: "array[int]"
    ) -> int:
        """Cover part of the range with one row of pages or one block; returns its bytes."""
        stage_1 = context.stage_1
        base = None
        if stage_1 is not None:
            base = select_base(stage_1, access, address)
        elif address >> self._output_address_bits:
            # Stage 1 is bypassed, by what is too large to be an IPA (3.4).
            raise translation_fault(EventType.F_ADDR_SIZE, access, address)
        need = needed_flags(access)
        known = self._tracer.meddler is None or self._may_look(access, address)
        for tag in context.tags if known else ():
            found = self._tlb.row(tag, address)
            if found is not None:
                shift, row = found
                covered = _collect(row, shift, need, address, size, runs)
                if covered:
                    return covered
                self._refuse(context, row[address >> shift & len(row) - 1], access, address)
                self._tlb.forget(tag, address)
            block = self._tlb.block(tag, address)
            if block is not None:
                covered = _use(block, need, address, size, runs)
                if covered:
                    return covered
                self._refuse(context, block.slot, access, address)
                self._tlb.forget(tag, address)
        if stage_1 is None:
            assert context.stage_2 is not None
            leaf = self._walker.stage_2(
                context.stage_2, address, access, address, FaultClass.IN, alone=True
            )
        else:
            assert base is not None
            leaf = self._walker.stage_1(stage_1, context.stage_2, base, access, address)
            if context.stage_2 is not None:
                leaf = self._through_stage_2(context.stage_2, leaf, access, address)
        if self._tracer.meddler is not None:
            kept = self._meddled(leaf, access, address)
            if kept is None:
                covered = _use(leaf.entry, need, address, size, runs)
            else:
                leaf = kept
                covered = self._keep(context, leaf, need, address, size, runs)
        else:
            covered = self._keep(context, leaf, need, address, size, runs)
        if not covered:
            raise translation_fault(
                EventType.F_PERMISSION, access, address, stage_2=stage_1 is None,
                ipa=address if stage_1 is None else 0,
            )  # fmt: skip
        return covered

    def _may_look(self, access: Access, address: int) -> bool:
        assert self._tracer.meddler is not None
        point = TlbLookup(access.stream_id, access.substream_id, address, access.write)
        return not isinstance(self._tracer.meddler(point), Skip)

    def _meddled(self, leaf: Leaf, access: Access, address: int) -> Leaf | None:
        """What shall be kept in place of `leaf`; None is nothing. Neighbours are kept as long as nobody objects."""
        assert self._tracer.meddler is not None
        shift, slot = leaf.entry
        output = slot & OUTPUT & -(1 << shift)
        point = TlbFill(access.stream_id, access.substream_id, address, access.write, shift, output)
        match self._tracer.meddler(point):
            case Skip():
                return None
            case Replace(value):
                slot = int(value) & OUTPUT & -(1 << shift) | slot & FLAGS
                return leaf._replace(entry=Entry(shift, slot), mask=0)
            case _:
                return leaf

    def _refuse(self, context: StreamContext, slot: int, access: Access, address: int) -> None:
        """Raise the permission fault of a cached entry, if the entry alone can tell that it is one."""
        if slot & CLEAN and access.write:
            return  # the write may make it dirty
        if context.stage_2 is None:
            raise translation_fault(EventType.F_PERMISSION, access, address)
        if context.stage_1 is None:
            raise translation_fault(
                EventType.F_PERMISSION, access, address, stage_2=True, ipa=address
            )
        # Whose permission it is, of stage 1 or 2, and at which IPA, only a walk knows.

    def _through_stage_2(self, stage_2: Stage2, leaf: Leaf, access: Access, address: int) -> Leaf:
        """The combination of a leaf of stage 1 with what stage 2 makes of its output."""
        shift, slot = leaf.entry
        ipa = slot & OUTPUT & -(1 << shift) | address & (1 << shift) - 1
        need = needed_flags(access)
        inner = self._tlb.find(stage_2.tag, ipa)
        if inner is None or inner.slot & need != need:
            inner = self._walker.stage_2(stage_2, ipa, access, address, FaultClass.IN).entry
            self._tlb.insert(stage_2.tag, ipa, inner)
        smaller = min(shift, inner.shift)
        output = inner.slot & OUTPUT & -(1 << inner.shift) | ipa & (1 << inner.shift) - 1
        flags = slot & inner.slot & FLAGS | (slot | inner.slot) & CLEAN
        return leaf._replace(entry=Entry(smaller, output & -(1 << smaller) | flags), mask=0)

    def _keep(
        self,
        context: StreamContext,
        leaf: Leaf,
        need: int,
        address: int,
        size: int,
        runs: "array[int]",
    ) -> int:
        """Cache what a walk found, and its neighbours as far as they are wanted; cover what they map."""
        is_global = leaf.is_global and context.stage_1 is not None
        tag = context.global_tag if is_global else context.tag
        row = self._tlb.insert(tag, address, leaf.entry, whole=leaf.whole)
        shift = leaf.entry.shift
        if row is None:
            return _use(leaf.entry, need, address, size, runs)
        first = address >> shift & len(row) - 1
        wanted = ((address & (1 << shift) - 1) + size - 1 >> shift) + 1
        if leaf.mask and self._ahead:
            self._fill(row, leaf, 0, leaf.entries)
        elif leaf.mask and wanted > 1:
            self._fill(row, leaf, first + 1, min(wanted, leaf.entries - first) - 1)
        return _collect(row, shift, need, address, size, runs)

    def _fill(self, row: "array[int]", leaf: Leaf, first: int, count: int) -> None:
        """Take over the neighbours of a page as far as they say the same; with hostile caches all that do."""
        page = (1 << leaf.entry.shift) - 1
        try:
            descriptors = self._memory.view(leaf.table, leaf.entries * 8).cast("Q")
        except BusError:
            return  # a table across two regions: each page is walked on its own
        # What is above bit 47 is not where the descriptor has it: neighbours share it.
        shared = leaf.entry.slot & (page | _ABOVE_48)
        end = first + count
        try:
            while first < end:
                first += 1 + hot.fill(
                    descriptors, row, first, end - first, leaf.mask, leaf.expected,
                    _BELOW_48 & ~page, shared,
                )  # fmt: skip
                if not self._ahead:
                    break
        finally:
            descriptors.release()


def _over(ranges: "array[int]", access: Access, find: Callable[[int], Entry]) -> Translation:
    """Where `ranges` go by the pages and blocks that `find` knows, up to its first fault.

    Raises that fault when nothing goes anywhere.
    """
    runs: array[int] = array("Q")
    size = first = end = target = (
        0  # of the page or block: input addresses, and where the first goes
    )
    for address, length in zip(ranges[::2], ranges[1::2], strict=True):
        while length:
            if not first <= address < end:
                try:
                    shift, slot = find(address)
                except Fault:
                    if not size:
                        raise
                    return Translation(access, ranges[0], runs, size)
                first = address & -(1 << shift)
                end = first + (1 << shift)
                target = slot & OUTPUT & -(1 << shift)
            part = min(length, end - address)
            start = target + address - first
            if runs and runs[-2] + runs[-1] == start:
                runs[-1] += part
            else:
                runs.extend((start, part))
            address += part
            length -= part
            size += part
    return Translation(access, ranges[0], runs, size)


def _configured(fault: Fault, context: StreamContext) -> Fault:
    """The fault as its stage wants it handled."""
    stage = context.stage_2 if fault.record and fault.record.s2 else context.stage_1
    fault = as_configured(fault, stage)
    fault.merge = context.merges
    return fault


_BELOW_48 = (1 << 48) - 1
_ABOVE_48 = (1 << 52) - (1 << 48)


def _collect(
    row: "array[int]", shift: int, need: int, address: int, size: int, runs: "array[int]"
) -> int:
    offset = address & (1 << shift) - 1
    first = address >> shift & len(row) - 1
    count = min(len(row) - first, (offset + size - 1 >> shift) + 1)
    if count == 1:
        return _use(Entry(shift, row[first]), need, address, size, runs)
    return hot.collect(row, first, count, need, shift, offset, size, runs)


def _use(entry: Entry, need: int, address: int, size: int, runs: "array[int]") -> int:
    if entry.slot & need != need:
        return 0
    inside = (1 << entry.shift) - 1
    part = min(size, inside + 1 - (address & inside))
    start = entry.slot & OUTPUT & ~inside | address & inside
    if runs and runs[-2] + runs[-1] == start:
        runs[-1] += part
    else:
        runs.extend((start, part))
    return part
