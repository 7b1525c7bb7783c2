"""What both sides can do, by their ID registers: cases are made for no more than that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from viommu.smmu import Features

OUTPUT_SIZES = (32, 36, 40, 42, 44, 48, 52)
"""Address bits by the encoding of IDR5.OAS, CD.IPS and STE.S2PS."""


@dataclass(frozen=True)
class Abilities:
    """Bits of SMMU_IDR0, IDR3 and IDR5 (IHI 0070, 6.3). `granules` are log2 of bytes."""

    stage_1: bool
    stage_2: bool
    granules: tuple[int, ...]
    output_bits: int
    hierarchy_disable: bool  # HAD
    execute_never_2: bool  # XNX
    ranges: bool  # RIL

    @classmethod
    def of(cls, idrs: Sequence[int]) -> Self:
        """By the values of IDR0, IDR1, IDR3 and IDR5."""
        idr0, _, idr3, idr5 = idrs
        granules = zip((12, 14, 16), (4, 5, 6), strict=True)
        return cls(
            stage_1=bool(idr0 & 1 << 1),
            stage_2=bool(idr0 & 1 << 0),
            granules=tuple(granule for granule, bit in granules if idr5 & 1 << bit),
            output_bits=OUTPUT_SIZES[idr5 & 7],
            hierarchy_disable=bool(idr3 & 1 << 2),
            execute_never_2=bool(idr3 & 1 << 4),
            ranges=bool(idr3 & 1 << 10),
        )

    def common(self, other: "Abilities") -> "Abilities":
        """What both have."""
        return Abilities(
            stage_1=self.stage_1 and other.stage_1,
            stage_2=self.stage_2 and other.stage_2,
            granules=tuple(g for g in self.granules if g in other.granules),
            output_bits=min(self.output_bits, other.output_bits),
            hierarchy_disable=self.hierarchy_disable and other.hierarchy_disable,
            execute_never_2=self.execute_never_2 and other.execute_never_2,
            ranges=self.ranges and other.ranges,
        )


_STALL_MODELS = ("both", "terminate", "stall")


def like_qemu(idrs: Sequence[int], caching: str = "normal") -> Features:
    """The features of our model that QEMU's ID registers say. `caching` is ours to choose."""
    idr0, idr1, idr3 = idrs[:3]
    abilities = Abilities.of(idrs)
    return Features(
        stream_id_bits=idr1 & 0x3F,
        substream_id_bits=idr1 >> 6 & 0x1F,
        output_address_bits=abilities.output_bits,
        stage_1=abilities.stage_1,
        stage_2=abilities.stage_2,
        hyp=bool(idr0 & 1 << 9),
        granules=abilities.granules,
        asid_bits=16 if idr0 & 1 << 12 else 8,
        vmid_bits=16 if idr0 & 1 << 18 else 8,
        msi=bool(idr0 & 1 << 13),
        two_level_streams=bool(idr0 >> 27 & 3),
        two_level_contexts=bool(idr0 & 1 << 19),
        httu=idr0 >> 6 & 3,
        stall_model=_STALL_MODELS[idr0 >> 24 & 3],
        hierarchical_disable=abilities.hierarchy_disable,
        stage_2_execute=abilities.execute_never_2,
        range_invalidation=abilities.ranges,
        stage_2_write_back=bool(idr3 & 1 << 8),
        break_before_make_level=idr3 >> 11 & 3,
        ats=bool(idr0 & 1 << 10),
        pri=bool(idr0 & 1 << 16),
        atos=bool(idr0 & 1 << 15),
        permission_overrides=bool(idr1 & 1 << 26),
        attribute_overrides=bool(idr1 & 1 << 27),
        caching=caching,
    )
