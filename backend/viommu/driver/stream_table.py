"""Stream tables and what an STE says (IHI 0070, 3.3.1 and 5.1, 5.2)."""

from viommu.driver.access import Buffer, Memory
from viommu.driver.context import ContextTable
from viommu.driver.entries import field_mask
from viommu.driver.errors import StreamError
from viommu.layouts.registers import StrtabBase, StrtabBaseCfg, StrtabFormat
from viommu.layouts.tables import (
    Eats,
    S1Default,
    SteConfig,
    StreamTableEntry,
    StreamTableLevel1,
)

STE_WORDS = StreamTableEntry.size // 8
SPLITS = (6, 8, 10)
"""The values of STRTAB_BASE_CFG.SPLIT: log2 of the STEs in a second-level table (6.3.25)."""

_WRITE_BACK = 1
"""The cacheability of table walks: Normal, write-back, read- and write-allocate (5.2, S1CIR)."""
_INNER_SHAREABLE = 3
_USE_INCOMING = 1
"""SHCFG: the shareability that the transaction came with (5.2)."""

_ALWAYS = field_mask(StreamTableEntry, "valid", "config")
_OVERRIDES = field_mask(StreamTableEntry, "privcfg", "instcfg", "nscfg")
_BYPASS = field_mask(StreamTableEntry, "mem_attr", "mtcfg", "alloccfg", "shcfg", "mev")
_STAGE_1 = field_mask(
    StreamTableEntry,
    *("s1_format", "s1_context_ptr", "s1_cd_max", "s1_dss", "s1_cir", "s1_cor", "s1_csh"),
    *("dre", "cont", "dcp", "ppar", "mev", "s1_mpam", "s1_stalld", "eats", "strw", "s2_vmid"),
)


def used_bits(value: int) -> int:
    """The bits that the SMMU looks at in an STE that is `value` (5.2); stage 2 is not written here."""
    entry = StreamTableEntry(value)
    if not entry.valid:
        return field_mask(StreamTableEntry, "valid")
    if entry.config == SteConfig.ABORT:
        return _ALWAYS
    if entry.config == SteConfig.BYPASS:
        return _ALWAYS | _OVERRIDES | _BYPASS
    used = _ALWAYS | _OVERRIDES | _STAGE_1
    return used | _BYPASS if entry.s1_dss == S1Default.BYPASS else used


def invalid_entry() -> StreamTableEntry:
    """V = 0: every transaction is aborted and recorded as C_BAD_STE."""
    return StreamTableEntry()


def abort_entry() -> StreamTableEntry:
    """Every transaction is aborted, and nothing is recorded."""
    return StreamTableEntry(valid=True, config=SteConfig.ABORT)


def bypass_entry() -> StreamTableEntry:
    """Every transaction passes as it is: its address is physical."""
    return StreamTableEntry(valid=True, config=SteConfig.BYPASS, shcfg=_USE_INCOMING)


def stage1_entry(
    contexts: ContextTable,
    *,
    default: S1Default = S1Default.SUBSTREAM_0,
    stall_disable: bool,
    ats: bool = False,
) -> StreamTableEntry:
    """Stage 1 by the CDs in `contexts`.

    `default` rules transactions without a SubstreamID where there are substreams. `stall_disable` (S1STALLD) must be
    False where the SMMU has no choice about stalling (IDR0.STALL_MODEL is not 0). `ats` answers Translation Requests
    and lets Translated transactions pass (EATS).
    """
    has_substreams = contexts.substream_bits > 0
    return StreamTableEntry(
        valid=True,
        config=SteConfig.S1_TRANSLATE,
        s1_format=contexts.layout if has_substreams else 0,
        s1_context_ptr=contexts.base,
        s1_cd_max=contexts.substream_bits,
        s1_dss=default if has_substreams else 0,
        s1_cir=_WRITE_BACK,
        s1_cor=_WRITE_BACK,
        s1_csh=_INNER_SHAREABLE,
        s1_stalld=stall_disable,
        eats=Eats.FULL if ats else Eats.DISABLED,
    )


def _fill(buffer: Buffer, entry: StreamTableEntry) -> None:
    buffer.view[:] = entry.to_bytes() * (len(buffer) // StreamTableEntry.size)


class LinearStreamTable:
    """A table of 2^`log2size` STEs, each `initial` (abort) until it is written (3.3.1.1)."""

    def __init__(
        self, memory: Memory, log2size: int, initial: StreamTableEntry | None = None
    ) -> None:
        self.log2size = log2size
        size = StreamTableEntry.size << log2size
        self._memory = memory
        self._buffer = memory.allocate(size, size)
        _fill(self._buffer, initial or abort_entry())

    @property
    def base(self) -> StrtabBase:
        """SMMU_STRTAB_BASE."""
        return StrtabBase(addr=self._buffer.address, ra=True)

    @property
    def configuration(self) -> StrtabBaseCfg:
        """SMMU_STRTAB_BASE_CFG."""
        return StrtabBaseCfg(fmt=StrtabFormat.LINEAR, log2size=self.log2size)

    def has(self, stream_id: int) -> bool:
        """Whether memory holds an STE for this stream."""
        return 0 <= stream_id < 1 << self.log2size

    def entry(self, stream_id: int) -> memoryview:
        """The eight words of a stream's STE, made if need be; `StreamError` when the table is too small for it."""
        if not self.has(stream_id):
            raise StreamError(f"stream {stream_id:#x} is outside a table of 2^{self.log2size}")
        return self._buffer.words[STE_WORDS * stream_id : STE_WORDS * (stream_id + 1)]

    def close(self) -> None:
        """Give the memory back. Only once SMMUEN is 0."""
        self._memory.free(self._buffer)


class TwoLevelStreamTable:
    """A table of 2^`log2size` streams whose STEs come in tables of 2^`split`, made as they are needed (3.3.1.2).

    Streams whose second-level table was never made are C_BAD_STREAMID.
    """

    def __init__(
        self,
        memory: Memory,
        log2size: int,
        split: int = 8,
        initial: StreamTableEntry | None = None,
    ) -> None:
        if split not in SPLITS:
            raise StreamError(f"SPLIT {split} is none of {SPLITS}")
        self.log2size, self.split = log2size, split
        self._memory, self._initial = memory, initial or abort_entry()
        size = max(StreamTableLevel1.size << max(log2size - split, 0), 64)
        self._level1 = memory.allocate(size, size)
        self._level2: dict[int, Buffer] = {}

    @property
    def base(self) -> StrtabBase:
        """SMMU_STRTAB_BASE."""
        return StrtabBase(addr=self._level1.address, ra=True)

    @property
    def configuration(self) -> StrtabBaseCfg:
        """SMMU_STRTAB_BASE_CFG."""
        return StrtabBaseCfg(fmt=StrtabFormat.TWO_LEVEL, split=self.split, log2size=self.log2size)

    def has(self, stream_id: int) -> bool:
        """Whether memory holds an STE for this stream."""
        return stream_id >> self.split in self._level2

    def entry(self, stream_id: int) -> memoryview:
        """The eight words of a stream's STE, made if need be; `StreamError` when the table is too small for it."""
        if not 0 <= stream_id < 1 << self.log2size:
            raise StreamError(f"stream {stream_id:#x} is outside a table of 2^{self.log2size}")
        first, second = stream_id >> self.split, stream_id & (1 << self.split) - 1
        table = self._level2.get(first)
        if table is None:
            size = StreamTableEntry.size << self.split
            table = self._level2[first] = self._memory.allocate(size, size)
            _fill(table, self._initial)
            # Only now can the SMMU see it.
            link = StreamTableLevel1(span=self.split + 1, l2_ptr=table.address)
            self._level1.words[first] = link.value
        return table.words[STE_WORDS * second : STE_WORDS * (second + 1)]

    def close(self) -> None:
        """Give the memory back. Only once SMMUEN is 0."""
        for table in (self._level1, *self._level2.values()):
            self._memory.free(table)


StreamTable = LinearStreamTable | TwoLevelStreamTable
