"""The event queue, global errors and interrupts (IHI 0070, 3.18, 7.2, 7.4, 7.5); records as raw bytes."""

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.smmu import TransactionAborted

OVERFLOW = 1 << 31


def overflowing(rig: Rig) -> bool:
    return bool((rig.read(hw.EVENTQ_PROD) ^ rig.read(hw.EVENTQ_CONS)) & OVERFLOW)


def cause(rig: Rig, address: int = 0x1000) -> None:
    """One F_TRANSLATION, consumed by nobody."""
    with pytest.raises(TransactionAborted):
        rig.go(address)


# Records: those of configuration and of the walk are in the tests of what causes them.


def test_records_carry_stream_substream_and_attributes() -> None:
    rig = Rig()
    table = rig.alloc(64 << 7, 64 << 7)
    rig.put(hw.STRTAB + 64 * 0xAB, hw.STE_S1 | table | 7 << 59)
    rig.put(table + 64 * 0x55, hw.CD_PLAIN, rig.low, rig.high)
    event = rig.fault(
        0x1234_5678_9ABC, stream=0xAB, substream=0x55, privileged=True, instruction=True
    )
    assert event == bytes.fromhex(
        "10580500ab000000"  # number, SSV, SubstreamID, StreamID
        "000000000e020000"  # PnU, InD, RnW, CLASS IN
        "bc9a785634120000"  # InputAddr
        "0000000000000000"
    )


def test_records_of_a_write_have_neither_rnw_nor_ind() -> None:
    assert Rig().fault(0xFFF, write=True, instruction=True) == bytes.fromhex(
        "10000000100000000000000000020000ff0f0000000000000000000000000000"
    )


@pytest.mark.parametrize("substream", [None, 0xF_FFFF])
def test_configuration_records_carry_no_attributes(substream: int | None) -> None:
    rig = Rig()
    rig.put(hw.STRTAB + 64 * hw.STREAM, 0)
    access = {"privileged": True, "write": True}
    if substream is None:
        assert rig.fault(0x5000, **access) == hw.record(0x04 | hw.STREAM << 32)
    else:
        assert rig.fault(0x5000, substream=substream, **access) == hw.record(
            0x04 | 1 << 11 | substream << 12 | hw.STREAM << 32
        )


def test_one_transaction_makes_one_record() -> None:
    rig = Rig()
    with pytest.raises(TransactionAborted) as aborted:
        rig.go(0x1000, 1 << 20)
    assert len(rig.events()) == 1
    assert aborted.value.address == 0x1000
    assert "F_TRANSLATION" in str(aborted.value)


# The ring


@pytest.mark.parametrize("log2size", [0, 1, 3])
def test_indices_wrap(log2size: int) -> None:
    rig = Rig(on=0)
    rig.event_log2 = log2size
    rig.write64(hw.EVENTQ_BASE, hw.EVENTS | log2size)
    rig.write(hw.CR0, 0xD)
    size = 1 << log2size
    for turn in range(1, 5 * size):
        assert rig.fault(turn << 12) == hw.translation_record(0x10, turn << 12)
        assert rig.read(hw.EVENTQ_PROD) == turn % (2 * size)


def test_records_are_appended_and_nothing_else_is_written() -> None:
    rig = Rig()
    for index in range(3):
        cause(rig, index << 12)
    begin = hw.EVENTS - hw.BASE
    queue = bytes(rig.ram[begin : begin + 0x1_0000])
    expected = b"".join(hw.translation_record(0x10, index << 12) for index in range(3))
    assert queue == expected.ljust(0x1_0000, b"\0")


def test_base_is_aligned_to_the_size_of_the_queue() -> None:
    rig = Rig(on=0)
    rig.write64(hw.EVENTQ_BASE, hw.EVENTS | 0x3E0 | 5)
    rig.write(hw.CR0, 0xD)
    assert hw.number(rig.fault(0x1000)) == 0x10


# Overflow (7.4)


def test_overflow() -> None:
    rig = Rig()
    for index in range(32):
        cause(rig, index << 12)
    assert rig.read(hw.EVENTQ_PROD) == 32  # full, nothing lost
    cause(rig)
    assert rig.read(hw.EVENTQ_PROD) == 32 | OVERFLOW
    cause(rig)  # lost too; the flag tells once
    assert rig.read(hw.EVENTQ_PROD) == 32 | OVERFLOW
    assert len(rig.events()) == 32
    # With space, but unacknowledged: records come again, a further loss would not be seen.
    assert overflowing(rig)
    for _ in range(33):
        cause(rig)
    assert rig.read(hw.EVENTQ_PROD) == OVERFLOW
    rig.write(hw.EVENTQ_CONS, OVERFLOW | 32)
    assert not overflowing(rig)
    cause(rig)  # full still: the next overflow toggles back
    assert rig.read(hw.EVENTQ_PROD) == 0
    assert overflowing(rig)
    assert len(rig.events()) == 32
    rig.write(hw.EVENTQ_CONS, rig.read(hw.EVENTQ_PROD))
    assert hw.number(rig.fault(0x7000)) == 0x10


def test_overflow_is_no_global_error() -> None:
    rig = Rig()
    for _ in range(40):
        cause(rig)
    assert rig.read(hw.GERROR) == 0


def test_a_disabled_queue_loses_records_without_overflow() -> None:
    rig = Rig(on=hw.SMMUEN)
    for _ in range(40):
        cause(rig)
    assert rig.read(hw.EVENTQ_PROD) == 0
    rig.write(hw.CR0, 0xD)
    assert rig.events() == []  # they do not come later either
    assert hw.number(rig.fault(0x1000)) == 0x10


# EVENTQ_ABT_ERR (7.2.1, 7.2.2)


def test_a_queue_out_of_memory_aborts_and_delivers_nothing_until_acknowledged() -> None:
    rig = Rig(on=0)
    rig.write64(hw.EVENTQ_BASE, 0x4000_0000 | 5)
    rig.write(hw.CR0, 0xD)
    cause(rig)
    assert (rig.read(hw.GERROR), rig.read(hw.EVENTQ_PROD)) == (1 << 2, 0)
    rig.write(hw.CR0, hw.SMMUEN)
    rig.write64(hw.EVENTQ_BASE, hw.EVENTS | 5)
    rig.write(hw.CR0, 0xD)
    cause(rig)
    assert rig.read(hw.EVENTQ_PROD) == 0  # not writable while the error is active
    rig.write(hw.GERRORN, 1 << 2)
    cause(rig)
    assert rig.read(hw.EVENTQ_PROD) == 1


def test_a_read_only_queue_aborts() -> None:
    rig = Rig()
    rig.memory.remove_region(hw.BASE, hw.RAM)
    rig.memory.add_region(hw.BASE, hw.RAM, memoryview(rig.ram), writable=False)
    cause(rig)
    assert (rig.read(hw.GERROR), rig.read(hw.EVENTQ_PROD)) == (1 << 2, 0)


# Interrupts


def test_event_interrupts_need_their_enable() -> None:
    rig = Rig()
    cause(rig)
    rig.write(hw.IRQ_CTRL, 1)
    cause(rig)
    assert rig.interrupts == 0
    # Enabled late: nothing comes for what happened before (6.3.16).
    rig.write(hw.IRQ_CTRL, 4)
    assert rig.interrupts == 0
    rig.events()
    cause(rig)
    assert rig.interrupts == 1


def test_lost_records_do_not_interrupt() -> None:
    rig = Rig()
    for _ in range(32):
        cause(rig)
    rig.write(hw.IRQ_CTRL, 4)
    cause(rig)
    assert rig.interrupts == 0


def test_records_are_there_when_the_interrupt_is() -> None:
    rig = Rig()
    rig.write(hw.IRQ_CTRL, 5)
    seen = []
    rig.smmu.interrupt = lambda: seen.append((rig.read(hw.EVENTQ_PROD), rig.read(hw.GERROR)))
    cause(rig)
    rig.submit((0xFF, 0))
    assert seen == [(1, 0), (1, 1)]


def test_error_interrupts_need_their_enable() -> None:
    rig = Rig()
    rig.write(hw.IRQ_CTRL, 4)
    rig.submit((0xFF, 0))
    rig.write(hw.IRQ_CTRL, 5)
    assert rig.interrupts == 0
    rig.put(hw.COMMANDS, 0xFE)
    rig.write(hw.GERRORN, 1)
    assert rig.interrupts == 1


def test_msis_take_the_place_of_the_wire() -> None:
    rig = Rig()
    flag = rig.alloc(8)
    for base, data, offset in ((hw.GERROR_IRQ_CFG0, 0x11, 0), (hw.EVENTQ_IRQ_CFG0, 0x22, 4)):
        rig.write64(base, flag + offset)
        rig.write(base + 8, data)
    rig.write(hw.IRQ_CTRL, 5)
    cause(rig)
    assert (rig.get(flag), rig.interrupts) == (0x22 << 32, 0)
    rig.submit((0xFF, 0))
    assert (rig.get(flag), rig.interrupts) == (0x22 << 32 | 0x11, 0)


def test_an_aborted_event_msi_is_a_global_error() -> None:
    rig = Rig()
    rig.write64(hw.EVENTQ_IRQ_CFG0, 0x4000_0000)
    rig.write(hw.IRQ_CTRL, 5)
    cause(rig)
    assert (rig.read(hw.GERROR), rig.interrupts) == (1 << 5, 1)
    assert len(rig.events()) == 1  # the record is in the queue all the same


def test_an_aborted_error_msi_is_told_by_no_other_interrupt() -> None:
    rig = Rig()
    rig.write64(hw.GERROR_IRQ_CFG0, 0x4000_0000)
    rig.write(hw.IRQ_CTRL, 1)
    for turn in (1, 0, 1):
        rig.submit((0xFF, 0))
        # Both toggle, and toggle again after an acknowledgement.
        assert rig.read(hw.GERROR) == (0x81 if turn else 0)
        rig.put(hw.COMMANDS + 16 * (rig.read(hw.CMDQ_CONS) & 31), 0x46)
        rig.write(hw.GERRORN, rig.read(hw.GERROR))
    assert rig.interrupts == 0


def test_an_aborted_error_msi_is_tried_once() -> None:
    rig = Rig()
    rig.write64(hw.GERROR_IRQ_CFG0, 0x4000_0000)
    rig.write(hw.IRQ_CTRL, 1)
    stores = []
    store = rig.memory.store_u32

    def count(address: int, value: int) -> None:
        stores.append(address)
        store(address, value)

    rig.memory.store_u32 = count  # type: ignore[method-assign]
    rig.submit((0xFF, 0))
    assert stores == [0x4000_0000]


def test_everything_wrong_at_once_ends() -> None:
    rig = Rig(on=0)
    for base in (hw.GERROR_IRQ_CFG0, hw.EVENTQ_IRQ_CFG0):
        rig.write64(base, 0x4000_0000)
    rig.write(hw.IRQ_CTRL, 5)
    rig.write(hw.CR0, 0xD)
    cause(rig)
    rig.submit((0x46 | 1 << 12, 0x4000_0000), (0xFF, 0))
    assert rig.read(hw.GERROR) == 0xB1
