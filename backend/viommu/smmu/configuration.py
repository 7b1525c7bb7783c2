"""From a StreamID to what the SMMU shall do with a transaction: stream table, STE, CD table, CD, and their caches.

IHI 0070, 3.3 and chapter 5. Faults come in the order of 7.3.22: C_BAD_STREAMID, F_STE_FETCH, C_BAD_STE,
C_BAD_SUBSTREAMID, F_STREAM_DISABLED, F_CD_FETCH, C_BAD_CD.
"""

from collections.abc import Callable

from viommu.layouts.records import EventType
from viommu.layouts.registers import ADDRESS_SIZES, StrtabBase, StrtabBaseCfg, StrtabFormat
from viommu.layouts.tables import (
    CD_LEAF_SPLIT,
    TG0_GRANULES,
    TG1_GRANULES,
    ContextDescriptor,
    ContextTableLevel1,
    S1Default,
    SteConfig,
    StreamTableEntry,
    StreamTableLevel1,
    StreamWorld,
)
from viommu.memory import BusError, GuestMemory
from viommu.smmu.faults import Access, Fault, configuration_fault
from viommu.smmu.features import Features
from viommu.smmu.tlb import GLOBAL, Tag
from viommu.smmu.walk import Regime, TableBase

STE_SIZE = CD_SIZE = 64
_CACHE_LIMIT = 4096  # STEs, and CDs: a bound on memory, not a property

Bypass = None
"""Stage 1 does not translate: the address goes out as it came in."""


def _aligned(pointer: int, size: int) -> int:
    return pointer & -size


class Configuration:
    """Finds and caches what governs a stream.

    STEs and CDs are cached once they are valid; neither is looked at again before a command invalidates it. An STE or
    a CD that faulted is not cached (3.21.3 allows either).
    """

    def __init__(self, memory: GuestMemory, features: Features) -> None:
        self._memory = memory
        self._features = features
        self._stes: dict[int, StreamTableEntry] = {}
        self._regimes: dict[tuple[int, int], Regime] = {}
        self.base = StrtabBase()
        self.base_cfg = StrtabBaseCfg()
        self.fetched: Callable[[str, Access, int, object], None] | None = None
        """Called with "STE" or "CD", the access, the address and the structure; set while somebody listens."""

    def __len__(self) -> int:
        """Cached structures."""
        return len(self._stes) + len(self._regimes)

    # Invalidation (4.3)

    def invalidate_all(self) -> None:
        """CMD_CFGI_ALL, and reset."""
        self._stes.clear()
        self._regimes.clear()

    def invalidate_streams(self, stream_id: int, range_log2: int = 0) -> None:
        """The STEs of an aligned group of 2^range_log2 StreamIDs, and all CDs reached through them (4.3.1, 4.3.2)."""
        group = stream_id >> range_log2
        for stream in [s for s in self._stes if s >> range_log2 == group]:
            del self._stes[stream]
        for key in [k for k in self._regimes if k[0] >> range_log2 == group]:
            del self._regimes[key]

    def invalidate_cd(self, stream_id: int, substream_id: int) -> None:
        """CMD_CFGI_CD (4.3.3)."""
        self._regimes.pop((stream_id, substream_id), None)

    def invalidate_cds(self, stream_id: int) -> None:
        """CMD_CFGI_CD_ALL (4.3.4)."""
        for key in [k for k in self._regimes if k[0] == stream_id]:
            del self._regimes[key]

    # Look-up

    def lookup(self, access: Access) -> Regime | None:
        """What translates `access`, `Bypass` when nothing does. Raises `Fault`."""
        ste = self._stes.get(access.stream_id)
        if ste is None:
            ste = self._fetch_ste(access)
            if len(self._stes) >= _CACHE_LIMIT:
                self._stes.clear()
            self._stes[access.stream_id] = ste
        if ste.config not in (SteConfig.BYPASS, SteConfig.S1_TRANSLATE):
            raise Fault(None)  # Config 0b0xx aborts without an event (5.2)
        substream_id = self._select_substream(ste, access)
        if substream_id is None:
            return Bypass
        key = access.stream_id, substream_id
        regime = self._regimes.get(key)
        if regime is None:
            regime = self._fetch_cd(ste, access, substream_id)
            if len(self._regimes) >= _CACHE_LIMIT:
                self._regimes.clear()
            self._regimes[key] = regime
        return regime

    def _load(self, address: int, access: Access, event: EventType) -> bytes:
        try:
            return self._memory.read(address, STE_SIZE)
        except BusError:
            raise configuration_fault(event, access, address) from None

    def _fetch_ste(self, access: Access) -> StreamTableEntry:
        address = self._ste_address(access)
        ste = StreamTableEntry.from_bytes(self._load(address, access, EventType.F_STE_FETCH))
        if self.fetched:
            self.fetched("STE", access, address, ste)
        if not ste.valid or self._ste_illegal(ste):
            raise configuration_fault(EventType.C_BAD_STE, access)
        return ste

    def _ste_address(self, access: Access) -> int:
        """Linear or 2-level stream table (3.3.1)."""
        stream_id = access.stream_id
        size = self.base_cfg.log2size
        if stream_id >> min(size, self._features.stream_id_bits):
            raise configuration_fault(EventType.C_BAD_STREAMID, access)
        # The base is aligned to LOG2SIZE as it was written, whatever SIDSIZE is (6.3.24).
        if self.base_cfg.fmt != StrtabFormat.TWO_LEVEL:
            return _aligned(self.base.addr, STE_SIZE << size) + stream_id * STE_SIZE
        # A reserved SPLIT behaves as 6 (6.3.25).
        split = self.base_cfg.split if self.base_cfg.split in (6, 8, 10) else 6
        level_1 = _aligned(self.base.addr, max(64, 8 << max(0, size - split)))
        address = level_1 + (stream_id >> split) * 8
        try:
            entry = StreamTableLevel1(self._memory.load_u64(address))
        except BusError:
            raise configuration_fault(EventType.F_STE_FETCH, access, address) from None
        # Span 0 is invalid; a span of more than the split covers is treated like it (5.1).
        index = stream_id & (1 << split) - 1
        if not 1 <= entry.span <= split + 1 or index >> (entry.span - 1):
            raise configuration_fault(EventType.C_BAD_STREAMID, access)
        return _aligned(entry.l2_ptr, STE_SIZE << (entry.span - 1)) + index * STE_SIZE

    def _ste_illegal(self, ste: StreamTableEntry) -> bool:
        """The conditions of 5.2.2 that these features leave."""
        if ste.config in (SteConfig.S2_TRANSLATE, SteConfig.NESTED):
            return True
        if ste.config != SteConfig.S1_TRANSLATE:
            return False
        # IDR0.HYP is 0: STRW is ignored. A reserved S1Fmt is no error either.
        return self._cd_max(ste) > self._features.substream_id_bits or ste.s1_stalld

    def _cd_max(self, ste: StreamTableEntry) -> int:
        """S1CDMax, which is ignored when there are no substreams at all (5.2)."""
        return ste.s1_cd_max if self._features.substream_id_bits else 0

    def _select_substream(self, ste: StreamTableEntry, access: Access) -> int | None:
        """Which CD to use (3.3.2, 5.2 S1DSS), None for a bypass of stage 1."""
        substream_id, cd_max = access.substream_id, self._cd_max(ste)
        if substream_id is not None and (
            ste.config == SteConfig.BYPASS or not cd_max or substream_id >> cd_max
        ):
            raise configuration_fault(EventType.C_BAD_SUBSTREAMID, access)
        if ste.config == SteConfig.BYPASS:
            return None
        if not cd_max:
            return 0
        if substream_id is None:
            if ste.s1_dss == S1Default.BYPASS:
                return None
            if ste.s1_dss != S1Default.SUBSTREAM_0:
                raise configuration_fault(EventType.F_STREAM_DISABLED, access)
            return 0
        if substream_id == 0 and ste.s1_dss == S1Default.SUBSTREAM_0:
            raise configuration_fault(EventType.F_STREAM_DISABLED, access)
        return substream_id

    def _fetch_cd(self, ste: StreamTableEntry, access: Access, substream_id: int) -> Regime:
        # Every table is aligned to its size, the lower bits of its pointer are ignored (5.2, S1Fmt).
        cd_max = self._cd_max(ste)
        split = CD_LEAF_SPLIT.get(ste.s1_format) if cd_max else None
        if split is None:
            address = _aligned(ste.s1_context_ptr, CD_SIZE << cd_max) + substream_id * CD_SIZE
        else:
            table = _aligned(ste.s1_context_ptr, max(64, 8 << max(0, cd_max - split)))
            address = table + (substream_id >> split) * 8
            try:
                entry = ContextTableLevel1(self._memory.load_u64(address))
            except BusError:
                raise configuration_fault(EventType.F_CD_FETCH, access, address) from None
            if not entry.valid:
                raise configuration_fault(EventType.C_BAD_SUBSTREAMID, access)
            leaf = _aligned(entry.l2_ptr, CD_SIZE << split)
            address = leaf + (substream_id & (1 << split) - 1) * CD_SIZE
        cd = ContextDescriptor.from_bytes(self._load(address, access, EventType.F_CD_FETCH))
        if self.fetched:
            self.fetched("CD", access, address, cd)
        regime = self._decode(cd)
        if regime is None:
            raise configuration_fault(EventType.C_BAD_CD, access)
        return regime

    def _decode(self, cd: ContextDescriptor) -> Regime | None:
        """The regime of `cd`, None when it is invalid or ILLEGAL (5.4.2)."""
        if (
            not cd.valid
            or not cd.aa64  # IDR0.TTF: no AArch32 tables
            or not cd.a  # IDR0.TERM_MODEL is 1
            or cd.s  # IDR0.STALL_MODEL is 1
            or cd.ha  # IDR0.HTTU is 0
            or cd.hd
            or (cd.endi and not (cd.epd0 and cd.epd1))  # IDR0.TTENDIAN: little-endian only
        ):
            return None
        # IPS above OAS, and the reserved value, behave as OAS (5.4).
        own = ADDRESS_SIZES[cd.ips] if cd.ips < len(ADDRESS_SIZES) else 64
        output_bits = min(own, self._features.output_address_bits)
        halves = []
        for epd, tsz, granule, ttb, tbi in (
            (cd.epd0, cd.t0sz, TG0_GRANULES.get(cd.tg0), cd.ttb0, cd.tbi0),
            (cd.epd1, cd.t1sz, TG1_GRANULES.get(cd.tg1), cd.ttb1, cd.tbi1),
        ):
            if epd:
                granule, tsz = 12, 16
            elif (
                granule not in self._features.granules or not 16 <= tsz <= 39 or ttb >> output_bits
            ):
                return None
            assert granule is not None
            levels = -(-(64 - tsz - granule) // (granule - 3))
            entries = 1 << (64 - tsz - granule - (levels - 1) * (granule - 3))
            vmid = 0  # IDR0.S2P is 0
            halves.append(
                TableBase(
                    # Aligned to the size of the first table, its lower bits are ignored (5.4).
                    address=_aligned(ttb, max(16, entries * 8)),
                    input_bits=64 - tsz,
                    granule=granule,
                    enabled=not epd,
                    top_byte_ignored=tbi,
                    tag=Tag(StreamWorld.NS_EL1, vmid, cd.asid, granule),
                    global_tag=Tag(StreamWorld.NS_EL1, vmid, GLOBAL, granule),
                )
            )
        return Regime(
            low=halves[0],
            high=halves[1],
            output_bits=output_bits,
            access_flag_faults=not cd.affd,
            write_implies_execute_never=cd.wxn,
            privileged_access_never=cd.pan,
            record_faults=cd.r,
        )
