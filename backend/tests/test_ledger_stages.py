"""The ledger over domains of stage 2, over nested ones, and over global entries, in raw 64-bit words."""

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import STREAM
from tests.stages_rig import S2_PLAIN, Stages, Table
from viommu.endpoints.port import DmaPort
from viommu.ledger import Ledger, Witness

IOVA, IPA, OUT = 0x12_3400_0000, 0x34_5000, hw.BASE + 0x80_0000
LEAF, S2_LEAF = hw.PLAIN | hw.PAGE, S2_PLAIN | hw.PAGE
SYNC = (0x46, 0)
VMID = 9
TLBI_S2_IPA, TLBI_VMALL = (0x2A | VMID << 32, IPA), (0x28 | VMID << 32, 0)
TLBI_VA = (0x12 | VMID << 32 | hw.ASID << 48, IOVA)
CFGI_STE = (0x03 | STREAM << 32, 1)


class Rig(Stages):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.ledger.follow(self.smmu.tracer)
        self.witness = Witness(self.smmu)

    def found(self) -> list[tuple[str, str | None]]:
        self.witness.close()
        findings = self.ledger.verdict().findings
        return [(each.rule, each.command) for each in findings if each.severity]


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.mark.parametrize("invalidated", [True, False])
def test_a_page_of_stage_2(rig: Rig, invalidated: bool) -> None:
    table = Table(rig, 12, 40)
    place = table.map(IPA, OUT | S2_LEAF)
    rig.stage_2_only(table, vmid=VMID)
    rig.go(IPA)
    rig.put(place, 0)
    rig.submit(*[TLBI_S2_IPA] * invalidated, SYNC)
    missing = [] if invalidated else [("missing-invalidation", "CMD_TLBI_S2_IPA")]
    assert rig.found() == missing
    assert rig.ledger.verdict().stays[-1].domain == f"VMID {VMID}"


@pytest.mark.parametrize(
    ("stage", "issued", "missing"),
    [
        (1, [TLBI_VA], set()),
        (1, [], {"CMD_TLBI_NH_VA"}),
        (2, [TLBI_VMALL], set()),
        # What has been combined of both stages is not reached by the IPA.
        (2, [TLBI_S2_IPA], {"CMD_TLBI_NH_VA"}),
        (2, [], {"CMD_TLBI_NH_VA", "CMD_TLBI_S2_IPA"}),
    ],
)
def test_a_page_of_one_of_two_stages(
    rig: Rig, stage: int, issued: list[tuple[int, int]], missing: set[str]
) -> None:
    first, second = Table(rig, 12, 39, offset=rig.OFFSET), Table(rig, 12, 40)
    places = [first.map(IOVA, IPA | LEAF), second.map(IPA, OUT | S2_LEAF)]
    rig.nested(first, second, vmid=VMID)
    rig.go(IOVA)
    rig.put(places[stage - 1], 0)
    rig.submit(*issued, SYNC)
    found = rig.found()
    assert {command for _, command in found} == missing
    assert {rule for rule, _ in found} <= {"missing-invalidation"}
    assert rig.ledger.verdict().stays[-1].domain == f"ASID {hw.ASID} of VMID {VMID}"


def test_a_global_entry_is_not_reached_by_its_asid(rig: Rig) -> None:
    place = rig.map(IOVA, OUT | (LEAF & ~hw.NG))
    rig.submit(CFGI_STE, SYNC)
    rig.go(IOVA)
    rig.put(place, 0)
    rig.submit((0x11 | hw.ASID << 48, 0), SYNC)
    assert rig.found() == [("missing-invalidation", "CMD_TLBI_NH_VAA")]


def test_from_stage_2_to_nothing(rig: Rig) -> None:
    table = Table(rig, 12, 40)
    table.map(IPA, OUT | S2_LEAF)
    rig.stage_2_only(table, vmid=VMID)
    rig.go(IPA)
    rig.put(hw.STRTAB + 64 * STREAM, hw.STE_ABORT)
    rig.submit(SYNC)
    assert rig.found() == [("missing-invalidation", "CMD_CFGI_STE")]


def test_a_page_that_is_mapped_by_another_vmid(rig: Rig) -> None:
    table, other = Table(rig, 12, 40), Table(rig, 12, 40)
    place = table.map(IPA, OUT | S2_LEAF)
    rig.stage_2_only(table, vmid=VMID)
    words = rig.stage_2_words(other, vmid=VMID + 1)
    rig.put(hw.STRTAB + 64 * (STREAM + 1), hw.STE_S2, 0, *words)
    rig.submit(CFGI_STE, (0x03 | STREAM + 1 << 32, 1), SYNC)
    rig.go(IPA)
    rig.put(place, 0)
    other.map(0, OUT | S2_LEAF)
    port = DmaPort(rig.memory, STREAM, rig.smmu, rig.smmu.tracer)
    port.bus_master = True
    with port.begin(IPA, 64, write=True) as transfer:
        transfer.write_from(bytes(64))
    rig.submit(TLBI_S2_IPA, SYNC)
    assert rig.found() == [("page-reuse", "CMD_TLBI_S2_IPA")]
    text = rig.ledger.verdict().violations[0].text
    assert text.endswith(
        f"{OUT:#x} is 0x0 of VMID {VMID + 1}; used by 1 transaction, 64 bytes moved"
    )


def test_switching_the_smmu_off_closes_the_account(rig: Rig) -> None:
    place = rig.map(IOVA, OUT | LEAF)
    rig.submit(CFGI_STE, SYNC)
    rig.go(IOVA)
    rig.put(place, 0)
    rig.write(hw.CR0, 0)
    assert [f.command for f in rig.ledger.verdict().violations] == ["CMD_TLBI_NH_VA"]
    rig.submit((0x30, 0), SYNC)
    assert rig.found() == [("missing-invalidation", "CMD_TLBI_NH_VA")]


def test_a_reset_closes_it_too(rig: Rig) -> None:
    place = rig.map(IOVA, OUT | LEAF)
    rig.submit(CFGI_STE, SYNC)
    rig.go(IOVA)
    rig.put(place, 0)
    rig.submit(SYNC)
    rig.smmu.reset()
    rig.program()
    rig.write(hw.CR0, 0xD)
    assert rig.found() == [("missing-invalidation", "CMD_TLBI_NH_VA")]
