"""What each action does at the points of the SMMU, as its driver and its devices see it."""

from typing import Any

import pytest

from tests.driver_rig import DATA, PAGE, STREAM
from tests.faults_rig import IOVA, Lab, shows
from viommu.driver.errors import CommandQueueError, DriverTimeout
from viommu.layouts.commands import Opcode, TlbiCommand
from viommu.layouts.records import EventRecord, EventType
from viommu.layouts.registers import Register
from viommu.layouts.tables import SteConfig, StreamTableEntry
from viommu.smmu import Access, TransactionAborted

EVENTS_OF_TRANSACTIONS = [
    event
    for event in EventType
    if event not in (EventType.E_PAGE_REQUEST, EventType.F_BAD_ATS_TREQ)
]


def rule(at: str, do: Any, **when: Any) -> dict[str, object]:
    return {"at": at, "when": when, "do": do}


def events(lab: Lab) -> list[str]:
    return [record.event.name for record in lab.rig.driver.events()]


def first(lab: Lab, page: int = 0) -> int:
    """The physical address that a page of the domain goes to."""
    return lab.rig.dma(IOVA + page * PAGE)[0][0]


# Transactions


@shows("transaction-arrived", "abort")
@pytest.mark.parametrize("event", EVENTS_OF_TRANSACTIONS)
def test_any_fault_record(event: EventType) -> None:
    lab = Lab(rule("transaction-arrived", {"action": "abort", "code": event.name}))
    assert not lab.goes_through(0)
    (record,) = lab.rig.driver.events()
    assert (record.event, record.stream_id) == (event, STREAM)


@shows("transaction-arrived", "abort")
def test_a_silent_abort() -> None:
    lab = Lab(rule("transaction-arrived", "abort"))
    assert not lab.goes_through(0)
    assert events(lab) == []


@shows("transaction-arrived", "replace")
def test_a_transaction_at_another_address() -> None:
    lab = Lab(rule("transaction-arrived", {"action": "replace", "add": 3 * PAGE}))
    assert first(lab) == DATA + 3 * PAGE


# Fetches


@shows("structure-read", "external-abort")
@pytest.mark.parametrize(
    ("structure", "event"),
    [
        ("L1STD", "F_STE_FETCH"),
        ("STE", "F_STE_FETCH"),
        ("CD", "F_CD_FETCH"),
        ("TTD", "F_WALK_EABT"),
    ],
)
def test_a_fetch_that_aborts(structure: str, event: str) -> None:
    lab = Lab(rule("structure-read", "external-abort", structure=structure))
    lab.rig.driver.invalidate_stream(STREAM, leaf=False)
    assert not lab.goes_through(0)
    assert events(lab) == [event]


@shows("structure-read", "external-abort")
@pytest.mark.parametrize("level", range(4))
def test_a_descriptor_fetch_that_aborts_by_its_level(level: int) -> None:
    lab = Lab(rule("structure-read", "external-abort", structure="TTD", level=level))
    assert not lab.goes_through(0)
    (record,) = lab.rig.driver.events()
    walked = lab.injected
    assert (record.event.name, walked) == ("F_WALK_EABT", [1])


@shows("structure-read", "replace")
def test_a_corrupt_ste() -> None:
    lab = Lab(
        rule("structure-read", {"action": "replace", "keep": ~1 & (1 << 512) - 1}, structure="STE")
    )
    lab.rig.driver.invalidate_stream(STREAM)
    assert not lab.goes_through(0)
    assert events(lab) == ["C_BAD_STE"]


@shows("structure-read", "replace")
def test_a_descriptor_with_random_bits_comes_from_the_seed() -> None:
    def runs(seed: int) -> list[object]:
        flip = {"action": "replace", "random_bits": 2}
        lab = Lab(rule("structure-read", flip, structure="TTD", level=3), seed=seed)
        found: list[object] = []
        for page in range(8):
            try:
                found.append(first(lab, page))
            except TransactionAborted as aborted:
                found.append(str(aborted))
        return found

    healthy = [DATA + page * PAGE for page in range(8)]
    assert runs(1) == runs(1) != runs(2)
    assert runs(1) != healthy


@shows("structure-read", "tear")
def test_a_torn_ste() -> None:
    tear = {"action": "tear", "words": 1}
    lab = Lab(rule("structure-read", tear, structure="STE", nth=2))
    driver = lab.rig.driver
    words = driver.table.entry(STREAM)
    driver.invalidate_stream(STREAM)
    assert lab.goes_through(0)  # read whole, and remembered
    before = StreamTableEntry.from_bytes(words.tobytes())
    words[0] = StreamTableEntry(valid=True, config=SteConfig.BYPASS).value & (1 << 64) - 1
    words[1] = (1 << 64) - 1  # what the SMMU does not get to see yet
    driver.invalidate_stream(STREAM)
    assert lab.rig.dma(0x1234_0000) == [(0x1234_0000, 8)]
    cached = lab.rig.smmu.configuration.ste(Access(STREAM))
    assert cached.config == SteConfig.BYPASS
    assert cached.value >> 64 == before.value >> 64


# The TLB


@shows("tlb-lookup", "skip")
def test_a_look_up_that_misses() -> None:
    lab = Lab(rule("tlb-lookup", "skip"))
    assert lab.goes_through(0)
    lab.domain.unmap(IOVA, 16 * PAGE, invalidate=False)
    assert not lab.goes_through(0), "the TLB has it, and was not asked"


@shows("tlb-fill", "skip")
def test_an_entry_that_is_not_kept() -> None:
    lab = Lab(rule("tlb-fill", "skip"))
    assert lab.goes_through(0)
    assert len(lab.rig.smmu.tlb) == 0


@shows("tlb-fill", "replace")
def test_an_entry_that_leads_elsewhere() -> None:
    lab = Lab(rule("tlb-fill", {"action": "replace", "add": 8 * PAGE}, nth=1))
    assert first(lab) == DATA + 8 * PAGE
    assert first(lab) == DATA + 8 * PAGE
    lab.domain.flush()
    assert first(lab) == DATA


# Commands


@shows("command-fetched", "abort")
@pytest.mark.parametrize("code", ["CERROR_ILL", "CERROR_ABT", "CERROR_ATC_INV_SYNC"])
def test_a_command_that_fails(code: str) -> None:
    do = {"action": "abort", "code": code}
    lab = Lab(rule("command-fetched", do, opcode="CMD_TLBI_NH_ASID", nth=1))
    with pytest.raises(CommandQueueError, match=code):
        lab.domain.flush()
    lab.domain.flush()


@shows("command-fetched", "replace")
def test_a_command_that_is_another() -> None:
    other = TlbiCommand(opcode=Opcode.CMD_TLBI_NH_ASID, asid=0xFF)
    do = {"action": "replace", "value": other.value}
    lab = Lab(rule("command-fetched", do, opcode="CMD_TLBI_NH_VA"))
    assert lab.goes_through(0)
    lab.domain.unmap(IOVA, 16 * PAGE)
    assert lab.goes_through(0), "the invalidation was one of another ASID"


@pytest.mark.parametrize(
    ("at", "translates"),
    [
        pytest.param("command-fetched", True, marks=shows("command-fetched", "hold")),
        pytest.param("command-completing", False, marks=shows("command-completing", "hold")),
    ],
)
def test_a_command_that_waits_before_its_effect_or_after(at: str, translates: bool) -> None:
    do = {"action": "hold", "turns": 3}
    lab = Lab(rule(at, do, opcode="CMD_TLBI_NH_VA", nth=1))
    assert lab.goes_through(0)
    seen = []

    def step() -> None:
        seen.append(lab.goes_through(0))
        lab.step()

    lab.rig.while_polling = step
    lab.domain.unmap(IOVA, 16 * PAGE)
    assert seen == [translates] * 3
    assert not lab.goes_through(0)


@shows("command-fetched", "hold")
def test_a_command_queue_that_is_stuck() -> None:
    lab = Lab(rule("command-fetched", "hold", opcode="CMD_SYNC"))
    with pytest.raises(DriverTimeout):
        lab.domain.flush()


@shows("command-fetched", "repeat")
def test_a_command_twice() -> None:
    lab = Lab(rule("command-fetched", "repeat", opcode="CMD_TLBI_NH_ASID"))
    assert lab.goes_through(0)
    lab.domain.flush()
    assert lab.injected == [1]
    assert lab.goes_through(0)


@shows("command-fetched", "skip")
def test_a_tlb_entry_past_its_invalidation() -> None:
    lab = Lab(rule("command-fetched", "skip", opcode="CMD_TLBI_NH_ASID"))
    assert lab.goes_through(0)
    lab.domain.unmap(IOVA, 16 * PAGE, invalidate=False)
    lab.domain.flush()
    assert lab.goes_through(0)


@shows("command-fetched", "skip")
def test_a_configuration_past_its_invalidation() -> None:
    lab = Lab(rule("command-fetched", "skip", opcode=["CMD_CFGI_STE", "CMD_CFGI_CD"]))
    assert lab.goes_through(0)
    lab.rig.driver.detach(STREAM)
    assert lab.goes_through(0)


@shows("command-fetched", "defer")
def test_a_command_that_completes_before_its_effect() -> None:
    do = {"action": "defer", "turns": 1}
    lab = Lab(rule("command-fetched", do, opcode="CMD_TLBI_NH_VA"))
    assert lab.goes_through(0)
    lab.rig.while_polling = lab.rig.smmu.step  # no turn of the injector
    lab.domain.unmap(IOVA, 16 * PAGE)
    assert lab.goes_through(0), "its CMD_SYNC is complete, and it had no effect yet"
    lab.injector.turn()
    assert not lab.goes_through(0)


# CMD_SYNC


@shows("sync-barrier", "skip")
def test_a_sync_that_does_not_wait_for_transactions() -> None:
    lab = Lab(rule("sync-barrier", "skip"))
    in_flight = lab.rig.smmu.translate(Access(STREAM), IOVA, 8)
    lab.domain.flush()
    assert lab.injected == [1]
    lab.rig.smmu.retire(in_flight)


@shows("sync-completing", "hold")
def test_a_sync_that_never_completes() -> None:
    lab = Lab(rule("sync-completing", "hold"))
    with pytest.raises(DriverTimeout):
        lab.domain.flush()


@shows("sync-completing", "skip")
def test_a_sync_whose_message_is_lost() -> None:
    lab = Lab(rule("sync-completing", "skip"))
    with pytest.raises(DriverTimeout):
        lab.domain.flush()
    registers = [lab.rig.smmu.read(r, 4) for r in (Register.CMDQ_PROD, Register.CMDQ_CONS)]
    assert registers[0] == registers[1], "it is consumed all the same"


@shows("sync-completing", "repeat")
def test_a_sync_with_two_messages() -> None:
    lab = Lab(rule("sync-completing", "repeat"))
    lab.domain.flush()
    completed = [event for event in lab.events if event.kind == "SyncCompleted"]
    assert len(completed) == 2


@shows("sync-completing", "replace")
def test_a_sync_with_a_wrong_message() -> None:
    lab = Lab(rule("sync-completing", {"action": "replace", "value": 0}))
    with pytest.raises(DriverTimeout):
        lab.domain.flush()


@shows("sync-completing", "defer")
def test_a_sync_whose_message_comes_late() -> None:
    lab = Lab(rule("sync-completing", {"action": "defer", "turns": 3}))
    consumed = []

    def step() -> None:
        smmu = lab.rig.smmu
        consumed.append(smmu.read(Register.CMDQ_PROD, 4) == smmu.read(Register.CMDQ_CONS, 4))
        lab.step()

    lab.rig.while_polling = step
    lab.domain.flush()
    assert consumed == [True] * 3


# Records and interrupts


def abort_all(lab: Lab, count: int = 1) -> None:
    for page in range(count):
        assert not lab.goes_through(32 + page)


@shows("record-written", "skip")
def test_a_record_that_is_lost() -> None:
    lab = Lab(rule("record-written", "skip", queue="event", nth=1))
    abort_all(lab, 2)
    (record,) = lab.rig.driver.events()
    assert record.address == IOVA + 33 * PAGE


@shows("record-written", "replace")
def test_a_record_of_another_stream() -> None:
    do = {"action": "replace", "toggle": 1 << 32}
    lab = Lab(rule("record-written", do))
    abort_all(lab)
    (record,) = lab.rig.driver.events()
    assert record.stream_id == STREAM ^ 1


@shows("record-written", "repeat")
def test_a_storm_of_records_overflows_the_queue() -> None:
    lab = Lab(rule("record-written", {"action": "repeat", "times": 1000}))
    abort_all(lab)
    driver = lab.rig.driver
    records: list[EventRecord] = driver.events()
    assert len(records) == driver.event_queue.ring.entries
    assert driver.event_queue.overflows == 1


@shows("record-written", "defer")
def test_records_in_another_order() -> None:
    lab = Lab(rule("record-written", {"action": "defer", "turns": 1}, nth=1))
    abort_all(lab, 2)
    lab.injector.turn()
    pages = [(record.address - IOVA) // PAGE for record in lab.rig.driver.events()]
    assert pages == [33, 32]


@pytest.mark.parametrize(
    ("do", "now", "later"),
    [
        pytest.param("skip", 0, 0, marks=shows("interrupt-raised", "skip")),
        pytest.param(
            {"action": "repeat", "times": 9}, 10, 10, marks=shows("interrupt-raised", "repeat")
        ),
        pytest.param(
            {"action": "defer", "turns": 1}, 0, 1, marks=shows("interrupt-raised", "defer")
        ),
    ],
)
def test_interrupts(do: Any, now: int, later: int) -> None:
    lab = Lab(rule("interrupt-raised", do, cause="EVENTQ"))
    lab.rig.driver.set_interrupts(True)
    abort_all(lab)
    assert lab.rig.interrupts == now
    lab.injector.turn()
    assert lab.rig.interrupts == later
    assert len(lab.rig.driver.events()) == 1
