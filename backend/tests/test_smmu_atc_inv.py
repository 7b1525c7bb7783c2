"""CMD_ATC_INV, and the CMD_SYNC that waits for functions (IHI 0070, 3.9.1.4, 4.5.1, 4.7.3, 7.1)."""

from dataclasses import replace

import pytest

from tests import smmu_rig as hw
from tests.ats_rig import ATS, ON, AtsRig
from tests.smmu_rig import STREAM
from viommu.smmu import InvalidateRequest

SYNC = (0x46, 0)
ALL = (0x40 | STREAM << 32, 52)
SSV, GLOBAL = 1 << 11, 1 << 9


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ((0x40 | STREAM << 32, 0x1234_5000), InvalidateRequest(None, 0x1234_5000, 4096)),
        ((0x40 | STREAM << 32, 0x1234_5000 | 4), InvalidateRequest(None, 0x1234_0000, 1 << 16)),
        ((0x40 | SSV | 0xABCDE << 12 | STREAM << 32, 0), InvalidateRequest(0xABCDE, 0, 4096)),
        ((0x40 | SSV | GLOBAL | 5 << 12 | STREAM << 32, 52), InvalidateRequest(5, 0, 1 << 64, True)),
        ((0x40 | GLOBAL | 5 << 12 | STREAM << 32, 0xFFFF_FFFF_FFFF_F000 | 52), InvalidateRequest(None, 0, 1 << 64)),
        ((0x40 | STREAM << 32, 0xFFFF_FFFF_FFFF_F000 | 51), InvalidateRequest(None, 1 << 63, 1 << 63)),
    ],
)  # fmt: skip
def test_the_function_is_told(command: tuple[int, int], expected: InvalidateRequest) -> None:
    rig = AtsRig()
    rig.submit(command)
    assert rig.function.requests == [expected]
    assert rig.consumed


def test_without_substreams_ssv_is_ignored() -> None:
    rig = AtsRig(replace(ATS, substream_id_bits=0))
    rig.submit((0x40 | SSV | GLOBAL | 5 << 12 | STREAM << 32, 0))
    assert rig.function.requests == [InvalidateRequest(None, 0, 4096)]


@pytest.mark.parametrize("size", [53, 63])
def test_a_size_beyond_everything_is_illegal(size: int) -> None:
    rig = AtsRig()
    rig.submit((0x40 | STREAM << 32, size))
    assert (rig.read(hw.CMDQ_CONS) >> 24, rig.read(hw.GERROR)) == (1, 1)
    assert rig.function.requests == []


def test_it_is_ignored_for_strangers_and_while_smmuen_is_0() -> None:
    rig = AtsRig()
    rig.submit((0x40 | 0x77 << 32, 52), SYNC)
    rig.write(hw.CR0, ON & ~hw.SMMUEN)
    rig.submit(ALL, SYNC)
    assert rig.consumed
    assert rig.function.requests == []


def test_a_sync_waits_for_the_completion() -> None:
    rig = AtsRig()
    rig.function.at_once = False
    flag = rig.alloc(8)
    rig.submit(ALL, ALL, (0x46 | 1 << 12 | 9 << 32, flag), (0x01, 0))
    assert (rig.read(hw.CMDQ_CONS), rig.get(flag)) == (3 + 2, 0)  # three commands of `forget`
    first, second = rig.function.pending
    second()
    second()
    assert rig.get(flag) == 0
    first()
    assert rig.get(flag) == 9
    rig.run()
    assert rig.consumed
    # And what is answered is not waited for again.
    rig.submit(SYNC)
    assert rig.consumed


def test_a_function_that_does_not_answer_is_an_error_of_the_sync() -> None:
    rig = AtsRig()
    rig.function.at_once = False
    rig.submit(ALL, SYNC, (0x01, 0))
    place = rig.read(hw.CMDQ_CONS)
    assert rig.smmu.give_up() == 1
    # It points at the CMD_SYNC, which is not consumed.
    assert rig.read(hw.CMDQ_CONS) == place | 3 << 24
    assert (rig.read(hw.GERROR), rig.read(hw.GERRORN)) == (1, 0)
    rig.run()
    assert rig.read(hw.CMDQ_CONS) == place | 3 << 24
    # Acknowledged, the CMD_SYNC is tried again; what was given up is not waited for any more.
    rig.write(hw.GERRORN, 1)
    rig.run()
    assert rig.consumed
    rig.function.pending[0]()
    assert rig.smmu.give_up() == 0


def test_what_was_given_up_fails_the_next_sync() -> None:
    rig = AtsRig()
    rig.function.at_once = False
    rig.submit(ALL)
    assert rig.consumed
    rig.smmu.give_up()
    rig.function.at_once = True
    rig.submit(ALL, SYNC)
    assert rig.read(hw.CMDQ_CONS) >> 24 == 3


def test_the_sync_waits_for_transactions_and_functions() -> None:
    rig = AtsRig()
    rig.function.at_once = False
    rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE)
    held = rig.begin(0x1000)
    rig.submit(ALL, SYNC)
    rig.function.pending[0]()
    assert not rig.consumed
    rig.smmu.retire(held)
    assert rig.consumed


def test_thirty_two_can_be_outstanding() -> None:
    rig = AtsRig()
    rig.function.at_once = False
    for _ in range(2):
        rig.submit(*[ALL] * 20)
    assert len(rig.function.requests) == 32
    assert not rig.consumed
    for complete in rig.function.pending[:32]:
        complete()
    rig.run()
    assert len(rig.function.requests) == 40
    assert rig.consumed
    # Given up counts as answered too.
    rig.submit(*[ALL] * 25)
    rig.smmu.give_up()
    rig.run()
    assert rig.consumed
    rig.function.pending[-1]()
    rig.submit(SYNC)
    assert rig.read(hw.CMDQ_CONS) >> 24 == 3


def test_a_reset_waits_for_nobody() -> None:
    rig = AtsRig()
    rig.function.at_once = False
    rig.submit(ALL, SYNC)
    rig.smmu.reset()
    assert len(rig.smmu.ats_port) == 0
    rig.function.pending[0]()
    assert rig.smmu.give_up() == 0
    assert rig.read(hw.CMDQ_CONS) == 0


def test_cmdqen_stays_acknowledged_while_a_command_waits() -> None:
    rig = AtsRig()
    rig.function.at_once = False
    rig.submit(ALL, SYNC)
    rig.write(hw.CR0, hw.SMMUEN)
    assert rig.read(hw.CR0ACK) == hw.SMMUEN | hw.CMDQEN
    rig.function.pending[0]()
    assert rig.read(hw.CR0ACK) == hw.SMMUEN
