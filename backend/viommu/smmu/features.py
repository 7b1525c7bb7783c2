"""What this SMMU implements, and hence what its ID registers say: a profile chooses of what the model can do."""

from dataclasses import dataclass

from viommu.layouts.registers import (
    ADDRESS_SIZES,
    REGISTER_FRAME_SIZE,
    VATOS_FRAME_SIZE,
    VATOS_PAGE,
    Idr0,
    Idr1,
    Idr2,
    Idr3,
    Idr5,
)

STALL_MODELS = {"both": 0, "terminate": 1, "stall": 2}
"""IDR0.STALL_MODEL by name: either, faults always terminate, faults always stall where they can."""


@dataclass(frozen=True)
class Features:
    """One profile. Widths are in bits, queue sizes in log2 of entries, granules in log2 of bytes.

    `httu` is 0, 1 (access flag) or 2 (and dirty state). `break_before_make_level` is what IDR3.BBML promises: blocks
    and pages live side by side in the TLB whatever it says. `endpoint_pasid` gives the functions a PASID
    capability, whose enable then rules their SubstreamIDs. `caching` is a behaviour and no ID bit: `none` forgets
    after every transaction, `normal` keeps what was used, `hostile` keeps and fetches ahead whatever the
    architecture allows.
    """

    stream_id_bits: int = 16
    substream_id_bits: int = 20
    command_queue_log2: int = 13
    event_queue_log2: int = 12
    output_address_bits: int = 48
    stage_1: bool = True
    stage_2: bool = True
    hyp: bool = True
    granules: tuple[int, ...] = (12, 14, 16)
    asid_bits: int = 16
    vmid_bits: int = 16
    msi: bool = True
    two_level_streams: bool = True
    two_level_contexts: bool = True
    httu: int = 2
    stall_model: str = "both"
    stall_max: int = 64
    hierarchical_disable: bool = True
    stage_2_execute: bool = True
    stage_2_write_back: bool = True
    range_invalidation: bool = True
    break_before_make_level: int = 2
    permission_overrides: bool = True
    attribute_overrides: bool = True
    ats: bool = True
    pri: bool = True
    atos: bool = True
    vatos: bool = False
    endpoint_pasid: bool = False
    caching: str = "normal"

    def __post_init__(self) -> None:
        rules = (
            (self.output_address_bits in ADDRESS_SIZES, f"output_address_bits is one of {ADDRESS_SIZES}"),
            (0 <= self.stream_id_bits <= 32, "stream_id_bits is 0 to 32"),
            (0 <= self.substream_id_bits <= 20, "substream_id_bits is 0 to 20"),
            (0 <= self.command_queue_log2 <= 19, "command_queue_log2 is 0 to 19"),
            (0 <= self.event_queue_log2 <= 19, "event_queue_log2 is 0 to 19"),
            (self.stage_1 or self.stage_2, "stage_1 or stage_2 must be there"),
            (bool(self.granules) and set(self.granules) <= {12, 14, 16}, "granules are of 12, 14, 16"),
            (self.asid_bits in (8, 16) and self.vmid_bits in (8, 16), "asid_bits and vmid_bits are 8 or 16"),
            (self.httu in (0, 1, 2), "httu is 0, 1 or 2"),
            (self.stall_model in STALL_MODELS, f"stall_model is one of {', '.join(STALL_MODELS)}"),
            (self.break_before_make_level in (0, 1, 2), "break_before_make_level is 0, 1 or 2"),
            (1 <= self.stall_max <= 0xFFFF, "stall_max is 1 to 65535"),
            (self.ats or not self.pri, "pri needs ats"),
            (not self.vatos or (self.atos and self.stage_1 and self.stage_2), "vatos needs atos, stage_1 and stage_2"),
            (self.substream_id_bits or not self.endpoint_pasid, "endpoint_pasid needs substream_id_bits"),
            (self.caching in ("none", "normal", "hostile"), "caching is none, normal or hostile"),
            (self.output_address_bits < 52 or 16 in self.granules, "52 address bits need the 64 KiB granule (16)"),
        )  # fmt: skip
        for holds, rule in rules:
            if not holds:
                raise ValueError(rule)

    @property
    def stalls(self) -> bool:
        """A faulting transaction can stall."""
        return self.stall_model != "terminate"

    @property
    def el2(self) -> bool:
        """Stage 1 can belong to EL2. An SMMU without both stages has no hypervisor's regime (6.3.1, Hyp)."""
        return self.hyp and self.stage_1 and self.stage_2

    @property
    def frame_size(self) -> int:
        """Bytes of register pages: what a driver has to map, and the size of the BAR (6.1)."""
        return VATOS_FRAME_SIZE if self.vatos else REGISTER_FRAME_SIZE

    @property
    def minor_revision(self) -> int:
        """SMMU_AIDR.ArchMinorRev: the latest of SMMUv3.0 to 3.2 whose mandatory features are all there."""
        if self.stage_1 > self.hierarchical_disable or self.stage_2 > self.stage_2_execute:
            return 0
        if self.stage_2 > self.stage_2_write_back or not self.break_before_make_level:
            return 1
        if self.stage_1 and self.stage_2 and not self.hyp:
            return 1
        return 2 if self.range_invalidation else 1

    def idr0(self) -> Idr0:
        """AArch64 tables, little-endian, coherent; a terminated transaction is an abort."""
        return Idr0(
            s1p=self.stage_1,
            s2p=self.stage_2,
            ttf=2,
            cohacc=True,
            httu=self.httu,
            hyp=self.el2,
            ats=self.ats,
            pri=self.pri,
            atos=self.atos,
            vatos=self.vatos,
            asid16=self.asid_bits == 16,
            vmid16=self.vmid_bits == 16 and self.stage_2,
            msi=self.msi,
            cd2l=self.two_level_contexts,
            ttendian=2,
            atsrecerr=self.ats,
            stall_model=STALL_MODELS[self.stall_model],
            term_model=True,
            st_level=int(self.two_level_streams),
        )

    def idr1(self) -> Idr1:
        """The sizes, and which attributes an STE can override."""
        return Idr1(
            sidsize=self.stream_id_bits,
            ssidsize=self.substream_id_bits,
            eventqs=self.event_queue_log2,
            priqs=self.event_queue_log2 if self.pri else 0,
            cmdqs=self.command_queue_log2,
            attr_perms_ovr=self.permission_overrides,
            attr_types_ovr=self.attribute_overrides,
        )

    def idr2(self) -> Idr2:
        """Where the VATOS page is: the last of a frame whose size is a power of two, so that who reads no IDR2 errs."""
        beyond = VATOS_PAGE - REGISTER_FRAME_SIZE
        return Idr2(ba_vatos=beyond >> 16 if self.vatos else 0)

    def idr3(self) -> Idr3:
        """The extensions."""
        return Idr3(
            had=self.hierarchical_disable and self.stage_1,
            xnx=self.stage_2_execute and self.stage_2,
            fwb=self.stage_2_write_back and self.stage_2,
            ril=self.range_invalidation,
            bbml=self.break_before_make_level,
        )

    def idr5(self) -> Idr5:
        """Granules, address sizes, and how many transactions can be stalled."""
        return Idr5(
            oas=ADDRESS_SIZES.index(self.output_address_bits),
            gran4k=12 in self.granules,
            gran16k=14 in self.granules,
            gran64k=16 in self.granules,
            vax=int(self.output_address_bits == 52),
            stall_max=self.stall_max if self.stalls else 0,
        )
