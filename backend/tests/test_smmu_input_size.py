"""The input of a stage 2 that stands alone: an IPA has no more bits than the IAS, cached or not (IHI 0070, 3.4)."""

import pytest

from tests.smmu_rig import AF, BLOCK, STE_S2, STREAM, STRTAB, Rig
from viommu.smmu import Access, Features, TransactionAborted

S2AP = 3 << 6
F_TRANSLATION, F_ADDR_SIZE = 0x10, 0x11


def make(oas: int) -> Rig:
    rig = Rig(Features(output_address_bits=oas))
    table = rig.alloc(4096)
    rig.put(table + 8 * 2, 0x8000_0000 | S2AP | AF | BLOCK)
    # 32 bits in, from level 1 on; 44 bits out, AArch64, faults recorded.
    fields = 32 << 32 | 1 << 38 | 4 << 48 | 1 << 51 | 1 << 58
    rig.put(STRTAB + 64 * STREAM, STE_S2, 0, fields, table)
    rig.submit((3 | STREAM << 32, 0))
    return rig


@pytest.mark.parametrize(
    ("oas", "above", "event", "stage_2"),
    [
        (32, 1 << 32, F_ADDR_SIZE, 0),
        (36, 1 << 35, F_TRANSLATION, 1),
        (36, 1 << 36, F_ADDR_SIZE, 0),
        (44, 1 << 43, F_TRANSLATION, 1),
        (44, 1 << 44, F_ADDR_SIZE, 0),
        (44, 0xAB << 56, F_ADDR_SIZE, 0),
    ],
)
def test_what_is_out_of_range_is_refused_with_a_full_tlb(
    oas: int, above: int, event: int, stage_2: int
) -> None:
    rig = make(oas)
    inside = 0x8000_1000
    assert rig.smmu.translate(Access(STREAM), inside, 4).runs[0] == inside
    with pytest.raises(TransactionAborted) as aborted:
        rig.smmu.translate(Access(STREAM), inside | above, 4)
    record = aborted.value.record
    assert record is not None
    assert record.value & 0xFF == event
    assert record.value >> 103 & 1 == stage_2
    assert record.value >> 128 & (1 << 64) - 1 == inside | above
