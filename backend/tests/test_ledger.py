"""The ledger over the driver on the model: detaches that are complete, and those that lack a command, each by name."""

import json
import tracemalloc
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from tests.driver_rig import DATA, OTHER, PAGE, STREAM, TABLES
from tests.ledger_rig import IOVA, LedgerRig
from viommu.driver.smmu import DetachMode
from viommu.driver.stream_table import abort_entry, bypass_entry
from viommu.endpoints.port import DmaFault
from viommu.faults.dma import FaultFilter
from viommu.faults.injector import Injector
from viommu.faults.plan import Plan
from viommu.layouts.commands import AtcInvalidateCommand, Opcode, StreamCommand, TlbiCommand
from viommu.layouts.registers import Cr0, Register
from viommu.ledger import Ledger, Severity
from viommu.ledger.events import StaleUse, StreamConfigured
from viommu.smmu import Features
from viommu.stack.filters import FilterDevice
from viommu.stack.path import FilteredPath

CACHING = ("none", "normal", "hostile")
MISSING_CFGI = ("missing-invalidation", "CMD_CFGI_STE")
MISSING_SYNC = ("missing-sync", "CMD_SYNC")


@pytest.fixture(params=CACHING)
def rig(request: pytest.FixtureRequest) -> LedgerRig:
    return LedgerRig(Features(caching=request.param))


# What is complete


@pytest.mark.parametrize("how", DetachMode)
def test_every_form_of_detach_is_clean(rig: LedgerRig, how: DetachMode) -> None:
    domain = rig.attached()
    rig.write()
    rig.driver.detach(STREAM, how)
    with pytest.raises(DmaFault):
        rig.write()
    if how not in (DetachMode.UNMAP, DetachMode.CD_INVALID, DetachMode.SMMU_DISABLED):
        domain.close()
    rig.declare()
    assert rig.found() == []
    assert rig.verdict().clean


@pytest.mark.parametrize("table", TABLES)
def test_a_detach_in_flight_is_clean_and_says_what_landed_in_its_window(
    rig: LedgerRig, table: str
) -> None:
    rig.driver.reset(TABLES[table](rig.driver))
    domain = rig.attached()
    rig.write()
    rig.ends_meanwhile(rig.begin(size=PAGE))
    rig.driver.detach(STREAM)
    domain.close()
    assert rig.found() == []
    (stay,) = rig.verdict().stays
    assert (stay.stream_id, stay.domain, stay.written, stay.read) == (
        STREAM,
        "ASID 1",
        PAGE + 64,
        0,
    )
    assert (stay.window, stay.late, stay.structure) == (PAGE, 0, "STE")
    assert stay.changed is not None
    assert stay.invalidated is not None
    assert stay.completed is not None
    assert stay.attached < stay.changed < stay.invalidated < stay.completed


def test_from_domain_to_domain_and_to_bypass(rig: LedgerRig) -> None:
    rig.attached()
    rig.write()
    second = rig.driver.create_domain()
    second.map(IOVA, DATA + 4 * PAGE, PAGE)
    rig.ends_meanwhile(rig.begin())
    rig.driver.attach(STREAM, second)
    rig.write()
    rig.driver.attach_bypass(STREAM)
    rig.write(DATA)
    assert rig.found() == []
    stays = rig.verdict().stays
    assert [(stay.domain, stay.written, stay.window) for stay in stays] == [
        ("ASID 1", 128, 64),
        ("ASID 2", 64, 0),
        ("bypass", 64, 0),
    ]
    assert [stay.completed is None for stay in stays] == [False, False, True]


def test_substreams_are_followed_each_on_its_own(rig: LedgerRig) -> None:
    domains = {}
    for substream_id in (0, 5):
        domains[substream_id] = domain = rig.driver.create_domain()
        domain.map(IOVA, DATA + substream_id * PAGE, PAGE)
        rig.driver.attach(STREAM, domain, substream_id=substream_id, substream_bits=3)
    for substream in (None, 5):
        with rig.port.begin(IOVA, 64, write=True, substream_id=substream) as transfer:
            transfer.write_from(bytes(64))
    rig.driver.detach(STREAM, DetachMode.CD_INVALID)
    assert rig.found() == []
    stays = {stay.substream_id: stay for stay in rig.verdict().stays}
    assert {key: (stay.domain, stay.written) for key, stay in stays.items()} == {
        None: ("ASID 1", 64),
        5: ("ASID 2", 64),
    }
    assert all(stay.structure == "CD" and stay.completed for stay in stays.values())


def test_a_domain_in_the_tlb_without_a_stream_is_a_note_until_it_is_closed() -> None:
    rig = LedgerRig()
    domain = rig.attached()
    rig.write()
    rig.driver.detach(STREAM)
    (note,) = rig.verdict().findings
    assert (note.severity, note.rule) == (Severity.NOTE, "domain-remembered")
    assert note.command == "CMD_TLBI_NH_ASID"
    assert note.text.startswith("1 TLB entries of ASID 1 outlived its last stream")
    domain.close()
    assert rig.found(Severity.NOTE) == []


# What is missing

OMISSIONS: dict[str, tuple[DetachMode, tuple[str, str]]] = {
    "CMD_CFGI_STE": (DetachMode.STE_ABORT, MISSING_CFGI),
    "CMD_CFGI_CD": (DetachMode.CD_INVALID, ("missing-invalidation", "CMD_CFGI_CD")),
    "CMD_SYNC": (DetachMode.STE_ABORT, MISSING_SYNC),
}


def detach_without(rig: LedgerRig, command: str) -> None:
    """With a transaction in flight, which moves its bytes afterwards."""
    rig.attached()
    rig.write()
    rig.ends_meanwhile(rig.begin())
    rig.omit = {command}
    rig.driver.detach(STREAM, OMISSIONS[command][0])
    rig.go_on()


@pytest.mark.parametrize("command", OMISSIONS)
def test_a_missing_command_is_named_at_the_end_of_the_run(rig: LedgerRig, command: str) -> None:
    detach_without(rig, command)
    assert rig.found() == [OMISSIONS[command][1]]
    (finding, *_) = rig.verdict().findings
    assert finding.stream_id == STREAM
    assert "64 bytes moved meanwhile" in finding.text
    kinds = [rig.events[number - 1].kind for number in finding.evidence]
    assert kinds == ["StreamConfigured", "CommandConsumed"][: len(kinds)]


@pytest.mark.parametrize("command", OMISSIONS)
def test_and_as_soon_as_the_driver_says_that_it_is_done(rig: LedgerRig, command: str) -> None:
    detach_without(rig, command)
    assert OMISSIONS[command][1] in [(f.rule, f.command) for f in rig.verdict().violations]
    rig.declare()
    rig.omit = set()
    rig.driver.invalidate_stream(STREAM)
    assert rig.found() == [OMISSIONS[command][1]]


def test_and_when_the_stream_is_given_away_again(rig: LedgerRig) -> None:
    rig.attached()
    rig.write()
    for entry in (abort_entry(), bypass_entry()):
        rig.driver.table.entry(STREAM)[0] = entry.value & (1 << 64) - 1
        rig.driver.commands.sync()
    rig.driver.invalidate_stream(STREAM)
    assert rig.found() == [MISSING_CFGI]
    assert "where it changed again" in rig.verdict().findings[0].text


def test_an_invalidation_that_comes_after_another_sync_is_an_exposure(rig: LedgerRig) -> None:
    """It is in time for nobody, and yet it comes."""
    detach_without(rig, "CMD_CFGI_STE")
    rig.omit = set()
    rig.attached()
    assert rig.found() == [("deferred-invalidation", "CMD_CFGI_STE")]
    assert rig.verdict().word == "exposed"
    assert "64 bytes moved meanwhile" in rig.verdict().findings[0].text


@pytest.mark.parametrize("command", OMISSIONS)
def test_and_when_the_smmu_is_switched_off(rig: LedgerRig, command: str) -> None:
    detach_without(rig, command)
    rig.omit = set()
    rig.driver.reset()
    rig.attached()
    assert rig.found() == [OMISSIONS[command][1]]


def test_a_command_for_another_stream_does_not_count(rig: LedgerRig) -> None:
    rig.attached()
    rig.write()
    rig.omit = {"CMD_CFGI_STE"}
    rig.driver.detach(STREAM)
    rig.omit = set()
    rig.driver.invalidate_stream(OTHER)
    assert rig.found() == [MISSING_CFGI]


def test_what_is_pending_is_no_violation_once_it_comes(rig: LedgerRig) -> None:
    detach_without(rig, "CMD_CFGI_STE")
    assert rig.verdict().word == "violated"
    rig.omit = set()
    rig.driver.invalidate_stream(STREAM)
    assert rig.verdict().word == "exposed"
    assert rig.found() == [("deferred-invalidation", "CMD_CFGI_STE")]


@pytest.mark.parametrize("others", [True, False])
def test_what_waits_for_a_sync_is_the_declared_streams_own(rig: LedgerRig, others: bool) -> None:
    """Another stream's unmap is under way when the driver says that a detach is done."""
    own, domain = rig.attached(), rig.driver.create_domain()
    domain.map(IOVA, DATA + 4 * PAGE, 2 * PAGE, pages_only=True)
    rig.driver.attach(OTHER, domain)
    other = rig.new_port(OTHER)
    rig.write()
    rig.write(port=other)
    rig.driver.detach(STREAM)
    own.flush()
    rig.driver.commands.issue(
        TlbiCommand(opcode=Opcode.CMD_TLBI_NH_ASID, asid=(domain if others else own).asid),
        *(
            command(opcode=opcode, stream_id=OTHER if others else STREAM)
            for command, opcode in (
                (StreamCommand, Opcode.CMD_CFGI_STE),
                (AtcInvalidateCommand, Opcode.CMD_ATC_INV),
            )
        ),
    )
    rig.declare()
    rig.driver.commands.sync()
    assert rig.found() == ([] if others else [MISSING_SYNC])


# What the SMMU itself could do wrong


def test_a_sync_that_does_not_wait_is_seen(rig: LedgerRig) -> None:
    rig.attached()
    rig.write()
    transfer = rig.begin()

    def at_once(proceed: Callable[[], None]) -> int:
        proceed()
        return 0

    rig.smmu.in_flight.when_done = at_once  # type: ignore[method-assign]
    rig.driver.detach(STREAM)
    transfer.write_from(bytes(64))
    transfer.done()
    assert rig.found() == [("in-flight-after-sync", None), ("dma-after-detach", None)]
    (stay,) = rig.verdict().stays
    assert (stay.written, stay.window, stay.late) == (128, 0, 64)
    late = rig.verdict().findings[1]
    assert late.text.startswith("64 bytes moved by ASID 1 after stream 0x10 had left it")


def test_what_an_smmu_that_is_off_ignores_needs_no_sync(rig: LedgerRig) -> None:
    rig.driver.disable(abort=False)
    rig.smmu.write(Register.CR0, 4, Cr0(cmdqen=True).value)
    transfer = rig.begin(DATA)
    invalidate = AtcInvalidateCommand(opcode=Opcode.CMD_ATC_INV, stream_id=STREAM)
    rig.driver.commands.issue(invalidate)
    rig.driver.commands.sync()
    transfer.write_from(bytes(64))
    transfer.done()
    assert rig.found() == []


@pytest.mark.parametrize("caching", ["normal", "hostile"])
def test_an_entry_that_is_used_all_the_same_is_seen(caching: str) -> None:
    """An SMMU that does not obey CMD_CFGI_STE."""
    rig = LedgerRig(Features(caching=caching))
    rig.smmu.configuration.invalidate_streams = lambda *_: None  # type: ignore[method-assign]
    rig.smmu.configuration.invalidate_cd = lambda *_: None  # type: ignore[method-assign]
    rig.attached()
    rig.write()
    rig.driver.detach(STREAM)
    rig.write()
    assert ("dma-after-detach", None) in rig.found()
    uses = rig.kinds(StaleUse)
    assert [(use.moved, use.cause, use.held, use.now) for use in uses] == [
        (False, "STE", True, "abort"),
        (True, "STE", True, "abort"),
    ]


def test_a_write_that_is_deferred_past_the_detach_is_seen(rig: LedgerRig) -> None:
    """A write that was over for the SMMU lands when the stream has left the domain."""
    tracer = rig.smmu.tracer
    late = {"at": "dma-writing", "do": {"action": "defer", "turns": 1}}
    injector = Injector(Plan.of(late), tracer, lambda: 0.0)
    faults = FilterDevice("faults", FaultFilter(rig.port, tracer))
    rig.port.path = FilteredPath(rig.port, [faults], tracer)
    rig.attached()
    rig.write()
    rig.driver.detach(STREAM)
    rig.declare()
    injector.turn()
    assert rig.found() == [("in-flight-after-sync", None), ("dma-after-detach", None)]
    assert rig.verdict().word == "violated"


# Faults


def test_silent_aborts_and_faults_of_each_stay(rig: LedgerRig) -> None:
    rig.attached()
    for _ in range(2):
        with pytest.raises(DmaFault):
            rig.write(0x9_0000)
    rig.driver.detach(STREAM)
    for _ in range(3):
        with pytest.raises(DmaFault):
            rig.write()
    assert rig.found(Severity.NOTE) == [("silent-abort", None)]
    (stay,) = rig.verdict().stays
    assert (stay.faults, stay.silent_aborts) == ({"F_TRANSLATION": 2}, 3)
    assert rig.verdict().findings[0].text.startswith("3 transactions of stream 0x10")


def test_faults_that_software_never_hears_of(rig: LedgerRig) -> None:
    rig.driver.reset(event_queue_log2=1)
    rig.attached()
    for _ in range(5):
        with pytest.raises(DmaFault):
            rig.write(0x9_0000)
    assert rig.found(Severity.NOTE) == [("fault-lost", None)]
    note = rig.verdict().findings[0]
    assert note.text == "3 F_TRANSLATION of stream 0x10 did not reach software: the queue is full"
    assert len(note.evidence) == 3


# The verdict


def test_the_verdict_as_values_and_as_text(rig: LedgerRig) -> None:
    detach_without(rig, "CMD_SYNC")
    rig.witness.close()
    verdict = rig.verdict()
    values = json.loads(json.dumps(verdict.as_dict()))
    assert values["verdict"] == "violated"
    assert values["findings"][0]["severity"] == "violation"
    assert values["findings"][0]["command"] == "CMD_SYNC"
    assert values["streams"][0]["window"] == 64
    assert values["events"] == len(rig.events)
    console = Console(width=150, file=StringIO())
    with console.capture() as printed:
        verdict.print(console)
    text = printed.get()
    assert "missing-sync" in text
    assert "violated: 1 violation, " in text


def test_a_ledger_without_a_witness_says_nothing(rig: LedgerRig) -> None:
    rig.witness.close()
    assert not rig.verdict().witnessed
    rig = LedgerRig()
    rig.attached()
    assert rig.verdict().witnessed


def test_a_closed_witness_costs_nothing(rig: LedgerRig) -> None:
    rig.attached()
    rig.witness.close()
    rig.witness.close()
    seen = len(rig.kinds(StreamConfigured))
    rig.driver.detach(STREAM)
    assert len(rig.kinds(StreamConfigured)) == seen


# What a long run leaves in memory


def test_what_repeats_is_counted_and_its_first_times_are_kept() -> None:
    ledger = Ledger()
    lost = {"kind": "EventLost", "stream_id": 5, "event": "F_ACCESS", "why": "full"}
    for silent in ({"kind": "Aborted", "stream_id": 5, "event": None}, lost):
        for _ in range(1000):
            ledger.read(silent)
    tracemalloc.start()
    for _ in range(20_000):
        ledger.read(lost)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 20_000
    texts = [(note.text.split()[0], note.evidence) for note in ledger.verdict().findings]
    assert texts == [
        ("21,000", tuple(range(1001, 1017))),
        ("1,000", tuple(range(1, 17))),
    ]


def test_blocked_streams_without_end_are_not_watched_for_ever(rig: LedgerRig) -> None:
    rig.attached()
    for first in range(0x100, 0x1900, 64):
        rig.driver.commands.issue(
            *(
                StreamCommand(opcode=Opcode.CMD_CFGI_STE, stream_id=stream_id)
                for stream_id in range(first, first + 64)
            )
        )
    rig.driver.commands.sync()
    rig.events.clear()
    rig.driver.table.entry(0x100)[0] = bypass_entry().value & (1 << 64) - 1
    rig.driver.invalidate_stream(OTHER)
    rig.driver.invalidate_stream(0x100)
    seen = [(event.stream_id, event.structure) for event in rig.kinds(StreamConfigured)]
    assert seen == [(OTHER, None), (0x100, None)], "as if it was new"
    rig.driver.table.entry(STREAM)[0] = abort_entry().value & (1 << 64) - 1
    rig.driver.commands.sync()
    assert rig.found() == [MISSING_CFGI]
