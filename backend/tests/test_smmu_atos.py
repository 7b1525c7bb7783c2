"""Address translation operations by the GATOS registers (IHI 0070, 6.3.37 to 6.3.40, chapter 9)."""

from dataclasses import replace

import pytest

from tests import smmu_rig as hw
from tests.ats_rig import BOTH, S2_MEM, S2_RO, S2_RW, S2_WORD, AtsRig
from tests.smmu_rig import AF, BLOCK, PAGE, PLAIN, READ_ONLY, STREAM
from viommu.smmu import Features

GATOS = 0x100
CTRL, SID, ADDR, PAR = GATOS, 0x108, 0x110, 0x118
HTTUI, IND, RNW, PNU = 1 << 6, 1 << 7, 1 << 8, 1 << 9
S1, S2, S12 = 1 << 10, 2 << 10, 3 << 10
OK = 0xFF << 56 | 3 << 8
LEAF = PLAIN | PAGE
IPA = 0x1_4000_0000


class AtosRig(AtsRig):
    group = GATOS

    def __init__(self, features: Features = BOTH) -> None:
        super().__init__(features)

    def ask(self, address: int, kind: int, *, sid: int = STREAM) -> int:  # type: ignore[override]
        self.write64(self.group + 8, sid)
        self.write64(self.group + 16, address | kind)
        self.write(self.group, 1)
        assert self.read(self.group) == 0
        assert self.events() == []
        assert len(self.smmu.stalls) == 0
        return self.read64(self.group + 24)


def fault(code: int, reason: int = 0, address: int = 0) -> int:
    return 1 | reason << 1 | code << 4 | address


@pytest.fixture
def rig() -> AtosRig:
    """Nested; a block of stage 1 over pages of stage 2."""
    rig = AtosRig()
    rig.nest(0)
    rig.map(0x20_0000, IPA | PLAIN | BLOCK, level=2)
    rig.map_2(IPA + 0x3000, 0xB_7000 | S2_RW | S2_MEM | AF | PAGE)
    rig.map_2(IPA + 0x4000, 0xB_9000 | S2_RO | S2_MEM | AF | PAGE)
    return rig


def test_each_type_answers_with_its_address_and_size(rig: AtosRig) -> None:
    # 2 MiB: Size is set, and the lowest bit of ADDR that is set is bit 20.
    assert rig.ask(0x20_3000, S1 | RNW) == OK | IPA | 1 << 20 | 1 << 11
    assert rig.ask(IPA + 0x3000, S2) == OK | 0xB_7000
    assert rig.ask(0x20_3000, S12) == OK | 0xB_7000
    rig.map(0x1000, 0xA_5000 | LEAF)
    rig.ste(hw.STE_S1 | rig.cd_address)
    assert rig.ask(0x1000, S1) == OK | 0xA_5000


def test_requests_that_are_none() -> None:
    rig = AtosRig()
    rig.nest(0)
    assert rig.ask(0x1000, 0) == fault(0xFF)
    assert rig.ask(0x1000, S2, sid=STREAM | 1 << 52) == fault(0xFF)
    rig = AtosRig(replace(BOTH, stage_2=False, hyp=False))
    assert rig.ask(0x1000, S2) == rig.ask(0x1000, S12) == fault(0xFF)
    rig = AtosRig(replace(BOTH, stage_1=False, hyp=False))
    assert rig.ask(0x1000, S1) == rig.ask(0x1000, S12) == fault(0xFF)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (hw.STE_ABORT, {S1, S2, S12}),
        (hw.STE_BYPASS, {S1, S2, S12}),
        (hw.STE_S1, {S2, S12}),
        (hw.STE_S2, {S1, S12}),
        (hw.STE_NESTED, set()),
    ],
)
def test_stages_that_are_not_there(config: int, wrong: set[int]) -> None:
    rig = AtosRig()
    rig.nest(0)
    cd = rig.cd_address if config in (hw.STE_S1, hw.STE_NESTED) else 0
    rig.ste(config | cd, 0, S2_WORD, rig.stage_2)
    for kind in (S1, S2, S12):
        assert (rig.ask(0x1000, kind | RNW) == fault(0xFE)) == (kind in wrong)


def test_configuration_errors(rig: AtosRig) -> None:
    assert rig.ask(0, S12, sid=0x1000) == fault(0x02)
    assert rig.ask(0, S12, sid=0x20) == fault(0x04)
    assert rig.ask(0, S12, sid=STREAM | 5 << 32 | 1 << 52) == fault(0x08)
    rig.context(hw.CD_PLAIN & ~hw.CD_V)
    assert rig.ask(0, S12) == rig.ask(0, S1) == fault(0x0A)
    # The CD lies where stage 2 maps nothing.
    rig.ste(hw.STE_NESTED | 0x5000_0000, 0, S2_WORD, rig.stage_2)
    assert rig.ask(0, S12) == fault(0x10, 1, 0x5000_0000)
    assert rig.ask(0, S1) == fault(0x09)
    # … and whether stage 2 wants its faults recorded, or stalled, does not matter.
    rig.ste(hw.STE_NESTED | 0x5000_0000, 0, S2_WORD & ~(1 << 58), rig.stage_2)
    assert rig.ask(0, S12) == fault(0x10, 1, 0x5000_0000)
    rig.ste(hw.STE_NESTED | 0x5000_0000, 0, S2_WORD | 1 << 57, rig.stage_2)
    assert rig.ask(0, S12) == fault(0x10, 1, 0x5000_0000)


@pytest.mark.parametrize("flags", [hw.RECORD, hw.STALL, 0], ids=["record", "stall", "silent"])
def test_translation_faults(rig: AtosRig, flags: int) -> None:
    rig.context(hw.CD_PLAIN & ~hw.RECORD | flags)
    rig.map(0x1000, 0xA000 | PLAIN & ~AF | PAGE)
    rig.map(0x2000, 0xA000 | PLAIN | READ_ONLY | PAGE)
    for kind in (S1, S12):
        assert rig.ask(0x8000_0000, kind | RNW) == fault(0x10)
        assert rig.ask(0x1000, kind | RNW) == fault(0x12)
        assert rig.ask(0x2000, kind) == fault(0x13)
    assert rig.ask(0x20_5000, S12 | RNW) == fault(0x10, 3, IPA + 0x5000)
    assert rig.ask(0x20_4000, S12) == fault(0x13, 3, IPA + 0x4000)
    assert rig.ask(IPA + 0x5000, S2 | RNW) == fault(0x10, 3)
    assert rig.ask(1 << 50, S2 | RNW) == fault(0x11)
    rig.put(rig.low, 0x5000_0000 | hw.TABLE)
    rig.forget()
    assert rig.ask(0x20_3000, S12 | RNW) == fault(0x10, 2, 0x5000_0000)
    assert rig.ask(0x20_3000, S1 | RNW) == fault(0x0B)


def test_permissions_are_those_of_the_request_and_not_of_the_ste(rig: AtosRig) -> None:
    rig.map(0x1000, IPA + 0x3000 | AF | PAGE | hw.UXN)  # EL1 only
    rig.ste(
        hw.STE_NESTED | rig.cd_address, 3 << 48, S2_WORD, rig.stage_2
    )  # PRIVCFG says privileged
    for kind in (S1, S12):
        assert rig.ask(0x1000, kind) == fault(0x13)
        assert not rig.ask(0x1000, kind | PNU) & 1
        assert not rig.ask(0x1000, kind | PNU | RNW | IND) & 1
        assert rig.ask(0x1000, kind | RNW | IND) == fault(0x13)


def test_httui_changes_nothing() -> None:
    """The answer is as if the descriptor had been updated (chapter 9)."""
    rig = AtosRig()
    rig.context(hw.CD_PLAIN | hw.HA | hw.HD)
    leaf = 0xA000 | PLAIN & ~AF | READ_ONLY | 1 << 51 | PAGE
    entry = rig.map(0x1000, leaf)
    for kind in (S1, S12):
        assert rig.ask(0x1000, kind | HTTUI | RNW) == rig.ask(0x1000, kind | HTTUI)
        assert rig.ask(0x1000, kind | HTTUI) & 1 == (kind == S12), "there is no stage 2"
    assert rig.ask(0x1000, S1 | HTTUI) == OK | 0xA000
    assert rig.get(entry) == leaf
    rig.put(entry, leaf | AF)
    assert rig.ask(0x1000, S1 | HTTUI) == OK | 0xA000
    assert rig.get(entry) == leaf | AF
    assert rig.physical(0x1000, write=True) == 0xA000
    rig.put(entry, leaf)
    rig.forget()
    assert rig.ask(0x1000, S1) == OK | 0xA000
    assert rig.get(entry) == leaf & ~READ_ONLY | AF


def test_httui_leaves_nothing_that_others_find() -> None:
    """An entry that says dirty, or accessed, while memory does not."""
    rig = AtosRig()
    rig.nest(0)
    ipa, clean = IPA + 0x6000, 0xB_B000 | S2_RO | S2_MEM | 1 << 51 | PAGE
    entry = rig.map_2(ipa, clean)
    rig.ste(hw.STE_NESTED | rig.cd_address, 0, S2_WORD | 3 << 55, rig.stage_2)
    rig.map(0x1000, ipa | PLAIN | PAGE)
    assert rig.ask(0x7000, S12) & 1, "it has no page, but the CD is fetched now"
    before = len(rig.smmu.tlb)
    for kind in (S12, S12 | RNW):
        assert rig.ask(0x1000, kind | HTTUI) == OK | 0xB_B000
    assert rig.get(entry) == clean
    assert len(rig.smmu.tlb) == before
    assert rig.physical(0x1000, write=True) == 0xB_B000
    assert rig.get(entry) & AF


def test_a_skipped_stage_1_is_an_identity_or_stage_2_alone(rig: AtosRig) -> None:
    rig.ste(hw.STE_NESTED | rig.cd_address | 1 << 59, 1, S2_WORD, rig.stage_2)
    assert rig.ask(IPA + 0x3000, S1) == OK | IPA + 0x3000
    assert rig.ask(IPA + 0x3000, S12) == OK | 0xB_7000
    assert rig.ask(1 << 50, S1 | RNW) == fault(0x11)


def test_registers_and_run(rig: AtosRig) -> None:
    for register, mask in ((SID, (1 << 53) - 1 & ~0xFFFF_0000), (ADDR, (1 << 64) - 64), (PAR, 0)):
        rig.write64(register, (1 << 64) - 1)
        assert rig.read64(register) == mask
    before = rig.ask(0x20_3000, S12)
    rig.write(hw.CR0, hw.EVENTQEN)
    rig.write64(ADDR, 0)
    rig.write(CTRL, 1)
    assert (rig.read(CTRL), rig.read64(PAR)) == (0, before)
    assert rig.read(hw.IDR0) >> 15 & 1 == 1
    assert rig.read(hw.IDR0) >> 20 & 1 == 0
    rig = AtosRig(replace(BOTH, atos=False))
    for register in (SID, ADDR):
        rig.write64(register, (1 << 64) - 1)
        assert rig.read64(register) == 0
