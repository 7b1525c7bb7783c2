"""The command queue: order, wrap, errors and their repair, CMD_SYNC's completion, prefetch (IHI 0070, 3.5, 4, 7.1)."""

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.smmu.command_queue import COMMANDS_PER_STEP
from viommu.smmu.events import CommandConsumed
from viommu.smmu.points import CommandFetched
from viommu.trace import Event, Skip, Tracer

SYNC = (0x46, 0)
LEAF = hw.PLAIN | hw.PAGE
ILL, ABT = 1 << 24, 2 << 24


def msi(address: int, data: int) -> tuple[int, int]:
    """CMD_SYNC with SIG_IRQ."""
    return 0x46 | 1 << 12 | data << 32, address


# The ring


@pytest.mark.parametrize("log2size", [0, 1, 3, 5])
def test_indices_wrap(log2size: int) -> None:
    rig = Rig(on=0)
    rig.command_log2 = log2size
    rig.write64(hw.CMDQ_BASE, hw.COMMANDS | log2size)
    rig.write(hw.CR0, hw.CMDQEN)
    flag = rig.alloc(8)
    size = 1 << log2size
    for turn in range(1, 5 * size):
        rig.submit(msi(flag, turn))
        assert rig.get(flag) == turn
        assert rig.read(hw.CMDQ_CONS) == rig.read(hw.CMDQ_PROD) == turn % (2 * size)


def test_a_full_queue_is_not_an_empty_one() -> None:
    rig = Rig(on=0)
    flag = rig.alloc(8)
    for index in range(32):
        rig.put(hw.COMMANDS + 16 * index, *msi(flag + 4 * (index & 1), index + 1))
    rig.write(hw.CMDQ_PROD, 32)  # index 0, the wrap bit set
    rig.write(hw.CR0, hw.CMDQEN)
    rig.run()
    assert rig.get(flag) == 32 << 32 | 31
    assert rig.read(hw.CMDQ_CONS) == 32


def test_indices_start_where_software_says() -> None:
    rig = Rig(on=0)
    flag = rig.alloc(8)
    rig.write(hw.CMDQ_CONS, 31)
    rig.write(hw.CMDQ_PROD, 33)
    rig.put(hw.COMMANDS + 16 * 31, *msi(flag, 0x51))
    rig.put(hw.COMMANDS, *msi(flag + 4, 0x52))
    rig.write(hw.CR0, hw.CMDQEN)
    rig.run()
    assert rig.get(flag) == 0x52 << 32 | 0x51
    assert rig.read(hw.CMDQ_CONS) == 33


def test_the_base_is_aligned_to_the_size_of_the_queue_or_32_bytes() -> None:
    rig = Rig(on=0)
    flag = rig.alloc(8)
    rig.write64(hw.CMDQ_BASE, hw.COMMANDS | 0x1E0 | 5)
    rig.put(hw.COMMANDS, *msi(flag, 1))
    rig.write(hw.CMDQ_PROD, 1)
    rig.write(hw.CR0, hw.CMDQEN)
    assert rig.get(flag) == 1
    rig = Rig(on=0)
    rig.write64(hw.CMDQ_BASE, hw.COMMANDS | 0x20)  # one command
    rig.put(hw.COMMANDS + 0x20, *msi(flag, 2))
    rig.write(hw.CMDQ_PROD, 1)
    rig.write(hw.CR0, hw.CMDQEN)
    assert rig.get(flag) == 2


def test_log2size_is_capped() -> None:
    rig = Rig(on=0)
    rig.write64(hw.CMDQ_BASE, hw.COMMANDS | 31)
    assert rig.read64(hw.CMDQ_BASE) == hw.COMMANDS | 31
    rig.write(hw.CMDQ_CONS, 0xF_FFFF)
    assert rig.read(hw.CMDQ_CONS) == 0x3FFF  # 2^13 entries and the wrap bit


def test_nothing_is_consumed_while_disabled() -> None:
    rig = Rig(on=hw.SMMUEN)
    rig.submit(SYNC)
    assert rig.read(hw.CMDQ_CONS) == 0
    rig.write(hw.CR0, hw.SMMUEN | hw.CMDQEN)
    rig.run()
    assert rig.read(hw.CMDQ_CONS) == 1


def test_a_step_leaves_time_for_others() -> None:
    rig = Rig(on=0)
    rig.command_log2 = 10
    rig.write64(hw.CMDQ_BASE, hw.COMMANDS | 10)
    rig.write(hw.CR0, hw.CMDQEN)
    for index in range(1000):
        rig.put(hw.COMMANDS + 16 * index, 0x30)
    rig.write(hw.CMDQ_PROD, 1000)
    done = rig.read(hw.CMDQ_CONS)
    assert done == COMMANDS_PER_STEP
    assert rig.smmu.busy
    assert rig.smmu.step()
    assert rig.read(hw.CMDQ_CONS) == 2 * COMMANDS_PER_STEP
    rig.run()
    assert (rig.read(hw.CMDQ_CONS), rig.smmu.busy) == (1000, False)


# Errors


def test_an_illegal_command_stops_the_queue_until_it_is_repaired_and_acknowledged() -> None:
    rig = Rig()
    flag = rig.alloc(8)
    rig.submit(SYNC, (0xFF, 0), msi(flag, 1), msi(flag, 2))
    # CONS stays at the command; what follows has no effect.
    assert rig.read(hw.CMDQ_CONS) == ILL | 1
    assert (rig.read(hw.GERROR), rig.read(hw.GERRORN), rig.get(flag)) == (1, 0, 0)
    rig.submit()
    rig.write(hw.CR0, hw.SMMUEN | hw.EVENTQEN)  # disabling acknowledges nothing
    rig.write(hw.CR0, 0xD)
    assert rig.read(hw.CMDQ_CONS) == ILL | 1
    # As Linux does it: a CMD_SYNC in the place of the bad command, then the acknowledgement.
    rig.put(hw.COMMANDS + 16, *SYNC)
    rig.write(hw.GERRORN, 1)
    assert rig.read(hw.CMDQ_CONS) & 0xF_FFFF == 4
    assert (rig.get(flag), rig.read(hw.GERROR)) == (2, 1)
    # The next error toggles the bit back.
    rig.submit((0xFE, 0))
    assert (rig.read(hw.GERROR), rig.read(hw.GERRORN)) == (0, 1)
    assert rig.read(hw.CMDQ_CONS) == ILL | 4
    rig.put(hw.COMMANDS + 16 * 4, *SYNC)
    rig.write(hw.GERRORN, 0)
    assert rig.consumed


def test_an_acknowledged_but_unrepaired_command_fails_again() -> None:
    rig = Rig()
    rig.submit((0xFF, 0))
    rig.write(hw.GERRORN, 1)
    assert (rig.read(hw.GERROR), rig.read(hw.CMDQ_CONS)) == (0, ILL)


def test_prod_may_move_back_to_the_bad_command() -> None:
    rig = Rig()
    rig.submit(SYNC, (0xFF, 0), (0xFE, 0))
    rig.write(hw.CMDQ_PROD, 1)
    rig.write(hw.GERRORN, 1)
    rig.run()
    assert (rig.read(hw.GERROR), rig.consumed) == (1, True)


def test_acknowledging_something_else_does_not_resume() -> None:
    rig = Rig()
    rig.submit((0xFF, 0), SYNC)
    rig.put(hw.COMMANDS, *SYNC)
    rig.write(hw.GERRORN, 1 << 2)
    assert rig.read(hw.CMDQ_CONS) == ILL
    rig.write(hw.GERRORN, 1)
    assert rig.consumed


def test_a_queue_out_of_memory_is_cerror_abt() -> None:
    rig = Rig(on=0)
    rig.write64(hw.CMDQ_BASE, 0x4000_0000 | 5)
    rig.write(hw.CR0, hw.CMDQEN)
    rig.write(hw.CMDQ_PROD, 3)
    assert (rig.read(hw.CMDQ_CONS), rig.read(hw.GERROR)) == (ABT, 1)
    rig.write(hw.CR0, 0)
    rig.write64(hw.CMDQ_BASE, hw.COMMANDS | 5)
    for index in range(3):
        rig.put(hw.COMMANDS + 16 * index, *SYNC)
    rig.write(hw.CR0, hw.CMDQEN)
    assert rig.read(hw.CMDQ_CONS) == ABT
    rig.write(hw.GERRORN, 1)
    assert rig.read(hw.CMDQ_CONS) & 0xF_FFFF == 3


def test_earlier_commands_have_their_effect() -> None:
    rig = Rig()
    entry = rig.map(0x1000, 0xA000 | LEAF)
    rig.physical(0x1000)
    rig.put(entry, 0)
    rig.submit((0x30, 0), (0xFF, 0))
    assert hw.number(rig.fault(0x1000)) == 0x10


@pytest.mark.parametrize(
    "command",
    [(opcode | 1 << 10, 0) for opcode in (1, 2, 3, 4, 5, 6)] + [(0x46 | 3 << 12, 0)],
    ids=["PREFETCH_CONFIG", "PREFETCH_ADDR", "STE", "STE_RANGE", "CD", "CD_ALL", "SYNC, CS 3"],
)
def test_invalid_parameters_are_illegal(command: tuple[int, int]) -> None:
    """SSec on the non-secure queue (4.1.6), the reserved signal of CMD_SYNC (4.7.3)."""
    rig = Rig()
    rig.submit(command)
    assert (rig.read(hw.CMDQ_CONS), rig.read(hw.GERROR)) == (ILL, 1)


# CMD_SYNC


@pytest.mark.parametrize("signal", [0, 2])
def test_sync_without_a_signal(signal: int) -> None:
    rig = Rig()
    flag = rig.alloc(8)
    rig.submit((0x46 | signal << 12 | 0x77 << 32, flag))
    assert (rig.consumed, rig.get(flag), rig.interrupts) == (True, 0, 0)


def test_sync_with_an_msi() -> None:
    rig = Rig()
    flag = rig.alloc(16)
    rig.put(flag, hw.word(-1), hw.word(-1))
    # MSH and MSIAttr are attributes, bits 1:0 of the address are not part of it.
    rig.submit((0x46 | 1 << 12 | 3 << 22 | 15 << 24 | 0x8000_0001 << 32, flag + 4 | 3))
    assert rig.get(flag) == 0x8000_0001_FFFF_FFFF
    assert (rig.get(flag + 8), rig.interrupts) == (hw.word(-1), 0)


def test_sync_with_the_wired_interrupt() -> None:
    rig = Rig()
    rig.submit(msi(0, 1))
    assert (rig.interrupts, rig.consumed) == (1, True)


def test_sync_with_an_aborted_msi_is_complete_and_reported() -> None:
    rig = Rig()
    rig.write(hw.IRQ_CTRL, 1)
    rig.submit(msi(0x4000_0000, 1), SYNC)
    assert (rig.consumed, rig.read(hw.GERROR), rig.interrupts) == (True, 1 << 4, 1)
    rig.submit(msi(0x4000_0000, 1))  # active already
    assert (rig.read(hw.GERROR), rig.interrupts) == (1 << 4, 1)
    rig.write(hw.GERRORN, 1 << 4)
    rig.submit(msi(0x4000_0000, 1))
    assert (rig.read(hw.GERROR), rig.interrupts) == (0, 2)


def test_an_msi_address_is_truncated_to_the_output_size() -> None:
    rig = Rig()
    flag = rig.alloc(8)
    rig.submit(msi(0xF << 48 | flag, 5))
    assert rig.get(flag) == 5
    rig.submit(msi(0xF << 48, 5))  # not zero as written: no wired interrupt, an MSI to address 0
    assert (rig.interrupts, rig.read(hw.GERROR)) == (0, 1 << 4)


def test_sync_is_seen_as_consumed_when_its_signal_is() -> None:
    rig = Rig()
    seen = []
    rig.smmu.interrupt = lambda: seen.append(rig.read(hw.CMDQ_CONS))
    rig.submit(SYNC, msi(0, 0), SYNC)
    assert seen == [2]


def test_syncs_complete_in_order() -> None:
    rig = Rig()
    flag = rig.alloc(8)
    rig.submit(msi(flag, 1), msi(flag, 2), msi(flag, 3))
    assert rig.get(flag) == 3


# Prefetch


def test_prefetch_config_fills_the_configuration_caches() -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | LEAF)
    rig.submit((0x01 | hw.STREAM << 32, 0), SYNC)
    rig.put(hw.STRTAB + 64 * hw.STREAM, 0)
    rig.put(rig.cd_address, 0)
    assert rig.physical(0x1000) == 0xA000


def test_prefetch_addr_fills_the_tlb() -> None:
    rig = Rig()
    entry = rig.map(0x1000, 0xA000 | LEAF)
    rig.submit((0x02 | hw.STREAM << 32, 0x1000), SYNC)
    rig.put(entry, 0)
    assert rig.physical(0x1000) == 0xA000
    assert len(rig.smmu.in_flight) == 0


@pytest.mark.parametrize(
    "command",
    [
        (0x01 | 0x100 << 32, 0),  # beyond the stream table
        (0x01 | 0xFFFF_FFFF << 32, 0),
        (0x01 | 0x11 << 32, 0),  # an invalid STE
        (0x01 | 1 << 11 | 5 << 12 | hw.STREAM << 32, 0),  # no substreams
        (0x02 | hw.STREAM << 32, 0x1000),  # not mapped
        (0x02 | hw.STREAM << 32, 1 << 60),  # out of range
        (0x02 | hw.STREAM << 32, hw.word(-1)),
        (0x02 | 0x12 << 32, hw.word(-1)),
    ],
)
def test_a_prefetch_that_fails_is_silent(command: tuple[int, int]) -> None:
    rig = Rig()
    rig.put(hw.STRTAB + 64 * 0x12, hw.STE_BYPASS)
    rig.submit(command, SYNC)
    assert (rig.consumed, rig.events(), rig.read(hw.GERROR)) == (True, [], 0)


def test_prefetch_does_nothing_while_the_smmu_is_disabled() -> None:
    rig = Rig(on=hw.CMDQEN)
    rig.map(0x1000, 0xA000 | LEAF)
    rig.submit((0x02 | hw.STREAM << 32, 0x1000), SYNC)
    assert (rig.consumed, len(rig.smmu.configuration), len(rig.smmu.tlb)) == (True, 0, 0)


def test_a_command_that_is_none_can_be_passed_over() -> None:
    """By who meddles, while somebody reads along."""
    tracer = Tracer()
    seen: list[Event] = []
    tracer.subscribe(seen.append)
    rig = Rig(tracer=tracer)
    tracer.meddler = lambda point: Skip() if isinstance(point, CommandFetched) else None
    rig.submit((0xFF, 0))
    assert [event.opcode for event in seen if isinstance(event, CommandConsumed)] == ["0xff"]
