"""The driver and the model, each written from the architecture, against each other: attach, detach, translation."""

from collections.abc import Iterator
from random import Random

import pytest

from tests.driver_rig import DATA, MEGA2, OTHER, PAGE, STREAM, TABLES, Rig, fault, record
from viommu.driver.context import TableRoot
from viommu.driver.domain import MOST_SINGLE_INVALIDATIONS
from viommu.driver.errors import CommandQueueError, DriverTimeout, StreamError
from viommu.driver.page_tables import Access
from viommu.driver.queues import Completion
from viommu.driver.smmu import DetachMode
from viommu.driver.stream_table import invalid_entry
from viommu.layouts.commands import Command
from viommu.layouts.records import EventRecord, EventType
from viommu.layouts.tables import S1Default, S1Format
from viommu.smmu import Access as Transaction
from viommu.smmu import TransactionAborted


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    assert int(rig.driver.global_errors()) == 0


@pytest.mark.parametrize("completion", list(Completion))
@pytest.mark.parametrize("table", list(TABLES))
def test_attach_translates_and_detach_blocks(rig: Rig, table: str, completion: Completion) -> None:
    driver = rig.driver
    driver.reset(TABLES[table](driver), completion=completion)
    domain = driver.create_domain()
    domain.map(0x1_0000, DATA, 4 * PAGE)
    # No domain: the STE aborts silently, and where there is no STE yet the stream does not exist.
    absent = [] if table.startswith("linear") else [record(EventType.C_BAD_STREAMID)]
    assert rig.refused() == absent
    driver.attach(STREAM, domain)
    assert rig.dma(0x1_0800, 0x1000) == [(DATA + 0x800, 0x1000)]
    driver.detach(STREAM)
    assert rig.refused() == []


DETACHED: dict[DetachMode, list[EventRecord]] = {
    DetachMode.UNMAP: [fault(EventType.F_TRANSLATION)],
    DetachMode.STE_ABORT: [],
    DetachMode.STE_INVALID: [record(EventType.C_BAD_STE)],
    DetachMode.CD_INVALID: [record(EventType.C_BAD_CD)],
    DetachMode.SMMU_DISABLED: [],
}


@pytest.mark.parametrize("how", list(DetachMode))
def test_each_detach_refuses_with_its_own_event(rig: Rig, how: DetachMode) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    domain.map(0x1_0000, DATA, PAGE)
    driver.attach(STREAM, domain)
    assert rig.dma(0x1_0000) == [(DATA, 8)]  # and it is cached now
    driver.detach(STREAM, how)
    assert rig.refused() == DETACHED[how]
    # The way back, from each of them.
    if how is DetachMode.SMMU_DISABLED:
        driver.reset()
        domain = driver.create_domain()
    if how in (DetachMode.UNMAP, DetachMode.SMMU_DISABLED):
        domain.map(0x1_0000, DATA, PAGE)
    driver.attach(STREAM, domain)
    assert rig.dma(0x1_0000) == [(DATA, 8)]


@pytest.mark.parametrize("how", list(DetachMode))
def test_a_detach_waits_for_the_transaction_in_flight(rig: Rig, how: DetachMode) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    domain.map(0x1_0000, DATA, PAGE)
    driver.attach(STREAM, domain)
    flying = rig.smmu.translate(Transaction(STREAM, write=True), 0x1_0000, PAGE)
    polls = 0

    def land_later() -> None:
        nonlocal polls
        polls += 1
        if polls == 5:
            rig.smmu.retire(flying)
        rig.smmu.step()

    rig.while_polling = land_later
    driver.detach(STREAM, how)
    assert polls >= 5
    assert len(rig.smmu.in_flight) == 0


def test_a_detach_that_cannot_complete_times_out(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    domain.map(0x1_0000, DATA, PAGE)
    driver.attach(STREAM, domain)
    flying = rig.smmu.translate(Transaction(STREAM, write=True), 0x1_0000, PAGE)
    with pytest.raises(DriverTimeout, match="CMD_SYNC"):
        driver.detach(STREAM)
    assert rig.refused() == []  # blocked for what comes after
    rig.smmu.retire(flying)


def test_a_missing_invalidation_leaves_a_stale_translation(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    domain.map(0x1_0000, DATA, PAGE)
    driver.attach(STREAM, domain)
    assert rig.dma(0x1_0000) == [(DATA, 8)]
    (removed,) = domain.unmap(0x1_0000, PAGE, invalidate=False)
    assert removed.address == DATA
    assert rig.dma(0x1_0000) == [(DATA, 8)]  # stale
    domain.flush()
    assert rig.refused() == [fault(EventType.F_TRANSLATION)]


def test_unmap_invalidates_page_by_page_and_many_at_once(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    driver.attach(STREAM, domain)
    few, many = 3, MOST_SINGLE_INVALIDATIONS
    for count, expected in (
        (few, ["CMD_TLBI_NH_VA"] * few + ["CMD_SYNC"]),
        (many, ["CMD_TLBI_NH_ASID", "CMD_SYNC"]),
    ):
        domain.map(0x1_0000, DATA, count * PAGE)
        rig.dma(0x1_0000, count * PAGE)
        names, stop = rig.commands()
        assert len(domain.unmap(0x1_0000, count * PAGE)) == count
        stop()
        assert names == expected
        assert len(rig.smmu.tlb) == 0


def test_global_mappings_are_forgotten_too(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    driver.attach(STREAM, domain)
    for count in (1, 100):
        domain.map(0x1_0000, DATA, count * PAGE, Access(is_global=True))
        rig.dma(0x1_0000, count * PAGE)
        assert len(rig.smmu.tlb) >= 1
        domain.unmap(0x1_0000, count * PAGE)
        assert len(rig.smmu.tlb) == 0


def test_two_domains_reach_different_pages_by_one_iova(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    one, two = driver.create_domain(), driver.create_domain()
    one.map(0x1_0000, DATA, PAGE)
    two.map(0x1_0000, DATA + PAGE, PAGE)
    driver.attach(STREAM, one)
    driver.attach(OTHER, two)
    assert rig.dma(0x1_0000) == [(DATA, 8)]
    assert rig.dma(0x1_0000, stream_id=OTHER) == [(DATA + PAGE, 8)]
    driver.attach(STREAM, two)  # straight from one domain to the other
    assert rig.dma(0x1_0000) == [(DATA + PAGE, 8)]
    assert one.streams == set()
    assert two.streams == {(STREAM, 0), (OTHER, 0)}
    with pytest.raises(StreamError, match="2 streams"):
        two.close()
    driver.detach(OTHER)
    assert rig.dma(0x1_0000) == [(DATA + PAGE, 8)]
    one.close()


def test_tables_that_somebody_else_makes(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    owner, domain = driver.create_domain(), driver.create_unmanaged_domain()
    owner.map(0x1_0000, DATA, PAGE)
    assert owner.lower is not None
    domain.lower = TableRoot(owner.lower.root, 48)
    driver.attach(STREAM, domain)
    assert rig.dma(0x1_0000) == [(DATA, 8)]
    with pytest.raises(StreamError, match="somebody else"):
        driver.detach(STREAM, DetachMode.UNMAP)
    driver.detach(STREAM)
    domain.close()
    assert driver.create_domain().asid == domain.asid


def test_bypass_and_abort(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    driver.attach_bypass(STREAM)
    assert rig.dma(DATA + 8, 16) == [(DATA + 8, 16)]
    driver.attach_abort(STREAM)
    assert rig.refused(DATA) == []
    domain = driver.create_domain()
    domain.map(0x1_0000, DATA, PAGE)
    driver.attach(STREAM, domain)
    driver.attach_bypass(STREAM)
    assert rig.dma(DATA) == [(DATA, 8)]
    assert domain.streams == set()


def test_disable_can_bypass_too(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    driver.disable(abort=False)
    assert rig.dma(DATA) == [(DATA, 8)]
    driver.disable(abort=True)
    with pytest.raises(TransactionAborted):
        rig.dma(DATA)


def test_streams_outside_the_table(rig: Rig) -> None:
    driver = rig.driver
    driver.reset(driver.linear_table(4))
    assert rig.refused(stream_id=0x10) == [record(EventType.C_BAD_STREAMID, stream_id=0x10)]
    driver.reset(driver.two_level_table(6))
    assert rig.refused(stream_id=0x40) == [record(EventType.C_BAD_STREAMID, stream_id=0x40)]
    driver.reset(driver.linear_table(6, invalid_entry()))
    assert rig.refused() == [record(EventType.C_BAD_STE)]


@pytest.mark.parametrize(
    ("lower", "upper"), [(b, None) for b in range(25, 49)] + [(30, 25), (None, 39), (48, 48)]
)
def test_each_input_size_and_both_halves(rig: Rig, lower: int | None, upper: int | None) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain(lower_bits=lower, upper_bits=upper)
    driver.attach(STREAM, domain)
    inside, outside = [], []
    if lower is not None:
        inside += [0x1_0000, (1 << lower) - PAGE]
        outside += [1 << lower]
    else:
        outside += [0]
    if upper is not None:
        inside += [(1 << 64) - (1 << upper), (1 << 64) - PAGE]
        outside += [(1 << 64) - (1 << upper) - PAGE]
    else:
        outside += [(1 << 64) - PAGE]
    for place, iova in enumerate(inside):
        domain.map(iova, DATA + place * PAGE, PAGE)
        assert rig.dma(iova) == [(DATA + place * PAGE, 8)]
    for iova in outside:
        assert rig.refused(iova) == [fault(EventType.F_TRANSLATION, iova)]


def test_blocks_and_scattered_pages_translate_alike(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    driver.attach(STREAM, domain)
    domain.map(MEGA2, DATA, 2 * MEGA2)
    assert rig.dma(MEGA2 + 0x1234, MEGA2) == [(DATA + 0x1234, MEGA2)]
    frames = [DATA + n * PAGE for n in range(512)]
    Random(7).shuffle(frames)
    domain.map_pages(8 * MEGA2, frames)
    for n in (0, 1, 511):
        assert rig.dma(8 * MEGA2 + n * PAGE, PAGE) == [(frames[n], PAGE)]


@pytest.mark.parametrize(
    ("access", "transaction", "event"),
    [
        (Access(write=False), {"write": True}, EventType.F_PERMISSION),
        (Access(privileged=True), {}, EventType.F_PERMISSION),
        (Access(privileged=True), {"privileged": True}, None),
        (Access(), {"instruction": True}, EventType.F_PERMISSION),
        (Access(execute=True), {"instruction": True}, None),
        (Access(accessed=False), {}, EventType.F_ACCESS),
    ],
)
def test_permissions(
    rig: Rig, access: Access, transaction: dict[str, int], event: EventType | None
) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    domain.map(0x1_0000, DATA, PAGE, access)
    driver.attach(STREAM, domain)
    if event is None:
        assert rig.dma(0x1_0000, **transaction) == [(DATA, 8)]
        return
    write = bool(transaction.get("write"))
    assert rig.refused(**transaction) == [
        fault(event, rnw=not write, ind=transaction.get("instruction", 0))
    ]


@pytest.mark.parametrize("layout", list(S1Format))
def test_substreams(rig: Rig, layout: S1Format) -> None:
    driver = rig.driver
    driver.reset()
    domains = {number: driver.create_domain() for number in (0, 1, 0x7FF)}
    for place, (substream_id, domain) in enumerate(domains.items()):
        domain.map(0x1_0000, DATA + place * PAGE, PAGE)
        driver.attach(
            STREAM, domain, substream_id=substream_id, substream_bits=11, context_format=layout
        )
    assert rig.dma(0x1_0000) == [(DATA, 8)]
    assert rig.dma(0x1_0000, substream_id=1) == [(DATA + PAGE, 8)]
    assert rig.dma(0x1_0000, substream_id=0x7FF) == [(DATA + 2 * PAGE, 8)]
    # SSV is not part of this record (7.3.9).
    assert rig.refused(substream_id=0x800) == [
        record(EventType.C_BAD_SUBSTREAMID, substream_id=0x800)
    ]
    driver.detach(STREAM, DetachMode.CD_INVALID)
    for substream_id in domains:
        expected = record(EventType.C_BAD_CD, ssv=substream_id > 0, substream_id=substream_id)
        transaction = {"substream_id": substream_id} if substream_id else {}
        assert rig.refused(**transaction) == [expected]


@pytest.mark.parametrize(
    ("default", "outcome"),
    [
        (S1Default.TERMINATE, [record(EventType.F_STREAM_DISABLED)]),
        (S1Default.BYPASS, None),
    ],
)
def test_transactions_without_a_substream(
    rig: Rig, default: S1Default, outcome: list[EventRecord] | None
) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    driver.attach(STREAM, domain, substream_id=1, substream_bits=1, default=default)
    if outcome is None:
        assert rig.dma(DATA) == [(DATA, 8)]
    else:
        assert rig.refused() == outcome


def test_an_illegal_command_is_reported_and_the_queue_goes_on(rig: Rig) -> None:
    for completion in Completion:
        rig.driver.reset(completion=completion)
        rig.driver.commands.issue(Command(0xFF))
        with pytest.raises(CommandQueueError, match="CERROR_ILL") as caught:
            rig.driver.commands.sync()
        assert caught.value.entry == 0xFF
        rig.driver.commands.sync()
        rig.driver.attach_bypass(STREAM)
        assert rig.dma(DATA) == [(DATA, 8)]


def test_events_overflow_and_interrupt(rig: Rig) -> None:
    driver = rig.driver
    driver.reset(event_queue_log2=2)
    domain = driver.create_domain()
    driver.attach(STREAM, domain)
    for page in range(6):
        with pytest.raises(TransactionAborted):
            rig.dma(page * PAGE)
    assert rig.interrupts == 0
    assert [event.address for event in driver.events()] == [0, PAGE, 2 * PAGE, 3 * PAGE]
    assert driver.event_queue.overflows == 1
    driver.set_interrupts(True)
    assert rig.refused(0x7000) == [fault(EventType.F_TRANSLATION, 0x7000)]
    assert rig.interrupts == 1
    driver.set_interrupts(False)
    assert rig.refused(0x7000) == [fault(EventType.F_TRANSLATION, 0x7000)]
    assert rig.interrupts == 1
    assert driver.event_queue.overflows == 1
