"""Service failure mode (IHI 0070, 12.3): nothing is translated, consumed or recorded until a reset."""

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.layouts.registers import GlobalError
from viommu.smmu import Access, TransactionAborted

SFM = 1 << 8


def test_nothing_goes_through_until_a_reset() -> None:
    rig = Rig()
    rig.write(hw.IRQ_CTRL, 1)
    rig.smmu.enter_service_failure()
    assert (rig.read(hw.GERROR) ^ rig.read(hw.GERRORN), rig.interrupts) == (SFM, 1)
    rig.write(hw.GERRORN, SFM)  # to acknowledge it changes nothing
    assert rig.read(hw.GERROR) == rig.read(hw.GERRORN) == SFM

    with pytest.raises(TransactionAborted) as aborted:
        rig.smmu.translate(Access(hw.STREAM), 0x1000, 8)
    assert aborted.value.record is None
    rig.submit((0x46, 0))
    assert (rig.read(hw.CMDQ_PROD), rig.read(hw.CMDQ_CONS)) == (1, 0)
    assert rig.read(hw.EVENTQ_PROD) == 0

    rig.smmu.reset()
    rig.program()
    rig.write(hw.CR0, hw.SMMUEN | hw.EVENTQEN | hw.CMDQEN)
    rig.submit((0x46, 0))
    assert rig.read(hw.CMDQ_CONS) == 1
    with pytest.raises(TransactionAborted) as aborted:
        rig.smmu.translate(Access(hw.STREAM), 0x1000, 8)
    assert aborted.value.record is not None


def test_any_global_error_can_be_raised() -> None:
    rig = Rig()
    rig.smmu.raise_error(GlobalError.EVENTQ_ABT_ERR)
    assert rig.read(hw.GERROR) == 1 << 2
