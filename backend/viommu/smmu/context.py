"""What an STE and a CD say, decoded once: the two stages of translation, and the conditions that make them ILLEGAL.

IHI 0070, 5.2.2 and 5.4.2.
"""

from dataclasses import dataclass

from viommu.layouts.records import EventType
from viommu.layouts.registers import ADDRESS_SIZES
from viommu.layouts.tables import (
    S2_GRANULES,
    TG0_GRANULES,
    TG1_GRANULES,
    ContextDescriptor,
    Eats,
    S1Format,
    SteConfig,
    StreamTableEntry,
    StreamWorld,
)
from viommu.smmu.faults import Fault
from viommu.smmu.features import Features
from viommu.smmu.tlb import GLOBAL, GLOBAL_SET_1, STAGE_2, Tag, World

_DEVICE = 0b11 << 4
_DEVICE_FWB = 1 << 4
# The bits of a stage 2 descriptor that are 0 in Device memory: MemAttr[3:2], or with STE.S2FWB MemAttr[2] (DDI 0487).


@dataclass(frozen=True, slots=True)
class TableBase:
    """One of the two halves of the address space: TTB0 or TTB1 of a context descriptor (5.4).

    `input_bits` is 64 - TxSZ, `granule` log2 of bytes.
    """

    address: int
    input_bits: int
    granule: int
    enabled: bool
    upper: bool
    top_byte_ignored: bool
    hierarchical: bool


@dataclass(frozen=True, slots=True)
class Stage1:
    """A context descriptor, decoded. `single_privilege` is the EL2 regime without E2H.

    `global_asid` is where the TLB keeps global entries of its ASID set.
    """

    low: TableBase
    high: TableBase
    output_bits: int
    access_flag_faults: bool
    updates_access_flag: bool
    updates_dirty: bool
    write_implies_execute_never: bool
    privileged_access_never: bool
    single_privilege: bool
    records: bool
    stalls: bool
    world: World
    asid: int
    global_asid: int


@dataclass(frozen=True, slots=True)
class Stage2:
    """The stage 2 part of an STE, decoded. `start_level` is the level of the first table, or tables side by side.

    `device_mask` are the bits of a descriptor that are 0 in Device memory.
    """

    address: int
    input_bits: int
    granule: int
    start_level: int
    output_bits: int
    access_flag_faults: bool
    updates_access_flag: bool
    updates_dirty: bool
    protected_walk: bool
    device_mask: int
    records: bool
    stalls: bool
    tag: Tag


@dataclass(frozen=True, slots=True)
class StreamContext:
    """What governs a transaction: one stage, both, or none. `tags` are where the TLB may have its translation."""

    stage_1: Stage1 | None
    stage_2: Stage2 | None
    tags: tuple[Tag, ...]
    merges: bool
    """STE.MEV."""

    @property
    def tag(self) -> Tag:
        """Where a translation that is not global is kept."""
        return self.tags[0]

    @property
    def global_tag(self) -> Tag:
        """Where a global one is."""
        return self.tags[-1]


def address_bits(encoding: int, features: Features) -> int:
    """The size that IPS or S2PS stands for; more than the OAS, and the reserved value, behave as the OAS (5.4)."""
    own = ADDRESS_SIZES[encoding] if encoding < len(ADDRESS_SIZES) else 64
    return min(own, features.output_address_bits)


def translates_stage_1(ste: StreamTableEntry) -> bool:
    """Config[0] (5.2)."""
    return ste.config in (SteConfig.S1_TRANSLATE, SteConfig.NESTED)


def translates_stage_2(ste: StreamTableEntry) -> bool:
    """Config[1] (5.2)."""
    return ste.config in (SteConfig.S2_TRANSLATE, SteConfig.NESTED)


def vmid_of(ste: StreamTableEntry, features: Features) -> int | None:
    """S2VMID, which tags what is translated for EL1, by stage 1 alone too; None where nothing is (5.2, S2VMID)."""
    if not features.stage_2 or not (translates_stage_1(ste) or translates_stage_2(ste)):
        return None
    if ste.config == SteConfig.S1_TRANSLATE and features.el2 and ste.strw != StreamWorld.NS_EL1:
        return None
    return ste.s2_vmid


def cd_max(ste: StreamTableEntry, features: Features) -> int:
    """S1CDMax, which is ignored when there are no substreams at all (5.2)."""
    return ste.s1_cd_max if features.substream_id_bits else 0


def ste_illegal(ste: StreamTableEntry, features: Features) -> bool:
    """The conditions of 5.2.2 on an STE that is valid and whose Config[2] is 1."""
    if translates_stage_1(ste):
        if not features.stage_1 or cd_max(ste, features) > features.substream_id_bits:
            return True
        two_level = ste.s1_format in (S1Format.TWO_LEVEL_4K, S1Format.TWO_LEVEL_64K)
        if two_level and cd_max(ste, features) and not features.two_level_contexts:
            return True
        if ste.s1_stalld and features.stall_model != "both":
            return True
        if ste.s1_context_ptr >> features.output_address_bits:  # 3.4.3, as of SMMUv3.1
            return True
    if features.ats and _ats_illegal(ste):
        return True
    # STRW counts only for stage 1 alone, and where there is an EL2 (5.2, STRW).
    world_counts = ste.config == SteConfig.S1_TRANSLATE and features.el2
    if world_counts and ste.strw not in list(StreamWorld):
        return True
    if (vmid_of(ste, features) or 0) >> features.vmid_bits:
        return True
    if translates_stage_2(ste):
        return not features.stage_2 or decode_stage_2(ste, features) is None
    return False


def _ats_illegal(ste: StreamTableEntry) -> bool:
    """EATS, which is ignored where nothing translates: no ATS with a stage 2 that stalls, split only what is nested."""
    if not (translates_stage_1(ste) or translates_stage_2(ste)):
        return False
    if ste.eats == Eats.SPLIT_STAGE:
        return ste.config != SteConfig.NESTED or ste.s2_s
    return ste.eats == Eats.FULL and translates_stage_2(ste) and ste.s2_s


def decode_stage_2(ste: StreamTableEntry, features: Features) -> Stage2 | None:
    """The stage 2 fields of `ste`; None when they are ILLEGAL (5.2.2)."""
    granule = S2_GRANULES.get(ste.s2_tg)
    output_bits = address_bits(ste.s2_ps, features)
    if (
        granule is None
        or granule not in features.granules
        or not ste.s2_aa64  # IDR0.TTF: no AArch32 tables
        or ste.s2_endi  # IDR0.TTENDIAN: little-endian only
        or (ste.s2_ha and features.httu < 1)
        or (ste.s2_hd and features.httu < 2)
        or (ste.s2_s and features.stall_model == "terminate")
        or (not ste.s2_s and features.stall_model == "stall")
        or not _table_fits(ste.s2_ttb, granule, output_bits)
    ):
        return None
    input_bits = 64 - ste.s2_t0sz
    least = 12 if granule == 16 and features.output_address_bits == 52 else 16
    start_level = _start_level(granule, ste.s2_sl0, features.output_address_bits)
    # The input is an IPA: it has no more bits than the OAS (3.4.1).
    if not least <= ste.s2_t0sz <= 39 or start_level is None:
        return None
    if input_bits > features.output_address_bits:
        return None
    # The first table: bits that one table of this level covers, and up to 16 of them side by side.
    stride = granule - 3
    below = granule + stride * (3 - start_level)
    entries = 1 << max(input_bits - below, 0)
    if input_bits <= below or entries > 16 << stride:
        return None
    return Stage2(
        address=ste.s2_ttb & -_alignment(entries, output_bits),
        input_bits=input_bits,
        granule=granule,
        start_level=start_level,
        output_bits=output_bits,
        access_flag_faults=not ste.s2_affd,
        updates_access_flag=ste.s2_ha,
        updates_dirty=ste.s2_ha and ste.s2_hd,
        protected_walk=ste.s2_ptw,
        device_mask=_DEVICE_FWB if ste.s2fwb and features.stage_2_write_back else _DEVICE,
        records=ste.s2_r,
        stalls=ste.s2_s,
        tag=Tag(World.EL1, ste.s2_vmid, STAGE_2),
    )


def _table_fits(address: int, granule: int, output_bits: int) -> bool:
    """TTB0, TTB1 and S2TTB: only tables of 64 KiB granules lie above 48 bits (5.4, TTB0)."""
    return not address >> (output_bits if granule == 16 else min(output_bits, 48))


def _alignment(entries: int, output_bits: int) -> int:
    """A first table is aligned to its size, the lower bits of its address are ignored (5.4, TTB0)."""
    return max(entries * 8, 64 if output_bits == 52 else 16)


def _start_level(granule: int, sl0: int, output_address_bits: int) -> int | None:
    """S2SL0 (5.2): 4 KiB tables count from level 2 up, the others from level 3 up.

    The highest is for as many address bits as need it (DDI 0487, AArch64.S2InvalidSL).
    """
    if sl0 == 3 or (sl0 == 2 and output_address_bits < {12: 44, 14: 42, 16: 44}[granule]):
        return None
    return (2 if granule == 12 else 3) - sl0


def decode_stage_1(
    cd: ContextDescriptor, ste: StreamTableEntry, features: Features, *, e2h: bool
) -> Stage1 | None:
    """The regime of `cd`, None when it is invalid or ILLEGAL (5.4.2). `e2h` is CR2.E2H."""
    if (
        not cd.valid
        or not cd.aa64  # IDR0.TTF: no AArch32 tables
        or not cd.a  # IDR0.TERM_MODEL is 1
        or (cd.s and (features.stall_model == "terminate" or ste.s1_stalld))
        or (not cd.s and features.stall_model == "stall")
        or (cd.ha and features.httu < 1)
        or (cd.hd and features.httu < 2)
    ):
        return None
    world = World.EL1
    if ste.config == SteConfig.S1_TRANSLATE and features.el2 and ste.strw == StreamWorld.EL2:
        world = World.EL2_E2H if e2h else World.EL2
    # EL2 has no ASIDs and no second half, and its first half cannot be disabled (5.4.1).
    single = world is World.EL2
    output_bits = address_bits(cd.ips, features)
    epd0, epd1 = cd.epd0 and not single, cd.epd1 and not single
    if cd.endi and not (epd0 and epd1):  # IDR0.TTENDIAN: little-endian only
        return None
    if features.asid_bits == 8 and cd.asid >> 8 and not single:
        return None
    halves = []
    for upper, epd, tsz, granule, ttb, tbi, had in (
        (False, epd0, cd.t0sz, TG0_GRANULES.get(cd.tg0), cd.ttb0, cd.tbi0, cd.had0),
        (True, epd1 or single, cd.t1sz, TG1_GRANULES.get(cd.tg1), cd.ttb1, cd.tbi1, cd.had1),
    ):
        if epd:
            granule, tsz = 12, 16
        else:
            least = 12 if granule == 16 and features.output_address_bits == 52 else 16
            if granule not in features.granules or not least <= tsz <= 39:
                return None
            assert granule is not None
            if not _table_fits(ttb, granule, output_bits):
                return None
        levels = -(-(64 - tsz - granule) // (granule - 3))
        entries = 1 << (64 - tsz - granule - (levels - 1) * (granule - 3))
        halves.append(
            TableBase(
                address=ttb & -_alignment(entries, output_bits),
                input_bits=64 - tsz,
                granule=granule,
                enabled=not epd,
                upper=upper,
                top_byte_ignored=tbi,
                hierarchical=not (had and features.hierarchical_disable),
            )
        )
    return Stage1(
        low=halves[0],
        high=halves[1],
        output_bits=output_bits,
        access_flag_faults=not cd.affd,
        updates_access_flag=cd.ha,
        updates_dirty=cd.ha and cd.hd,
        write_implies_execute_never=cd.wxn,
        privileged_access_never=cd.pan and not single,
        single_privilege=single,
        records=cd.r,
        stalls=cd.s,
        world=world,
        asid=0 if single else cd.asid,
        global_asid=GLOBAL_SET_1 if cd.aset else GLOBAL,
    )


def stream_context(
    ste: StreamTableEntry, stage_1: Stage1 | None, features: Features
) -> StreamContext | None:
    """The context of a transaction that uses `stage_1`, and stage 2 if `ste` has it; None when nothing translates."""
    stage_2 = decode_stage_2(ste, features) if translates_stage_2(ste) else None
    tags: tuple[Tag, ...]
    if stage_1 is not None:
        vmid = vmid_of(ste, features) or 0
        tags = tuple(Tag(stage_1.world, vmid, asid) for asid in (stage_1.asid, stage_1.global_asid))
    elif stage_2 is not None:
        tags = (stage_2.tag,)
    else:
        return None
    return StreamContext(stage_1, stage_2, tags, ste.mev)


def as_configured(fault: Fault, stage: Stage1 | Stage2 | None) -> Fault:
    """What CD.R and S, or S2R and S2S, make of a fault (5.4, 5.2): they rule four events and no other."""
    record = fault.record
    if record is None or not EventType.F_TRANSLATION <= record.event <= EventType.F_PERMISSION:
        return fault
    if stage is None:
        return fault  # stage 1 was bypassed by an address that is too large (3.12)
    if stage.stalls:
        return Fault(record, stall=True)
    if stage.records:
        return fault
    silent = Fault(None)
    silent.hidden = record
    return silent
