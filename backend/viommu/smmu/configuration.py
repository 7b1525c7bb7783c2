"""From a StreamID to what the SMMU shall do with a transaction: stream table, STE, CD table, CD, and their caches.

IHI 0070, 3.3 and chapter 5. Faults come in the order of 7.3.22: C_BAD_STREAMID, F_STE_FETCH, C_BAD_STE,
C_BAD_SUBSTREAMID, F_STREAM_DISABLED, stage 2 faults of the CD fetch, F_CD_FETCH, C_BAD_CD.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress

from viommu.layouts.records import EventType, FaultClass
from viommu.layouts.registers import StrtabBase, StrtabBaseCfg, StrtabFormat
from viommu.layouts.tables import (
    CD_LEAF_SPLIT,
    ContextDescriptor,
    ContextTableLevel1,
    S1Default,
    SteConfig,
    StreamTableEntry,
    StreamTableLevel1,
)
from viommu.memory import BusError, GuestMemory
from viommu.smmu.context import (
    Stage1,
    Stage2,
    StreamContext,
    as_configured,
    cd_max,
    decode_stage_1,
    decode_stage_2,
    ste_illegal,
    stream_context,
    translates_stage_1,
    translates_stage_2,
)
from viommu.smmu.faults import Access, Fault, configuration_fault
from viommu.smmu.features import Features
from viommu.smmu.points import Structure, StructureRead
from viommu.smmu.walk import Walker
from viommu.trace import BusAbort, Replace, Tracer

STE_SIZE = CD_SIZE = 64
_CACHE_LIMIT = 4096  # STEs, and contexts: a bound on memory, not a property
NO_STAGE_1 = -1
"""Stands for a SubstreamID where no CD is used."""
_LEVEL_1 = (Structure.STE_LEVEL_1, Structure.CD_LEVEL_1)
_AHEAD = 4
# How many structures, an aligned group, are read where one is needed and the caches are hostile.


def _aligned(pointer: int, size: int) -> int:
    return pointer & -size


class Configuration:
    """Finds and caches what governs a stream.

    STEs and CDs are cached once they are valid; neither is looked at again before a command invalidates it. A profile
    whose caching is hostile caches what is invalid too, and the neighbours of what it needs (3.21.3 allows either).
    """

    def __init__(
        self, memory: GuestMemory, features: Features, walker: Walker, tracer: Tracer
    ) -> None:
        self._memory = memory
        self._tracer = tracer
        self._features = features
        self._walker = walker
        self._hostile = features.caching == "hostile"
        self._stes: dict[int, StreamTableEntry] = {}
        self._contexts: dict[tuple[int, int], StreamContext | None] = {}
        self._bad: dict[tuple[int, int], EventType] = {}
        self._answers: dict[tuple[int, int | None], StreamContext | None] = {}
        # What `lookup` has found since any of these lost something, for STEs that override nothing.
        self.base = StrtabBase()
        self.base_cfg = StrtabBaseCfg()
        self.e2h = False
        """CR2.E2H."""
        self.fetched: Callable[[str, Access, int, object], None] | None = None
        """Called with "STE" or "CD", the access, the address and the structure; set while somebody listens."""

    def __len__(self) -> int:
        """Cached structures."""
        return len(self._stes) + len(self._contexts)

    # What is cached, for who looks on

    @property
    def cached_stes(self) -> Mapping[int, StreamTableEntry]:
        """The cached STEs, by StreamID."""
        return self._stes

    @property
    def cached_contexts(self) -> Mapping[tuple[int, int], StreamContext | None]:
        """The cached contexts, by StreamID and SubstreamID, which is `NO_STAGE_1` where no CD is used."""
        return self._contexts

    # Invalidation (4.3)

    def invalidate_all(self) -> None:
        """CMD_CFGI_ALL, and reset."""
        self._answers.clear()
        self._stes.clear()
        self._contexts.clear()
        self._bad.clear()

    def invalidate_streams(self, stream_id: int, range_log2: int = 0) -> None:
        """The STEs of an aligned group of 2^range_log2 StreamIDs, and all CDs reached through them (4.3.1, 4.3.2)."""
        if not (self._stes or self._contexts or self._bad):
            return
        self._answers.clear()
        group = stream_id >> range_log2
        for stream in [s for s in self._stes if s >> range_log2 == group]:
            del self._stes[stream]
        self._forget(lambda stream, _: stream >> range_log2 == group)

    def invalidate_cd(self, stream_id: int, substream_id: int) -> None:
        """CMD_CFGI_CD (4.3.3)."""
        self._answers.clear()
        self._contexts.pop((stream_id, substream_id), None)
        self._bad.pop((stream_id, substream_id), None)

    def invalidate_cds(self, stream_id: int) -> None:
        """CMD_CFGI_CD_ALL (4.3.4)."""
        self._forget(lambda stream, substream: stream == stream_id and substream != NO_STAGE_1)

    def _forget(self, chosen: Callable[[int, int], bool]) -> None:
        self._answers.clear()
        for key in [k for k in self._contexts if chosen(*k)]:
            del self._contexts[key]
        for key in [k for k in self._bad if chosen(*k)]:
            del self._bad[key]

    # Look-up

    def lookup(self, access: Access, address: int) -> tuple[Access, StreamContext | None]:
        """The access with the attributes that the STE gives it, and what translates it; None when nothing does.

        Raises `Fault`. `address` is the input address, which a stage 2 fault of a CD fetch records.
        """
        asked = access.stream_id, access.substream_id
        if asked in self._answers:
            return access, self._answers[asked]
        ste = self.ste(access)
        if ste.config not in _WORKING:
            raise Fault(None)  # Config 0b0xx aborts without an event (5.2)
        access = self.overridden(ste, access)
        context = self._context(ste, access, address)
        if not self._overrides(ste):
            self._answers[asked] = context
        return access, context

    def _context(self, ste: StreamTableEntry, access: Access, address: int) -> StreamContext | None:
        substream_id = self._select_substream(ste, access)
        key = access.stream_id, substream_id
        try:
            return self._contexts[key]
        except KeyError:
            pass
        if key in self._bad:
            raise configuration_fault(self._bad[key], access)
        context = self._find_context(ste, access, substream_id, address)
        if self._hostile and substream_id != NO_STAGE_1:
            ahead = range(substream_id & -_AHEAD, (substream_id & -_AHEAD) + _AHEAD)
            for other in ahead[: 1 << cd_max(ste, self._features)]:
                if not self._known(access.stream_id, other):
                    with suppress(Fault):
                        self._find_context(ste, access, other, address)
        return context

    def _find_context(
        self, ste: StreamTableEntry, access: Access, substream_id: int, address: int
    ) -> StreamContext | None:
        stage_1 = None
        if substream_id != NO_STAGE_1:
            stage_1 = self._fetch_cd(ste, access, substream_id, address)
        if len(self._contexts) >= _CACHE_LIMIT:
            self._answers.clear()
            self._contexts.clear()
        context = stream_context(ste, stage_1, self._features)
        self._contexts[access.stream_id, substream_id] = context
        return context

    def _known(self, stream_id: int, substream_id: int) -> bool:
        key = stream_id, substream_id
        cached = stream_id in self._stes if substream_id == NO_STAGE_1 else key in self._contexts
        return cached or key in self._bad

    def ste(self, access: Access) -> StreamTableEntry:
        """The STE of a stream, valid and legal. Raises `Fault`."""
        ste = self._stes.get(access.stream_id)
        if ste is None:
            if (access.stream_id, NO_STAGE_1) in self._bad:
                raise configuration_fault(EventType.C_BAD_STE, access)
            if self._hostile:
                first = access.stream_id & -_AHEAD
                for other in range(first, first + _AHEAD):
                    if other != access.stream_id and not self._known(other, NO_STAGE_1):
                        with suppress(Fault):
                            self._fetch_ste(access._replace(stream_id=other))
            ste = self._fetch_ste(access)
        return ste

    def _overrides(self, ste: StreamTableEntry) -> bool:
        return self._features.permission_overrides and bool((ste.privcfg | ste.instcfg) & 2)

    def overridden(self, ste: StreamTableEntry, access: Access) -> Access:
        """PRIVCFG and INSTCFG (5.2): 0 takes what came, 2 clears, 3 sets; 1 is reserved and takes what came."""
        if self._overrides(ste):
            if ste.privcfg & 2:
                access = access._replace(privileged=ste.privcfg == 3)
            if ste.instcfg & 2:
                access = access._replace(instruction=ste.instcfg == 3)
        return access

    def _refuse(self, event: EventType, access: Access, substream_id: int) -> Fault:
        if self._hostile:
            if len(self._bad) >= _CACHE_LIMIT:
                self._bad.clear()
            self._bad[access.stream_id, substream_id] = event
        return configuration_fault(event, access)

    def _load(
        self,
        structure: Structure,
        address: int,
        access: Access,
        event: EventType,
        iova: int | None = None,
    ) -> bytes:
        """The bytes of a structure, or the fault `event` of its fetch."""
        size = 8 if structure in _LEVEL_1 else STE_SIZE
        try:
            data = self._memory.read(address, size)
        except BusError:
            raise configuration_fault(event, access, address) from None
        if self._tracer.meddler is None:
            return data
        point = StructureRead(
            structure,
            access.stream_id,
            access.substream_id,
            iova,
            access.write,
            address,
            size,
            int.from_bytes(data, "little"),
        )
        match self._tracer.meddler(point):
            case BusAbort():
                raise configuration_fault(event, access, address)
            case Replace(value):
                return int(value).to_bytes(size, "little")
            case _:
                return data

    def _fetch_ste(self, access: Access) -> StreamTableEntry:
        address = self._ste_address(access)
        data = self._load(Structure.STE, address, access, EventType.F_STE_FETCH)
        ste = StreamTableEntry.from_bytes(data)
        if self.fetched:
            self.fetched("STE", access, address, ste)
        if not ste.valid or (ste.config in _WORKING and ste_illegal(ste, self._features)):
            raise self._refuse(EventType.C_BAD_STE, access, NO_STAGE_1)
        if len(self._stes) >= _CACHE_LIMIT:
            self._answers.clear()
            self._stes.clear()
        self._stes[access.stream_id] = ste
        return ste

    def _ste_address(self, access: Access) -> int:
        """Linear or 2-level stream table (3.3.1)."""
        stream_id = access.stream_id
        size = self.base_cfg.log2size
        if stream_id >> min(size, self._features.stream_id_bits):
            raise configuration_fault(EventType.C_BAD_STREAMID, access)
        # The base is aligned to LOG2SIZE as it was written, whatever SIDSIZE is (6.3.24).
        if self.base_cfg.fmt != StrtabFormat.TWO_LEVEL or not self._features.two_level_streams:
            return _aligned(self.base.addr, STE_SIZE << size) + stream_id * STE_SIZE
        # A reserved SPLIT behaves as 6 (6.3.25).
        split = self.base_cfg.split if self.base_cfg.split in (6, 8, 10) else 6
        level_1 = _aligned(self.base.addr, max(64, 8 << max(0, size - split)))
        address = level_1 + (stream_id >> split) * 8
        data = self._load(Structure.STE_LEVEL_1, address, access, EventType.F_STE_FETCH)
        entry = StreamTableLevel1.from_bytes(data)
        # Span 0 is invalid; a span of more than the split covers is treated like it (5.1).
        index = stream_id & (1 << split) - 1
        if not 1 <= entry.span <= split + 1 or index >> (entry.span - 1):
            raise configuration_fault(EventType.C_BAD_STREAMID, access)
        return _aligned(entry.l2_ptr, STE_SIZE << (entry.span - 1)) + index * STE_SIZE

    def _select_substream(self, ste: StreamTableEntry, access: Access) -> int:
        """Which CD to use (3.3.2, 5.2 S1DSS), or that stage 1 is bypassed."""
        substream_id, bits = access.substream_id, cd_max(ste, self._features)
        translates = translates_stage_1(ste)
        if substream_id is not None and (not translates or not bits or substream_id >> bits):
            raise configuration_fault(EventType.C_BAD_SUBSTREAMID, access)
        if not translates:
            return NO_STAGE_1
        if not bits:
            return 0
        if substream_id is None:
            if ste.s1_dss == S1Default.BYPASS:
                return NO_STAGE_1
            if ste.s1_dss != S1Default.SUBSTREAM_0:
                raise configuration_fault(EventType.F_STREAM_DISABLED, access)
            return 0
        if substream_id == 0 and ste.s1_dss == S1Default.SUBSTREAM_0:
            raise configuration_fault(EventType.F_STREAM_DISABLED, access)
        return substream_id

    def _fetch_cd(
        self, ste: StreamTableEntry, access: Access, substream_id: int, address: int
    ) -> Stage1:
        # Every table is aligned to its size, the lower bits of its pointer are ignored (5.2, S1Fmt).
        bits = cd_max(ste, self._features)
        stage_2 = decode_stage_2(ste, self._features) if translates_stage_2(ste) else None
        split = CD_LEAF_SPLIT.get(ste.s1_format) if bits else None
        if split is None:
            place = _aligned(ste.s1_context_ptr, CD_SIZE << bits) + substream_id * CD_SIZE
        else:
            table = _aligned(ste.s1_context_ptr, max(64, 8 << max(0, bits - split)))
            entry_place = self._physical(
                table + (substream_id >> split) * 8, stage_2, access, address
            )
            data = self._load(
                Structure.CD_LEVEL_1, entry_place, access, EventType.F_CD_FETCH, address
            )
            entry = ContextTableLevel1.from_bytes(data)
            # A pointer beyond the output addresses is as bad as none (3.4.3, as of SMMUv3.1).
            beyond = stage_2 is None and entry.l2_ptr >> self._features.output_address_bits
            if not entry.valid or beyond:
                raise configuration_fault(EventType.C_BAD_SUBSTREAMID, access)
            leaf = _aligned(entry.l2_ptr, CD_SIZE << split)
            place = leaf + (substream_id & (1 << split) - 1) * CD_SIZE
        place = self._physical(place, stage_2, access, address)
        data = self._load(Structure.CD, place, access, EventType.F_CD_FETCH, address)
        cd = ContextDescriptor.from_bytes(data)
        if self.fetched:
            self.fetched("CD", access, place, cd)
        stage_1 = decode_stage_1(cd, ste, self._features, e2h=self.e2h)
        if stage_1 is None:
            raise self._refuse(EventType.C_BAD_CD, access, substream_id)
        return stage_1

    def _physical(self, place: int, stage_2: Stage2 | None, access: Access, address: int) -> int:
        """Where a part of a CD table lies: its pointers are IPAs when there is a stage 2 (3.4)."""
        if stage_2 is None:
            return place
        try:
            return self._walker.ipa_to_pa(stage_2, place, access, address, FaultClass.CD)
        except Fault as fault:
            raise as_configured(fault, stage_2) from None


_WORKING = frozenset(
    {SteConfig.BYPASS, SteConfig.S1_TRANSLATE, SteConfig.S2_TRANSLATE, SteConfig.NESTED}
)
