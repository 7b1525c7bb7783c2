"""What the SMMU remembers: its TLB, and its cache of STEs and CDs."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from viommu.control import Methods
from viommu.smmu import Smmu
from viommu.smmu.configuration import NO_STAGE_1
from viommu.smmu.context import StreamContext
from viommu.smmu.inspection import Inspection
from viommu.smmu.tlb import GLOBAL, GLOBAL_SET_1, KEY_MASK, OUTPUT, STAGE_2, Entry, Tag
from viommu.views.tables import Address, Limit, Row, permissions

Id = Annotated[int, Field(ge=0, lt=1 << 16)]

_SLOTS = 1 << 17
# How many places of the TLB one look goes through: it bounds how long others wait.
_ASIDS = {GLOBAL: "global", GLOBAL_SET_1: "global, ASET 1", STAGE_2: "stage 2"}
_SIGN = 0xFF << 56


class CacheViews:
    """Registers `smmu.tlb` and `smmu.cache`."""

    def __init__(self, smmu: Smmu, methods: Methods) -> None:
        self._smmu = smmu
        methods.add("smmu.tlb", self.tlb)
        methods.add("smmu.cache", self.cache)

    def tlb(
        self,
        asid: Id | None = None,
        vmid: Id | None = None,
        address: Address | None = None,
        limit: Limit = 64,
    ) -> Row:
        """List the TLB: all of it, of an ASID, of a VMID, or what maps an address; `more` says that it was cut."""
        entries: list[Row] = []
        left = _SLOTS
        for tag in self._smmu.tlb.tags():
            if asid not in (None, tag.asid) or vmid not in (None, tag.vmid):
                continue
            for iova, entry in self._entries(tag, address):
                left -= 1
                if left < 0 or len(entries) == limit:
                    return {"entries": entries, "more": True}
                if entry.slot:
                    entries.append(_entry(tag, iova, entry))
        return {"entries": entries, "more": False}

    def _entries(self, tag: Tag, address: int | None) -> Iterator[tuple[int, Entry]]:
        """Of one tag, with those places of a row that are empty."""
        tlb = self._smmu.tlb
        if address is not None:
            if (found := tlb.find(tag, address)) is not None:
                yield address & KEY_MASK & -(1 << found.shift), found
            return
        for first, shift, row in tlb.rows(tag):
            for index, slot in enumerate(row):
                yield first + (index << shift), Entry(shift, slot)

    def cache(self, limit: Limit = 64) -> Row:
        """List the cached STEs and CDs; `stale` are those that memory contradicts, `more` says that it was cut."""
        cached, inspection = self._smmu.configuration, Inspection(self._smmu)
        rows: list[Row] = []
        for stream_id, ste in cached.cached_stes.items():
            if len(rows) == limit:
                return {"structures": rows, "more": True}
            rows.append(
                {
                    "structure": "STE",
                    "stream_id": stream_id,
                    "substream_id": None,
                    "stale": inspection.stale_structure(stream_id, NO_STAGE_1) == "STE",
                    "fields": ste.as_dict(),
                }
            )
        for (stream_id, substream_id), context in cached.cached_contexts.items():
            if context is None or context.stage_1 is None:
                continue  # no CD
            if len(rows) == limit:
                return {"structures": rows, "more": True}
            rows.append(
                {
                    "structure": "CD",
                    "stream_id": stream_id,
                    "substream_id": substream_id,
                    "stale": inspection.stale_structure(stream_id, substream_id) == "CD",
                    "fields": _decoded(context),
                }
            )
        return {"structures": rows, "more": False}


def _entry(tag: Tag, iova: int, entry: Entry) -> Row:
    return {
        "world": tag.world.name,
        "vmid": tag.vmid,
        "asid": _ASIDS.get(tag.asid, tag.asid),
        "iova": iova | _SIGN if iova >> 55 else iova,
        "address": entry.slot & OUTPUT & -(1 << entry.shift),
        "size": 1 << entry.shift,
        "permissions": permissions(entry.slot),
    }


def _decoded(context: StreamContext) -> Row:
    """What is left of a CD once it is decoded."""
    stage = context.stage_1
    assert stage is not None
    tables = {
        name: base.address
        for name, base in (("ttb0", stage.low), ("ttb1", stage.high))
        if base.enabled
    }
    return {"asid": stage.asid, "vmid": context.tag.vmid, "world": stage.world.name, **tables}
