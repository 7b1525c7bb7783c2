"""The VATOS page: stage 1 of the streams of one VMID (IHI 0070, 6.3.44, 6.3.99 to 6.3.102, 9.1.6)."""

from dataclasses import replace

import pytest

from tests import smmu_rig as hw
from tests.ats_rig import BOTH, S2_WORD, AtsRig
from tests.smmu_rig import PAGE, PLAIN
from tests.test_smmu_atos import GATOS, IPA, OK, RNW, S1, S2, S12, AtosRig, fault
from viommu.smmu import Features

IDR2, SEL = 0x08, 0x180
VATOS = 0x3_0A00
VMID = 9
VIRTUAL = replace(BOTH, vatos=True)


class VatosRig(AtosRig):
    """Nested, with the VMID of the stream selected; IPA is where page 1 of stage 1 leads to."""

    group = VATOS

    def __init__(self, features: Features = VIRTUAL) -> None:
        super().__init__(features)
        self.nest(0)
        self.map(0x1000, IPA | PLAIN | PAGE)
        self.write(SEL, VMID)


@pytest.fixture
def rig() -> VatosRig:
    return VatosRig()


def test_stage_1_of_the_own_streams_and_nothing_else(rig: VatosRig) -> None:
    assert rig.ask(0x1000, S1 | RNW) == OK | IPA
    assert rig.ask(0x2000, S1 | RNW) == fault(0x10)
    for kind in (0, S2, S12):
        assert rig.ask(0x1000, kind) == fault(0xFF)


@pytest.mark.parametrize("vmid", [0, VMID | 1 << 8, VMID - 1])
def test_streams_of_other_vmids_are_denied(rig: VatosRig, vmid: int) -> None:
    rig.write(SEL, vmid)
    assert rig.ask(0x1000, S1 | RNW) == fault(0x04)
    rig.write(SEL, VMID)
    assert rig.ask(0x1000, S1 | RNW) == OK | IPA


@pytest.mark.parametrize("e2h", [0, 1])
def test_streams_that_have_no_vmid_are_denied(rig: VatosRig, e2h: int) -> None:
    rig.configure(e2h)
    rig.write(SEL, 0)
    for config in (hw.STE_ABORT, hw.STE_BYPASS):
        rig.ste(config, 0, 0, 0)
        assert rig.ask(0x1000, S1) == fault(0x04)
    el2 = 2 << 30
    rig.ste(hw.STE_S1 | rig.cd_address, el2, 0, 0)
    assert rig.ask(0x1000, S1) == fault(0x04)


def test_stage_1_alone_has_one_where_there_is_a_stage_2(rig: VatosRig) -> None:
    rig.ste(hw.STE_S1 | rig.cd_address, 0, VMID, 0)
    assert rig.ask(0x1000, S1 | RNW) == OK | IPA
    rig.ste(hw.STE_S1 | rig.cd_address, 0, VMID + 1, 0)
    assert rig.ask(0x1000, S1 | RNW) == fault(0x04)


def test_order_of_errors(rig: VatosRig) -> None:
    # The VMID comes after the STE, before the stage, and before the CD.
    assert rig.ask(0, S1, sid=0x1000) == fault(0x02)
    rig.ste(hw.STE_S2, 0, S2_WORD, rig.stage_2)
    assert rig.ask(0x1000, S1) == fault(0xFE)
    rig.ste(hw.STE_NESTED | rig.cd_address, 0, S2_WORD, rig.stage_2)
    rig.context(hw.CD_PLAIN & ~hw.CD_V)
    assert rig.ask(0x1000, S1) == fault(0x0A)
    rig.write(SEL, 0)
    assert rig.ask(0x1000, S1) == fault(0x04)


def test_what_stage_2_refuses_is_no_business_of_the_guest(rig: VatosRig) -> None:
    rig.put(rig.low, 0x5000_0000 | hw.TABLE)
    rig.forget()
    assert rig.ask(0x1000, S1) == fault(0x0B)
    rig.ste(hw.STE_NESTED | 0x5000_0000, 0, S2_WORD, rig.stage_2)
    assert rig.ask(0x1000, S1) == fault(0x09)


def test_the_groups_have_nothing_in_common(rig: VatosRig) -> None:
    rig.map(0x2000, IPA + 0x7000 | PLAIN | PAGE)
    assert rig.ask(0x1000, S1 | RNW) == OK | IPA
    own = [rig.read64(VATOS + offset) for offset in (8, 16, 24)]
    rig.write(SEL, 0)  # which GATOS does not ask for
    rig.group = GATOS
    assert rig.ask(0x2000, S1 | RNW) == OK | IPA + 0x7000
    assert [rig.read64(VATOS + offset) for offset in (8, 16, 24)] == own


def test_registers(rig: VatosRig) -> None:
    assert rig.read(hw.IDR0) >> 20 & 1 == 1
    assert 0x2_0000 + 0x1_0000 * rig.read(IDR2) == VATOS & ~0xFFFF
    for register, mask in ((8, (1 << 53) - 1 & ~0xFFFF_0000), (16, (1 << 64) - 64), (24, 0)):
        rig.write64(VATOS + register, (1 << 64) - 1)
        assert rig.read64(VATOS + register) == mask
    rig.write(VATOS + 8, 0x10)  # half of it
    assert rig.read64(VATOS + 8) == 0x1F_FFFF << 32 | 0x10
    rig.write(SEL, (1 << 32) - 1)
    assert rig.read(SEL) == 0xFFFF
    rig.smmu.reset()
    assert rig.read(SEL) == rig.read64(VATOS + 8) == rig.read64(VATOS + 16) == 0
    narrow = VatosRig(replace(VIRTUAL, vmid_bits=8))
    narrow.write(SEL, (1 << 32) - 1)
    assert narrow.read(SEL) == 0xFF


def test_run_needs_smmuen(rig: VatosRig) -> None:
    before = rig.ask(0x1000, S1 | RNW)
    rig.write(hw.CR0, hw.EVENTQEN)
    assert rig.ask(0x2000, S1) == before


def test_without_it_the_registers_are_reserved() -> None:
    rig = AtsRig(BOTH)
    assert (rig.read(hw.IDR0) >> 20 & 1, rig.read(IDR2)) == (0, 0)
    for register in (SEL, VATOS + 8, VATOS + 16):
        rig.write64(register, (1 << 64) - 1)
        assert rig.read64(register) == 0


def test_the_frame_ends_with_the_page() -> None:
    sizes = [features.frame_size for features in (BOTH, VIRTUAL)]
    assert sizes == [0x2_0000, 0x4_0000]
    rig = VatosRig()
    rig.smmu.write(0x4_0000, 8, (1 << 64) - 1)
    assert rig.smmu.read(0x4_0000, 8) == 0
