"""Transactions that wait for software: records, STAGs, answers (IHI 0070, 3.12.2, 4.7, 5.5, 7.2.1)."""

from contextlib import suppress
from itertools import product

import pytest

from tests import smmu_rig as hw
from tests.stages_rig import (
    CLASS_TT,
    MEV,
    PS_48,
    RNW,
    S1STALLD,
    S2_FAULT,
    S2_PLAIN,
    S2R,
    S2S,
    STREAM,
    SYNC,
    Stages,
    Table,
    everything_but,
)
from viommu.smmu import Access, TransactionAborted, TransactionStalled

OUT = 0x5A_8000_0000
LEAF = hw.PLAIN | hw.PAGE
STALLED = 1 << 31
RETRY, ABORT = 1 << 12, 1 << 13


def rig_with_stage_1(cd: int = hw.STALL, **features: object) -> tuple[Stages, Table]:
    rig = Stages(everything_but(**features))
    table = Table(rig, 12, 48)
    rig.stage_1_only(table, cd=cd)
    return rig, table


def resume(stag: int, action: int, stream: int = STREAM) -> tuple[int, int]:
    return 0x44 | action | stream << 32, stag


def stall_term(stream: int = STREAM) -> tuple[int, int]:
    return 0x45 | stream << 32, 0


def stalled_record(event: int, address: int, stag: int, second: int = RNW | hw.CLASS_IN) -> bytes:
    return hw.record(event | STREAM << 32, stag | STALLED | second, address)


def stag_of(record: bytes) -> int:
    assert record[11] & 0x80
    return int.from_bytes(record[8:10], "little")


# Who stalls


def test_each_of_the_four_faults_stalls_and_tells_its_stag() -> None:
    rig, table = rig_with_stage_1()
    table.map(0x20_0000, 1 << 47 | hw.TABLE, level=2)
    rig.stage_1_only(table, cd=hw.STALL, ips=2)
    table.map(0x1000, OUT & (1 << 40) - 1 | LEAF & ~hw.AF)
    table.map(0x2000, OUT & (1 << 40) - 1 | LEAF | hw.READ_ONLY)
    for stag, (event, address, write) in enumerate(
        ((0x10, 0x3000, False), (0x11, 0x20_0000, False), (0x12, 0x1000, False), (0x13, 0x2000, True))
    ):  # fmt: skip
        stalled = rig.stall(address, write=write)
        assert (stalled.stag, stalled.resolution) == (stag, None)
        second = hw.CLASS_IN | (0 if write else RNW)
        assert rig.events() == [stalled_record(event, address, stag, second)]
    assert len(rig.smmu.stalls) == 4
    assert len(rig.smmu.in_flight) == 0


def test_no_other_fault_stalls() -> None:
    rig, table = rig_with_stage_1()
    table.map(0x20_0000, 0x7000_0000 | hw.TABLE, level=2)
    assert hw.number(rig.fault(0x20_0000)) == 0x0B
    rig.put(rig.cd_address, 0)
    rig.forget()
    assert rig.fault(0) == hw.configuration_record(0x0A)
    assert len(rig.smmu.stalls) == 0


def test_a_stall_is_recorded_whatever_r_says() -> None:
    rig, table = rig_with_stage_1()
    rig.put(rig.cd_address, (rig.cd_word(table) | hw.STALL) & ~hw.RECORD)
    rig.forget()
    stalled = rig.stall(0x1000)
    assert rig.events() == [stalled_record(0x10, 0x1000, stalled.stag or 0)]
    second = Table(rig, 12, 40)
    rig.stage_2_only(second, PS_48 | S2S)
    stalled = rig.stall(0x1000)
    first, word, address, ipa = hw.words(rig.events()[0])
    assert (first, address, ipa) == (0x10 | STREAM << 32, 0x1000, 0x1000)
    assert word == STALLED | (stalled.stag or 0) | RNW | hw.CLASS_IN | S2_FAULT


@pytest.mark.parametrize(("s1", "s2"), list(product((0, 1), repeat=2)))
def test_the_stage_of_the_fault_says_whether_it_stalls(s1: int, s2: int) -> None:
    rig = Stages()
    first, second = Table(rig, 12, 39, offset=rig.OFFSET), Table(rig, 12, 40)
    rig.nested(first, second, cd=s1 * hw.STALL, bits=S2R | PS_48 | s2 * S2S)
    first.map(0x1000, 0x12_3400_0000 | LEAF)
    first.map(0x20_0000, 0x12_3400_0000 | hw.TABLE, level=2)
    for address, stalls, class_ in (
        (0x3000, s1, hw.CLASS_IN),
        (0x1000, s2, hw.CLASS_IN | S2_FAULT),
        (0x20_0000, s2, CLASS_TT | S2_FAULT),
    ):
        if stalls:
            rig.stall(address)
            (record,) = rig.events()
            assert record[11] & 0x80
        else:
            found = rig.fault(address)
            assert found is not None
            record = found
        word = int.from_bytes(record[8:16], "little")
        assert word & ~(STALLED | 0xFFFF) == RNW | class_
    # Of a CD fetch too.
    rig.ste(hw.STE_NESTED | 1 << 34, 0, *rig.stage_2_words(second, S2R | PS_48 | s2 * S2S))
    if s2:
        assert rig.stall(0x5000).stag is not None
    else:
        assert hw.number(rig.fault(0x5000)) == 0x10


@pytest.mark.parametrize("model", ["both", "terminate", "stall"])
@pytest.mark.parametrize(("s", "stalld"), list(product((0, 1), repeat=2)))
def test_what_the_stall_model_does_not_allow_is_illegal(model: str, s: int, stalld: int) -> None:
    rig = Stages(everything_but(stall_model=model))
    assert rig.read(hw.IDR0) >> 24 & 3 == {"both": 0, "terminate": 1, "stall": 2}[model]
    assert rig.read(hw.IDR5) >> 16 == (0 if model == "terminate" else 64)
    table = Table(rig, 12, 48)
    table.map(0x1000, OUT | LEAF)
    rig.stage_1_only(table, cd=s * hw.STALL, second=stalld * S1STALLD)
    if stalld and model != "both":
        assert rig.fault(0x1000) == hw.configuration_record(0x04)
    elif (s, model) in ((0, "stall"), (1, "terminate")) or (s and stalld):
        assert rig.fault(0x1000) == hw.configuration_record(0x0A)
    else:
        assert rig.physical(0x1000) == OUT
    second = Table(rig, 12, 40)
    second.map(0, S2_PLAIN | hw.PAGE)
    rig.stage_2_only(second, S2R | PS_48 | s * S2S, second=stalld * S1STALLD)
    if (s, model) in ((0, "stall"), (1, "terminate")):
        assert rig.fault(0) == hw.configuration_record(0x04)
    else:
        assert rig.physical(0) == 0


@pytest.mark.parametrize("model", ["both", "terminate", "stall"])
def test_the_commands_are_there_where_something_can_stall(model: str) -> None:
    for command in (resume(0, RETRY), stall_term()):
        rig = Stages(everything_but(stall_model=model))
        rig.submit(command)
        assert rig.consumed == (model != "terminate")
        if model == "terminate":
            assert rig.read(hw.CMDQ_CONS) >> 24 == 1
        rig = Stages(everything_but(stall_model=model))
        rig.submit((command[0] | 1 << 10, command[1]))  # SSec
        assert rig.read(hw.CMDQ_CONS) >> 24 == 1


# Answers


def test_retry_takes_up_what_software_has_mended() -> None:
    rig, table = rig_with_stage_1()
    stalled = rig.stall(0x1000)
    table.map(0x1000, OUT | LEAF)
    rig.submit(resume(stalled.stag or 0, RETRY | ABORT))
    assert stalled.resolution == "retry"
    assert len(rig.smmu.stalls) == 0
    assert rig.physical(0x1000) == OUT
    # Retried without being mended, it is a new transaction, with a new record.
    stalled = rig.stall(0x2000)
    rig.submit(resume(stalled.stag or 0, RETRY))
    rig.events()
    again = rig.stall(0x2000)
    assert rig.events() == [stalled_record(0x10, 0x2000, again.stag or 0)]


@pytest.mark.parametrize("action", [0, ABORT])
def test_to_terminate_is_to_abort(action: int) -> None:
    rig, _ = rig_with_stage_1()
    stalled = rig.stall(0x1000)
    rig.submit(resume(stalled.stag or 0, action))
    assert stalled.resolution == "abort"
    assert len(rig.smmu.stalls) == 0


def test_only_the_right_stream_and_stag_are_answered() -> None:
    rig, _ = rig_with_stage_1()
    other = STREAM + 1
    rig.ste(hw.STE_S1 | rig.cd_address, stream=other)
    mine = rig.stall(0x1000)
    try:
        rig.begin(0x1000, access=Access(other))
    except TransactionStalled as held:
        theirs = held.stalled
    assert mine.stag != theirs.stag
    stag, their_stag = mine.stag or 0, theirs.stag or 0
    for wrong in (
        resume(their_stag, ABORT),
        resume(stag, ABORT, other),
        resume(stag + 100, ABORT),
        resume(stag, ABORT, STREAM | 1 << 31),
        stall_term(STREAM + 2),
    ):
        rig.submit(wrong)
    assert rig.consumed
    assert (mine.resolution, theirs.resolution) == (None, None)
    rig.submit(resume(stag, RETRY))
    assert (mine.resolution, theirs.resolution) == ("retry", None)
    rig.submit(resume(stag, ABORT))  # it waits no longer
    assert mine.resolution == "retry"
    rig.submit(stall_term(other))
    assert theirs.resolution == "abort"


def test_stall_term_takes_all_of_a_stream() -> None:
    rig, _ = rig_with_stage_1()
    rig.ste(hw.STE_S1 | rig.cd_address, stream=STREAM + 1)
    mine = [rig.stall(page << 12) for page in range(5)]
    try:
        rig.begin(0, access=Access(STREAM + 1))
    except TransactionStalled as held:
        theirs = held.stalled
    rig.submit(stall_term())
    assert [stalled.resolution for stalled in mine] == ["abort"] * 5
    assert theirs.resolution is None
    assert [s.stag for s in rig.smmu.stalls] == [theirs.stag]


def test_a_stag_is_not_used_again_while_its_transaction_waits() -> None:
    rig, _ = rig_with_stage_1(stall_max=3)
    waiting = rig.stall(0)
    seen = set()
    for _ in range(0x1_0002):
        record = rig.smmu.stalls.add(Access(STREAM), 0, waiting.record)
        assert record.stag != waiting.stag or waiting.stag is None
        seen.add(record.stag)
        rig.smmu.stalls.resume(STREAM, record.stag or 0, "abort")
    assert len(seen) == 0xFFFF
    assert waiting.resolution is None


def test_clearing_smmuen_aborts_all_and_frees_the_stags() -> None:
    rig, _ = rig_with_stage_1(stall_max=2)
    stalls = [rig.stall(page << 12) for page in range(4)]
    assert [s.stag for s in stalls] == [0, 1, None, None]
    rig.write(hw.CR0, 0xC)
    assert rig.read(hw.CR0ACK) == 0xC
    assert [s.resolution for s in stalls] == ["abort"] * 4
    assert len(rig.smmu.stalls) == 0
    rig.submit(resume(0, RETRY), stall_term())
    assert rig.consumed
    rig.write(hw.CR0, 0xD)
    rig.stall(0)
    assert len(rig.smmu.stalls) == 1
    rig.smmu.reset()
    assert len(rig.smmu.stalls) == 0


# Room: STALL_MAX and the event queue


def test_no_more_than_stall_max_are_stalled_and_the_others_come_later() -> None:
    rig, _ = rig_with_stage_1(stall_max=2)
    assert rig.read(hw.IDR5) >> 16 == 2
    first, second, third, fourth = (rig.stall(page << 12) for page in range(4))
    assert len(rig.events()) == 2
    assert (third.stag, fourth.stag) == (None, None)
    assert [s.resolution for s in (second, third, fourth)] == [None] * 3
    rig.submit(resume(first.stag or 0, ABORT))
    assert [s.resolution for s in (second, third, fourth)] == [None, "retry", "retry"]
    third, fourth = rig.stall(0x2000), rig.stall(0x3000)
    (record,) = rig.events()
    assert stag_of(record) == third.stag
    assert fourth.stag is None
    rig.submit(stall_term())
    assert [s.resolution for s in (second, third, fourth)] == ["abort"] * 3


def fill(rig: Stages) -> None:
    """Fill the event queue with 32 other records."""
    while (rig.read(hw.EVENTQ_PROD) ^ rig.read(hw.EVENTQ_CONS)) & 0x3F != 0x20:
        with suppress(TransactionAborted):
            rig.begin(0, access=Access(STREAM + 1))


def test_no_stall_is_lost_when_the_queue_is_full() -> None:
    rig, table = rig_with_stage_1()
    fill(rig)
    overflow = rig.read(hw.EVENTQ_PROD) & 1 << 31
    stalls = [rig.stall(page << 12) for page in range(3)]
    assert [s.stag for s in stalls] == [None] * 3
    # Nothing was discarded, so this is no overflow (7.4).
    assert rig.read(hw.EVENTQ_PROD) & 1 << 31 == overflow
    assert rig.read(hw.GERROR) == 0
    rig.submit((0x30, 0), SYNC)
    assert rig.consumed
    assert [s.resolution for s in stalls] == [None] * 3
    assert len(rig.events()) == 32  # and EVENTQ_CONS moves
    assert [s.resolution for s in stalls] == ["retry"] * 3
    # Tried again, one goes through, one meets a configuration that aborts it, one stalls.
    table.map(0x0000, OUT | LEAF)
    assert rig.physical(0) == OUT
    again = rig.stall(0x1000)
    assert rig.events() == [stalled_record(0x10, 0x1000, again.stag or 0)]
    rig.ste(0x1)
    assert rig.fault(0x2000) is None


@pytest.mark.parametrize("how", ["EVENTQEN", "EVENTQ_ABT_ERR"])
def test_a_queue_that_is_not_writable_for_other_reasons_holds_stalls_back_too(how: str) -> None:
    rig, _ = rig_with_stage_1()
    if how == "EVENTQEN":
        rig.write(hw.CR0, 0x9)
        held = rig.stall(0x1000)
        assert (held.stag, held.resolution) == (None, None)
        rig.write(hw.CR0, 0xD)
    else:
        rig.write(hw.CR0, 0x9)
        rig.write64(hw.EVENTQ_BASE, 0x7000_0000 | 5)
        rig.write(hw.CR0, 0xD)
        lost = rig.stall(0x2000)  # the record goes nowhere, and the transaction waits
        assert (lost.stag, rig.read(hw.GERROR)) == (0, 1 << 2)
        held = rig.stall(0x1000)
        assert (held.stag, held.resolution) == (None, None)
        rig.write(hw.GERRORN, 1 << 2)
        assert lost.resolution is None
        rig.submit(stall_term())
        assert lost.resolution == "abort"
    assert held.resolution == "retry"


def test_held_back_transactions_are_terminated_as_the_others_are() -> None:
    rig, _ = rig_with_stage_1()
    fill(rig)
    rig.ste(hw.STE_S1 | rig.cd_address, stream=STREAM + 2)
    held = rig.stall(0)
    try:
        rig.begin(0, access=Access(STREAM + 2))
    except TransactionStalled as stalled:
        other = stalled.stalled
    rig.submit(stall_term())
    assert (held.resolution, other.resolution) == ("abort", None)
    rig.write(hw.CR0, 0xC)
    assert other.resolution == "abort"
    assert held.resolution == "abort"


# What waits for what


@pytest.mark.parametrize("command", [(0x30, 0), (0x04, 31), (0x12 | hw.ASID << 48, 0x1000)])
def test_sync_does_not_wait_for_what_is_stalled(command: tuple[int, int]) -> None:
    rig, _ = rig_with_stage_1()
    stalled = rig.stall(0x1000)
    rig.submit(command, SYNC)
    assert rig.consumed
    assert stalled.resolution is None
    rig.submit(SYNC)
    assert rig.consumed


def test_sync_waits_for_a_transaction_that_was_retried_and_is_under_way() -> None:
    rig, table = rig_with_stage_1()
    stalled = rig.stall(0x1000)
    table.map(0x1000, OUT | LEAF)
    rig.submit(resume(stalled.stag or 0, RETRY), SYNC)
    assert rig.read(hw.CMDQ_CONS) == rig.read(hw.CMDQ_PROD)  # it has not begun again yet
    again = rig.begin(0x1000)
    rig.submit((0x30, 0), SYNC)
    assert not rig.consumed
    rig.smmu.retire(again)
    assert rig.consumed


def test_a_stall_does_not_hold_others_of_its_stream() -> None:
    rig, table = rig_with_stage_1()
    table.map(0x2000, OUT | LEAF)
    rig.stall(0x1000)
    assert rig.physical(0x2000) == OUT
    # A range goes as far as it can: the fault is of the transaction that begins with it.
    assert rig.go(0x2000, 0x2000) == [(OUT, 0x1000)]
    assert len(rig.smmu.stalls) == 1


def test_stalls_are_never_merged() -> None:
    rig, table = rig_with_stage_1()
    rig.stage_1_only(table, cd=hw.STALL, second=MEV)
    stags = {rig.stall(0x1000).stag for _ in range(4)}
    assert len(stags) == 4
    assert {stag_of(record) for record in rig.events()} == stags


# Merging of those that terminate (7.3.1)


def refused(rig: Stages, address: int, *, write: bool = False) -> None:
    with pytest.raises(TransactionAborted):
        rig.go(address, 1, write=write)


def test_mev_lets_records_of_one_page_be_one() -> None:
    for mev in (0, MEV):
        rig, table = rig_with_stage_1(0)
        rig.stage_1_only(table, second=mev)

        for address in (0x1000, 0x1008, 0x1FFF):
            refused(rig, address)
        events = rig.events()
        assert len(events) == (1 if mev else 3)
        assert events[0] == hw.translation_record(0x10, 0x1000)
        # Once it is read, the next is a new one; as is another page, another access, another stream.
        refused(rig, 0x1000)
        refused(rig, 0x2000)
        refused(rig, 0x2000, write=True)
        refused(rig, 0x2000)
        assert len(rig.events()) == 4
        # A record that was lost stands for nothing.
        rig.write(hw.CR0, 0x9)
        refused(rig, 0x3000)
        rig.write(hw.CR0, 0xD)
        refused(rig, 0x3000)
        assert len(rig.events()) == 1


def test_who_was_held_back_and_has_gone_is_not_kept() -> None:
    """A function that is reset gives its transactions up, as often as a guest likes."""
    rig, _ = rig_with_stage_1()
    rig.write(hw.CR0, hw.SMMUEN | hw.CMDQEN)  # nothing can be recorded
    for number in range(100):
        with suppress(TransactionStalled):
            rig.go(number << 12, 8)
    with pytest.raises(TransactionStalled) as kept:
        rig.go(0x7000, 8)
    (held,) = rig.smmu.stalls.held
    assert held.address == 0x7000
    rig.submit((0x46, 0))
    rig.write(hw.CR0, hw.SMMUEN | hw.CMDQEN | hw.EVENTQEN)
    assert kept.value.stalled.resolution == "retry"
    assert rig.smmu.stalls.held == ()
