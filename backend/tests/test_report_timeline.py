"""The time line, made of traces of the model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report_rig import IOVA, SYNC, TLBI_NH_ALL, Stage, attach_fault_detach, items
from tests.smmu_rig import ASID, CD_PLAIN, STREAM
from viommu.report.timeline import build, read_trace

STREAM_GROUP = f"stream {STREAM:#x}"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with_trace = Stage(tmp_path / "trace.jsonl")
    yield with_trace
    with_trace.close()


def test_dma_is_a_span_from_translation_to_its_bytes(stage: Stage) -> None:
    transfer = stage.port.begin(IOVA, 64, write=True)
    stage.rig.submit((0x46, 0))
    transfer.write_from(bytes(64))
    transfer.done()
    timeline = stage.timeline()
    (dma,) = items(timeline, "dma")
    assert (dma.tone, dma.size) == ("good", 64)
    assert [event["kind"] for event in dma.events] == ["Translated", "DmaMoved"]
    (sync,) = items(timeline, "sync")
    assert dma.begin < sync.begin < dma.end
    assert timeline.moved == {"write": 64}


def test_transfers_that_overlap_have_rows_of_their_own(stage: Stage) -> None:
    transfers = [stage.port.begin(IOVA + 64 * n, 64, write=True) for n in range(3)]
    for transfer in transfers:
        transfer.write_from(bytes(64))
        transfer.done()
    stage.write()
    assert [dma.row for dma in items(stage.timeline(), "dma")] == [0, 1, 2, 0]


def test_a_fault_its_record_and_the_refused_dma_belong_together(stage: Stage) -> None:
    assert not stage.write(IOVA + 0x1000)
    timeline = stage.timeline()
    (fault,), (record,), (dma,) = (items(timeline, kind) for kind in ("fault", "record", "dma"))
    assert set(fault.related) == {record, dma}
    assert dma.tone == "bad"
    assert timeline.faults == {"F_TRANSLATION": 1}
    ((raw, item),) = timeline.records
    assert (raw["event"], item) == ("F_TRANSLATION", record)


def test_a_detach_leads_to_the_sync_that_completed_it(stage: Stage) -> None:
    stage.write()
    stage.detach_in_flight()
    stage.write()
    timeline = stage.timeline()
    attached, detached = items(timeline, "domain")
    assert (attached.title, attached.tone) == ("s1 translate, ASID 7", "good")
    assert (detached.title, detached.tone) == ("abort", "warn")
    (command,) = items(timeline, "command")
    assert command in attached.related
    (sync,) = items(timeline, "sync")
    assert command in sync.related
    assert sync.title == "CMD_SYNC waits for 1 in flight"
    in_flight = items(timeline, "dma")[1]
    assert sync.begin < in_flight.end <= sync.end


def test_another_asid_is_another_domain(stage: Stage) -> None:
    stage.write()
    stage.rig.context(CD_PLAIN ^ ASID << 48 | 9 << 48)
    stage.write()
    titles = [item.title for item in items(stage.timeline(), "domain")]
    assert titles == ["s1 translate, ASID 7", "s1 translate, ASID 9"]


def test_commands_that_stop_are_errors_that_belong_together(stage: Stage) -> None:
    stage.bad_command()
    failed, active = items(stage.timeline(), "error")
    assert failed.title == "commands stop: CERROR_ILL"
    assert (active.title, active.related) == ("GERROR CMDQ_ERR", [failed])


def test_what_is_open_at_the_end_says_so(stage: Stage) -> None:
    stage.port.begin(IOVA, 64, write=True)
    stage.rig.submit((0x03 | STREAM << 32, 1), (0x46, 0))
    timeline = stage.timeline()
    (dma,), (sync,) = items(timeline, "dma"), items(timeline, "sync")
    assert dma.title.endswith("(still open at the end)")
    assert (sync.tone, sync.end) == ("bad", timeline.end)


def test_the_lanes_are_those_of_the_stream_then_the_smmu(tmp_path: Path) -> None:
    lanes = attach_fault_detach(tmp_path / "trace.jsonl").timeline().lanes
    assert [(lane.group, lane.name) for lane in lanes] == [
        (STREAM_GROUP, "Domain"),
        (STREAM_GROUP, "DMA"),
        (STREAM_GROUP, "Faults"),
        (STREAM_GROUP, "Records"),
        (STREAM_GROUP, "Tables"),
        ("SMMU", "Commands"),
        ("SMMU", "CMD_SYNC"),
        ("SMMU", "Registers"),
    ]


# With a witness


@pytest.fixture
def witnessed(tmp_path: Path) -> Iterator[Stage]:
    with_witness = Stage(tmp_path / "witnessed.jsonl", witnessed=True)
    yield with_witness
    with_witness.close()


def test_memory_says_what_domain_a_stream_is_in(witnessed: Stage) -> None:
    witnessed.write()
    witnessed.detach_in_flight()
    attached, detached = items(witnessed.timeline(), "domain")[-2:]
    assert attached.title.startswith("s1 translate, ASID 7")
    assert detached.title == "abort"
    assert detached.begin < items(witnessed.timeline(), "command")[-1].begin


def test_a_stale_entry_is_a_span_until_its_invalidation(witnessed: Stage) -> None:
    witnessed.write()
    witnessed.unmap(SYNC)
    witnessed.write()
    witnessed.rig.submit(TLBI_NH_ALL, SYNC)
    timeline = witnessed.timeline()
    (span,) = items(timeline, "stale")
    assert span.title == "TLB of ASID 7 needs CMD_TLBI_NH_VA"
    used = items(timeline, "fault", lambda item: span in item.related)
    assert [item.sort for item in used] == ["translated by a stale TLB", "moved by a stale TLB"]
    assert span.end < timeline.end


def test_a_stale_entry_that_stays_says_so(witnessed: Stage) -> None:
    witnessed.write()
    witnessed.unmap(SYNC)
    (span,) = items(witnessed.timeline(), "stale")
    assert (span.title, span.tone) == (
        "TLB of ASID 7 needs CMD_TLBI_NH_VA (still there at the end)",
        "bad",
    )


# Events of whom the model alone knows nothing


def line(seq: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"seq": seq, "time": seq / 1000, "kind": kind, **fields}


def test_an_injection_leads_to_what_comes_next() -> None:
    injected = {"line": 3, "rule": "lose", "point": "command.fetch", "action": "skip", "count": 1}
    timeline = build([
        line(1, "FaultInjected", **injected, where="CommandFetched(stream_id=16)"),
        line(2, "GlobalErrorRaised", error="CMDQ_ERR"),
    ])  # fmt: skip
    (injection,), (error,) = items(timeline, "injection"), items(timeline, "error")
    assert injection.related == [error]
    assert timeline.lanes[0].group == "stream 0x10"


def test_an_injection_at_a_function_is_in_its_lane() -> None:
    injected = {"line": 3, "rule": "", "point": "mmio-access", "action": "skip", "count": 1}
    (lane,) = build(
        [line(1, "FaultInjected", **injected, where="MmioAccess(function='copy-engine', size=4)")]
    ).lanes
    assert lane.group == "function copy-engine"


def test_an_event_around_another_is_called_after_that() -> None:
    inner = {"kind": "DomainChanged", "domain": "d0"}
    (lane,) = build([line(1, "HostDomainEvent", event=inner)]).lanes
    assert (lane.group, lane.items[0].title) == ("function d0", "DomainChanged")


def test_the_host_has_lanes_of_its_own() -> None:
    sync = {"kind": "SyncCompleted", "signal": "SIG_NONE"}
    timeline = build(
        [line(1, "HostSmmuEvent", event=sync), line(2, "SyncCompleted", signal="SIG_IRQ")]
    )
    assert [lane.group for lane in timeline.lanes] == ["SMMU", "host SMMU"]


def test_an_event_that_nobody_knows_is_there_nevertheless() -> None:
    timeline = build([line(1, "Novelty", stream_id=0x18), line(2, "Novelty", device="filter0")])
    assert [(lane.group, lane.items[0].title) for lane in timeline.lanes] == [
        ("stream 0x18", "Novelty"),
        ("function filter0", "Novelty"),
    ]


# Size


def many(count: int) -> Iterator[dict[str, Any]]:
    seq = 0
    for n in range(count):
        dma = {
            "stream_id": n % 3,
            "substream_id": None,
            "iova": n << 12,
            "size": 4096,
            "write": bool(n % 2),
        }
        for kind, fields in (("Translated", {"runs": 1}), ("DmaMoved", {})):
            seq += 1
            yield {"seq": seq, "time": seq * 1e-6, "kind": kind, **dma, "first": 0, **fields}


def test_too_many_items_become_one_and_evidence_stays() -> None:
    timeline = build(many(20_000), evidence=[20_001], budget=500)
    dma = items(timeline, "dma")
    assert len(dma) <= 501
    assert timeline.grain > 0
    assert sum(item.count for item in dma) == 20_000
    assert sum(item.size for item in dma) == 20_000 * 4096
    assert all(item.end - item.begin < timeline.grain for item in dma)
    evidence = timeline.evidence[20_001]
    assert evidence in dma
    assert (evidence.count, evidence.events[0]["seq"]) == (1, 20_001)


def test_any_number_of_streams_has_a_bounded_number_of_lanes() -> None:
    fault = {"substream_id": None, "iova": 0, "write": False, "event": None}
    timeline = build(line(n + 1, "Aborted", stream_id=n, **fault) for n in range(1000))
    assert len(timeline.lanes) == 65
    assert sum(item.count for item in timeline.items) == 1000


# What may be missing


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    stage = Stage(tmp_path_factory.mktemp("busy") / "trace.jsonl", witnessed=True)
    for _ in range(3):
        stage.write()
        stage.write(IOVA + 0x1000)
    stage.unmap(SYNC)
    stage.write()
    stage.rig.submit(TLBI_NH_ALL, SYNC)
    stage.rig.context(CD_PLAIN ^ ASID << 48 | 9 << 48)
    stage.write()
    stage.bad_command()
    stage.close()
    return [dict(event) for event in read_trace(stage.path)]


@given(st.data())
def test_any_part_of_a_trace_is_a_time_line(
    busy: list[dict[str, Any]], data: st.DataObject
) -> None:
    budget = data.draw(st.integers(4, 100))
    part = [event for event in busy if data.draw(st.booleans())]
    timeline = build(part, budget=budget, evidence=[event["seq"] for event in part[:2]])
    assert timeline.events == len(part)
    everything = set(timeline.items)
    for lane in timeline.lanes:
        ends: dict[int, float] = {}
        for item in lane.items:
            assert item.begin <= item.end
            assert item.begin >= ends.get(item.row, 0.0)
            ends[item.row] = item.end
            assert {other.current() for other in item.related} <= everything


# Files


def test_a_trace_whose_last_line_is_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(line(1, "A")) + "\n" + '{"seq":2,"ti')
    assert [event["kind"] for event in read_trace(path)] == ["A"]


def test_what_is_no_trace_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(line(1, "A")) + "\n" + "[]\n")
    with pytest.raises(ValueError, match="line 2 is no event of a trace"):
        list(read_trace(path))
