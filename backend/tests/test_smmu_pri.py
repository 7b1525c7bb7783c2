"""The PRI queue and CMD_PRI_RESP (IHI 0070, chapter 8, 4.5.2, 6.3.33 to 6.3.36)."""

from dataclasses import replace

import pytest

from tests import smmu_rig as hw
from tests.ats_rig import ATS, ON, REC_CFG_ATS, RECINVSID, AtsRig
from tests.smmu_rig import STREAM
from viommu.smmu import Features, PageRequest, PageResponse, ResponseCode

PRI = replace(ATS, pri=True)
PRIQ_BASE, PRIQ_PROD, PRIQ_CONS = 0xC0, 0x1_00C8, 0x1_00CC
CFG0, CFG1, CFG2 = 0xD0, 0xD8, 0xDC
PRIQEN, PRIQ_IRQEN, OVERFLOW = 1 << 1, 1 << 1, 1 << 31
OK, INVALID, FAILURE = ResponseCode


class PriRig(AtsRig):
    def __init__(
        self, features: Features = PRI, *, on: int = ON | PRIQEN, base: int | None = None
    ) -> None:
        super().__init__(features, on=0)
        self.queue = self.alloc(4096) if base is None else base
        self.write64(PRIQ_BASE, self.queue | 2)
        self.write(hw.CR0, on)

    def page(
        self, index: int = 0, *, substream: int | None = None, last: bool = True, **kind: bool
    ) -> None:
        kind = kind or {"read": True}
        self.smmu.page_request(PageRequest(STREAM, substream, 0x1234_5678, index, last, **kind))

    def entry(self, index: int) -> tuple[int, int]:
        return self.get(self.queue + 16 * index), self.get(self.queue + 16 * index + 8)


def test_requests_are_written_as_they_came() -> None:
    rig = PriRig()
    rig.page(0x1FF, last=False)
    rig.page(3, substream=0xABCDE, write=True, execute=True, privileged=True)
    assert rig.entry(0) == (1 << 60 | STREAM, 0x1234_5000 | 0x1FF)
    assert rig.entry(1) == (
        1 << 63 | 1 << 62 | 1 << 61 | 1 << 59 | 1 << 58 | 0xABCDE << 32 | STREAM,
        0x1234_5003,
    )
    assert (rig.read(PRIQ_PROD), rig.read(PRIQ_CONS), rig.read(0xC8)) == (2, 0, 2)
    assert rig.function.responses == []


def test_overflow_answers_the_last_of_each_group_until_it_is_acknowledged() -> None:
    rig = PriRig()
    for index in range(4):
        rig.page(index)
    assert rig.read(PRIQ_PROD) == 4
    rig.page(4, last=False)
    assert rig.read(PRIQ_PROD) == OVERFLOW | 4
    assert rig.function.responses == []
    rig.page(5)
    assert rig.function.responses == [PageResponse(5, OK)]
    # Room alone does not help.
    rig.write(PRIQ_CONS, 4)
    rig.page(6)
    rig.page(7, substream=1, last=True, execute=True)  # a stop marker
    assert rig.function.responses == [PageResponse(5, OK), PageResponse(6, OK)]
    assert rig.read(PRIQ_PROD) == OVERFLOW | 4
    rig.write(PRIQ_CONS, OVERFLOW | 4)
    rig.page(8)
    assert rig.read(PRIQ_PROD) == OVERFLOW | 5
    assert rig.entry(0)[1] & 0x1FF == 8
    assert len(rig.function.responses) == 2


@pytest.mark.parametrize("recorded", [False, True])
def test_automatic_responses_have_the_pasid_that_the_ste_wants(recorded: bool) -> None:
    rig = PriRig()
    rig.configure(REC_CFG_ATS | RECINVSID if recorded else 0)
    for index in range(4):
        rig.page(index)
    ppar = 1 << 18
    for eats, response in ((0, PageResponse(9, OK)), (ppar, PageResponse(9, OK, 7))):
        rig.ste(hw.STE_S1 | rig.cd_address | 3 << 59, eats)
        rig.page(9, substream=7)
        assert rig.function.responses.pop() == response
    rig.ste(0)
    rig.events()
    rig.page(9, substream=7)
    assert rig.function.responses.pop() == PageResponse(9, FAILURE)
    assert [event[0] for event in rig.events()] == ([0x04] if recorded else [])
    # Without a PASID nobody looks.
    rig.page(9)
    assert rig.function.responses.pop() == PageResponse(9, OK)
    assert rig.events() == []


@pytest.mark.parametrize("on", [ON, hw.EVENTQEN | hw.CMDQEN | PRIQEN])
def test_a_queue_that_is_off_refuses_everything_but_stop_markers(on: int) -> None:
    rig = PriRig(on=on)
    rig.page(1, last=False)
    rig.page(2, substream=5)
    rig.page(3, substream=5, last=True, execute=True)
    assert rig.function.responses == [PageResponse(1, FAILURE), PageResponse(2, FAILURE)]
    assert rig.read(PRIQ_PROD) == 0


def test_an_aborted_write_is_an_error_and_refuses_everything_until_it_is_acknowledged() -> None:
    rig = PriRig(base=0x1000)
    rig.page(1)
    assert (rig.read(hw.GERROR), rig.read(PRIQ_PROD)) == (1 << 3, 0)
    rig.page(2, last=False)
    assert rig.function.responses == [PageResponse(1, FAILURE), PageResponse(2, FAILURE)]
    rig.write(hw.CR0, ON)
    rig.queue = rig.alloc(4096)
    rig.write64(PRIQ_BASE, rig.queue | 2)
    rig.write(hw.CR0, ON | PRIQEN)
    rig.page(3)
    assert rig.read(PRIQ_PROD) == 0
    rig.write(hw.GERRORN, 1 << 3)
    assert rig.read(hw.GERRORN) == 1 << 3
    rig.page(4)
    assert rig.read(PRIQ_PROD) == 1


@pytest.mark.parametrize("msi", [False, True])
@pytest.mark.parametrize("last_only", [False, True])
def test_interrupts(msi: bool, last_only: bool) -> None:
    rig = PriRig(replace(PRI, msi=msi))
    flag = rig.alloc(8)
    rig.write64(CFG0, flag)
    rig.write(CFG1, 0x77)
    rig.write(CFG2, 0xFFFF_FFFF if last_only else 0x7FFF_FFFF)
    assert rig.read64(CFG0) == (flag if msi else 0)
    assert rig.read(CFG2) == last_only << 31 | (0x3F if msi else 0)

    def came() -> bool:
        seen = rig.get(flag) == 0x77 if msi else rig.interrupts > 0
        rig.put(flag, 0)
        rig.interrupts = 0
        return seen

    rig.page(0)
    assert not came()
    rig.write(hw.IRQ_CTRL, PRIQ_IRQEN)
    assert rig.read(hw.IRQ_CTRLACK) == PRIQ_IRQEN
    rig.write(CFG2, 0)
    assert rig.read(CFG2) >> 31 == last_only
    rig.page(1, last=False)
    assert came() != last_only
    rig.page(2)
    assert came()
    rig.page(3, last=False)
    came()
    rig.page(4, last=False)
    assert not came()
    rig.page(5)
    assert came() == last_only


def test_an_msi_that_is_aborted_is_an_error() -> None:
    rig = PriRig()
    rig.write64(CFG0, 0x1000)
    rig.write(hw.IRQ_CTRL, PRIQ_IRQEN)
    rig.page(1)
    assert rig.read(hw.GERROR) == 1 << 6


def test_the_registers_are_guarded_by_priqen() -> None:
    rig = PriRig()
    base = rig.read64(PRIQ_BASE)
    rig.write64(PRIQ_BASE, 0)
    rig.write(PRIQ_PROD, 3)
    assert (rig.read64(PRIQ_BASE), rig.read(PRIQ_PROD)) == (base, 0)
    rig.write(hw.CR0, ON)
    rig.write64(PRIQ_BASE, (1 << 64) - 1)
    assert rig.read64(PRIQ_BASE) == 1 << 62 | (1 << 48) - 32 | 0x1F
    rig.write(PRIQ_PROD, 0xFFFF_FFFF)
    assert rig.read(PRIQ_PROD) == 1 << 31 | (1 << 13) - 1
    rig.smmu.reset()
    assert (rig.read64(PRIQ_BASE), rig.read(PRIQ_PROD)) == (0, 0)


def test_without_pri_nothing_is_there() -> None:
    rig = PriRig(ATS)
    assert (rig.read(hw.IDR0) >> 16 & 1, rig.read(hw.IDR1) >> 11 & 0x1F) == (0, 0)
    assert rig.read(hw.CR0) == ON
    rig.write(hw.IRQ_CTRL, 7)
    assert rig.read(hw.IRQ_CTRL) == 5
    for offset in (PRIQ_BASE, PRIQ_PROD, PRIQ_CONS, CFG0, CFG1, CFG2):
        rig.write(offset, 0xFFFF_FFFF)
        assert rig.read(offset) == 0
    rig.page(1)
    assert rig.function.responses == []
    rig.submit((0x41 | STREAM << 32, 2 << 12))
    assert rig.read(hw.CMDQ_CONS) >> 24 == 1


def test_the_id_registers_advertise_it() -> None:
    rig = PriRig()
    assert (rig.read(hw.IDR0) >> 16 & 1, rig.read(hw.IDR1) >> 11 & 0x1F) == (1, 12)
    assert Features().pri
    with pytest.raises(ValueError, match="pri needs ats"):
        Features(ats=False)


# CMD_PRI_RESP


@pytest.mark.parametrize(("response", "code"), [(0, FAILURE), (1, INVALID), (2, OK)])
def test_software_responds(response: int, code: ResponseCode) -> None:
    rig = PriRig()
    rig.submit((0x41 | STREAM << 32, 0x1FF | response << 12))
    rig.submit((0x41 | 1 << 11 | 0xABCDE << 12 | STREAM << 32, 5 | response << 12))
    assert rig.function.responses == [PageResponse(0x1FF, code), PageResponse(5, code, 0xABCDE)]
    rig.submit((0x41 | 0x77 << 32, 2 << 12))
    rig.write(hw.CR0, ON & ~hw.SMMUEN)
    rig.submit((0x41 | STREAM << 32, 2 << 12))
    assert rig.consumed
    assert len(rig.function.responses) == 2


def test_the_reserved_response_is_illegal() -> None:
    rig = PriRig()
    rig.submit((0x41 | STREAM << 32, 3 << 12))
    assert rig.read(hw.CMDQ_CONS) >> 24 == 1
    assert rig.function.responses == []
