"""Transactions in flight, and who waits for them (IHI 0070, 3.21, 4.7.3, 6.3.9.3)."""

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.smmu import Access
from viommu.smmu.barrier import InFlight

SYNC = (0x46, 0)
LEAF = hw.PLAIN | hw.PAGE
INVALIDATIONS = {
    "CFGI_STE": (0x03 | hw.STREAM << 32, 1),
    "CFGI_STE_RANGE": (0x04, 7),
    "CFGI_ALL": (0x04, 31),
    "CFGI_CD": (0x05 | hw.STREAM << 32, 1),
    "CFGI_CD_ALL": (0x06 | hw.STREAM << 32, 0),
    "TLBI_NH_ALL": (0x10, 0),
    "TLBI_NH_ASID": (0x11 | hw.ASID << 48, 0),
    "TLBI_NH_VA": (0x12 | hw.ASID << 48, 0x1000),
    "TLBI_NH_VAA": (0x13, 0x1000),
    "TLBI_NSNH_ALL": (0x30, 0),
}


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.map(0x1000, 0xA000 | LEAF)
    return rig


@pytest.mark.parametrize("command", INVALIDATIONS.values(), ids=INVALIDATIONS)
def test_sync_waits_for_transactions_that_may_have_used_what_was_invalidated(
    rig: Rig, command: tuple[int, int]
) -> None:
    flag = rig.alloc(8)
    first, second = rig.begin(0x1000), rig.begin(0x1000)
    rig.submit(command, (0x46 | 1 << 12 | 9 << 32, flag), (0x01, 0))
    # The invalidation is consumed, the CMD_SYNC is not, and nothing behind it is looked at.
    assert (rig.read(hw.CMDQ_CONS), rig.get(flag)) == (1, 0)
    late = rig.begin(0x1000)
    rig.smmu.retire(first)
    rig.run()
    assert (rig.read(hw.CMDQ_CONS), rig.get(flag)) == (1, 0)
    rig.smmu.retire(second)
    # It completes with the last of the old ones, and does not wait for the new one.
    assert rig.get(flag) == 9
    rig.run()
    assert rig.read(hw.CMDQ_CONS) == 3
    rig.smmu.retire(late)


def test_sync_does_not_wait_when_nothing_was_invalidated(rig: Rig) -> None:
    held = rig.begin(0x1000)
    rig.submit(SYNC, (0x01 | hw.STREAM << 32, 0), SYNC)
    assert rig.consumed
    rig.smmu.retire(held)


def test_one_sync_settles_the_invalidations_before_it(rig: Rig) -> None:
    held = rig.begin(0x1000)
    rig.submit((0x30, 0), SYNC)
    rig.smmu.retire(held)
    assert rig.consumed
    held = rig.begin(0x1000)
    rig.submit(SYNC)
    assert rig.consumed
    rig.smmu.retire(held)


def test_an_error_between_invalidation_and_sync_does_not_spare_the_wait(rig: Rig) -> None:
    held = rig.begin(0x1000)
    rig.submit((0x30, 0), (0xFF, 0), SYNC)
    rig.put(hw.COMMANDS + 16, *SYNC)
    rig.write(hw.GERRORN, 1)
    assert rig.read(hw.CMDQ_CONS) & 0xFF == 1
    rig.smmu.retire(held)
    rig.run()
    assert rig.consumed


def test_a_transaction_that_only_faulted_holds_nothing(rig: Rig) -> None:
    rig.fault(0x9_9000)
    assert len(rig.smmu.in_flight) == 0
    rig.submit((0x30, 0), SYNC)
    assert rig.consumed


def test_bypassing_transactions_are_waited_for_too() -> None:
    rig = Rig()
    rig.put(hw.STRTAB + 64 * 0x11, hw.STE_BYPASS)
    held = rig.begin(0x1000, access=Access(0x11))
    rig.submit((0x03 | 0x11 << 32, 1), SYNC)
    assert not rig.consumed
    rig.smmu.retire(held)
    assert rig.consumed


def test_what_was_translated_before_moves_by_the_old_translation(rig: Rig) -> None:
    held = rig.begin(0x1000)
    rig.map(0x1000, 0xB000 | LEAF)
    rig.submit((0x30, 0), SYNC)
    assert held.runs[0] == 0xA000
    assert rig.physical(0x1000) == 0xB000
    rig.smmu.retire(held)


def test_retiring_twice_is_harmless(rig: Rig) -> None:
    first, second = rig.begin(0x1000), rig.begin(0x1000)
    rig.submit((0x30, 0), SYNC)
    rig.smmu.retire(first)
    rig.smmu.retire(first)
    assert not rig.consumed
    rig.smmu.retire(second)
    assert rig.consumed


def test_cmdqen_is_acknowledged_as_cleared_when_the_waiting_sync_is_complete(rig: Rig) -> None:
    held = rig.begin(0x1000)
    rig.submit((0x30, 0), SYNC, SYNC)
    rig.write(hw.CR0, hw.SMMUEN)
    assert rig.read(hw.CR0ACK) == hw.SMMUEN | hw.CMDQEN
    # The queue's registers are still the SMMU's.
    rig.write(hw.CMDQ_CONS, 0x11)
    rig.write64(hw.CMDQ_BASE, 0)
    rig.write(hw.CR1, 0x3F)
    assert (rig.read(hw.CMDQ_CONS), rig.read(hw.CR1)) == (1, 0)
    rig.smmu.retire(held)
    assert (rig.read(hw.CR0ACK), rig.read(hw.CMDQ_CONS)) == (hw.SMMUEN, 2)
    rig.run()
    assert rig.read(hw.CMDQ_CONS) == 2
    rig.write(hw.CMDQ_CONS, 0x11)
    assert rig.read(hw.CMDQ_CONS) == 0x11


def test_the_barrier_waits_only_for_those_that_were_there() -> None:
    barrier = InFlight()
    done: list[str] = []
    assert barrier.when_done(lambda: done.append("nobody")) == 0
    a, b, c = object(), object(), object()
    barrier.add(a)
    barrier.add(b)
    assert barrier.when_done(lambda: done.append("a and b")) == 2
    barrier.retire(a)
    barrier.add(c)
    assert barrier.when_done(lambda: done.append("b and c")) == 2
    barrier.retire(b)
    assert done == ["nobody", "a and b"]
    barrier.retire(c)
    assert done == ["nobody", "a and b", "b and c"]
    assert len(barrier) == 0


def test_the_barrier_is_not_misled_by_reused_identities() -> None:
    barrier = InFlight()
    done: list[bool] = []
    held = object()
    barrier.add(held)
    barrier.when_done(lambda: done.append(True))
    for _ in range(1000):  # objects that come and go, as likely as not at the same place
        passing = object()
        barrier.add(passing)
        barrier.retire(passing)
        del passing
    assert not done
    barrier.retire(held)
    assert done


def test_waiters_may_wait_again() -> None:
    barrier = InFlight()
    order: list[int] = []
    first, second = object(), object()
    barrier.add(first)

    def again() -> None:
        order.append(1)
        barrier.add(second)
        barrier.when_done(lambda: order.append(2))

    barrier.when_done(again)
    barrier.retire(first)
    assert order == [1]
    barrier.retire(second)
    assert order == [1, 2]
