"""What the caches hold that memory no longer says: found at a look, known until it is gone."""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping

from viommu.layouts.tables import Eats
from viommu.ledger.events import EntriesGone, EntryStale
from viommu.ledger.pages import Pages
from viommu.smmu.ats_port import HeldTranslation
from viommu.smmu.context import StreamContext
from viommu.smmu.faults import Access
from viommu.smmu.inspection import Inspection, StaleStructure, StaleTranslation
from viommu.smmu.model import Smmu
from viommu.smmu.tlb import GLOBAL, GLOBAL_SET_1, OUTPUT, STAGE_2, Entry, Tag, World
from viommu.trace import Event

Owner = tuple[str, int | None, int | None, int | None, int | None]
# The cache, and StreamID, SubstreamID, VMID and ASID as far as they apply.


class Holdings:
    """The stale entries of the TLB, of the configuration cache and of the functions' translation caches."""

    def __init__(self, smmu: Smmu, inspection: Inspection, pages: Pages) -> None:
        self._smmu, self._inspection, self._pages = smmu, inspection, pages
        self._tlb: dict[tuple[Tag, int], tuple[Entry, bool]] = {}
        self._structures: set[StaleStructure] = set()
        self._atc: set[tuple[int, HeldTranslation]] = set()

    def __bool__(self) -> bool:
        """Something is held that is stale."""
        return bool(self._tlb or self._structures or self._atc)

    def forget(self) -> None:
        """The caches are no longer in use."""
        self._tlb.clear()
        self._structures.clear()
        self._atc.clear()

    # What is new

    def check(
        self, contexts: Mapping[Tag, StreamContext], attached: set[Tag], *, outlived: bool
    ) -> Iterator[Event]:
        """The entries that were not known to be stale."""
        yield from self._check_tlb(contexts, attached, outlived)
        for structure in self._inspection.stale_structures():
            if structure not in self._structures:
                self._structures.add(structure)
                yield EntryStale(
                    structure.structure,
                    f"CMD_CFGI_{structure.structure}",
                    structure.stream_id,
                    structure.substream_id,
                    None, None, 0, 0, 0, 1, "another", outlived, taken=False,
                )  # fmt: skip
        yield from self._check_atc(outlived)

    def _check_tlb(
        self, contexts: Mapping[Tag, StreamContext], attached: set[Tag], outlived: bool
    ) -> Iterator[Event]:
        found: list[tuple[StaleTranslation, bool]] = []
        for stale in self._inspection.stale_translations(contexts):
            key, taken = (stale.tag, stale.iova), isinstance(stale.now, int)
            known = self._tlb.get(key)
            if known is None or known[0] != stale.entry or taken > known[1]:
                found.append((stale, known is None or known[0] != stale.entry))
                self._tlb[key] = stale.entry, taken
        yield from self._told(found, attached, outlived)

    def disown(self, tag: Tag) -> Iterator[Event]:
        """The ASID or VMID is another domain's from now on: all that is held of it is stale."""
        found = []
        for iova, entry in self._smmu.tlb.entries(tag):
            new = (tag, iova) not in self._tlb
            self._tlb[tag, iova] = entry, True
            found.append((StaleTranslation(tag, iova, entry, "another domain"), new))
        yield from self._told(found, set(), outlived=True)

    def _told(
        self, found: list[tuple[StaleTranslation, bool]], attached: set[Tag], outlived: bool
    ) -> Iterator[EntryStale]:
        """Adjacent entries that are stale for the same reason make one event."""
        self._pages.watch(
            array("Q", [n for stale, _ in found for n in (_address(stale), 1 << stale.entry.shift)])
        )
        groups: list[list[tuple[StaleTranslation, bool]]] = []
        for each in sorted(found, key=lambda each: (each[0].tag, each[0].iova)):
            last = groups[-1][-1] if groups else None
            if last is not None and last[1] == each[1] and _continues(last[0], each[0]):
                groups[-1].append(each)
            else:
                groups.append([each])
        for group in groups:
            (first, new), (last_one, _) = group[0], group[-1]
            tag, now = first.tag, first.now
            yield EntryStale(
                "TLB",
                _command(tag, by_address=tag in attached),
                None,
                None,
                tag.vmid,
                tag.asid,
                first.iova,
                last_one.iova + (1 << last_one.entry.shift) - first.iova,
                _address(first),
                len(group) if new else 0,
                f"{now:#x}" if isinstance(now, int) else now,
                outlived,
                isinstance(now, int) or now == "another domain",
            )

    def _check_atc(self, outlived: bool) -> Iterator[Event]:
        for stream_id, function in self._smmu.ats_port.functions.items():
            for held in function.held():
                if (stream_id, held) in self._atc:
                    continue
                now = self._says(stream_id, held)
                if now is not None:
                    self._atc.add((stream_id, held))
                    yield EntryStale(
                        "ATC", "CMD_ATC_INV", stream_id, held.substream_id, None, None,
                        held.iova, held.size, held.address, 1, now, outlived, taken=False,
                    )  # fmt: skip

    def _says(self, stream_id: int, held: HeldTranslation) -> str | None:
        """What memory says where a function's entry is; None when it says the same."""
        view = self._inspection.stream(stream_id, held.substream_id)
        if view.ste is not None and view.ste.eats == Eats.SPLIT_STAGE:
            return None  # what the function knows is an IPA
        write = held.write and not held.read
        access = Access(stream_id, held.substream_id, write, held.privileged)
        runs, fault = self._inspection.translate(view, access, held.iova, held.size)
        if fault is not None:
            return fault
        same = sum(runs[1::2]) == runs[-2] + runs[-1] - runs[0] and runs[0] == held.address
        return None if same else f"{runs[0]:#x}"

    # What is gone

    def gone(self, by: str) -> Iterator[EntriesGone]:
        """The stale entries that are no longer held."""
        counts: Counter[Owner] = Counter()
        for (tag, iova), (entry, _) in list(self._tlb.items()):
            if self._smmu.tlb.find(tag, iova) != entry:
                del self._tlb[tag, iova]
                counts["TLB", None, None, tag.vmid, tag.asid] += 1
        stale = set(self._inspection.stale_structures())
        for structure in self._structures - stale:
            counts[
                structure.structure, structure.stream_id, structure.substream_id, None, None
            ] += 1
        self._structures &= stale
        functions = self._smmu.ats_port.functions
        caches = {stream: set(functions[stream].held()) for stream in {s for s, _ in self._atc}}
        for stream_id, held in list(self._atc):
            if held not in caches[stream_id]:
                self._atc.remove((stream_id, held))
                counts["ATC", stream_id, held.substream_id, None, None] += 1
        for owner, count in counts.items():
            yield EntriesGone(*owner, count, by)


def _address(stale: StaleTranslation) -> int:
    return stale.entry.slot & OUTPUT & -(1 << stale.entry.shift)


def _continues(before: StaleTranslation, after: StaleTranslation) -> bool:
    if before.tag != after.tag or before.iova + (1 << before.entry.shift) != after.iova:
        return False
    if isinstance(before.now, int) and isinstance(after.now, int):
        return before.now - before.iova == after.now - after.iova
    return before.now == after.now


def _command(tag: Tag, *, by_address: bool) -> str:
    """What removes entries of `tag`: by address while a stream uses it, else all of them."""
    if tag.world is not World.EL1:
        return "CMD_TLBI_EL2_VA" if by_address else "CMD_TLBI_EL2_ALL"
    if tag.asid == STAGE_2:
        return "CMD_TLBI_S2_IPA" if by_address else "CMD_TLBI_S12_VMALL"
    if tag.asid in (GLOBAL, GLOBAL_SET_1):
        return "CMD_TLBI_NH_VAA" if by_address else "CMD_TLBI_NH_ALL"
    return "CMD_TLBI_NH_VA" if by_address else "CMD_TLBI_NH_ASID"
