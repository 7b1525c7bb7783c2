"""The Perfetto trace, read back by Perfetto's own messages."""

import io
from pathlib import Path
from typing import Any

import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

from tests.report_rig import attach_fault_detach, items
from viommu.report import perfetto
from viommu.report.timeline import Timeline

BEGIN, END, INSTANT = (
    TrackEvent.TYPE_SLICE_BEGIN,
    TrackEvent.TYPE_SLICE_END,
    TrackEvent.TYPE_INSTANT,
)


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    return attach_fault_detach(tmp_path / "trace.jsonl").timeline()


@pytest.fixture
def packets(timeline: Timeline) -> list[Any]:
    file = io.BytesIO()
    perfetto.write(timeline, file)
    trace = Trace()
    trace.ParseFromString(file.getvalue())
    return list(trace.packet)


def test_the_tracks_are_the_lanes_below_their_groups(packets: list[Any]) -> None:
    tracks = [packet.track_descriptor for packet in packets if packet.HasField("track_descriptor")]
    names = {track.uuid: track.name for track in tracks}
    assert len(names) == len(tracks)
    placed = {(names.get(track.parent_uuid), track.name) for track in tracks}
    assert {(None, "stream 0x10"), ("stream 0x10", "DMA"), ("SMMU", "CMD_SYNC")} <= placed


def test_slices_have_the_times_of_the_items_on_the_track_of_their_lane(
    packets: list[Any], timeline: Timeline
) -> None:
    tracks = {packet.track_descriptor.uuid: packet.track_descriptor.name for packet in packets}
    ends: dict[int, int] = {}
    found = []
    # As the trace processor does: in the order of time, and a slice ends before the next one begins.
    for packet in sorted(packets, key=lambda each: each.timestamp):
        event = packet.track_event
        if event.type in (BEGIN, INSTANT):
            assert event.track_uuid not in ends
            found.append([tracks[event.track_uuid], event.name, packet.timestamp, packet.timestamp])
            if event.type == BEGIN:
                ends[event.track_uuid] = len(found) - 1
        elif event.type == END:
            found[ends.pop(event.track_uuid)][3] = packet.timestamp
    assert ends == {}
    assert sorted(found) == sorted(
        [lane.name, item.title, round(item.begin * 1e9), round(item.end * 1e9)]
        for lane in timeline.lanes
        for item in lane.items
    )


def test_arrows_join_what_belongs_together(packets: list[Any], timeline: Timeline) -> None:
    events = [packet.track_event for packet in packets if packet.HasField("track_event")]
    (record,) = [event for event in events if event.name == "record F_TRANSLATION"]
    (fault,) = items(timeline, "fault", lambda item: item.sort == "F_TRANSLATION")
    (fault_event,) = [event for event in events if event.name == fault.title]
    assert set(record.flow_ids) & set(fault_event.flow_ids)
    ends: dict[int, int] = {}
    for event in events:
        for flow in event.flow_ids:
            ends[flow] = ends.get(flow, 0) + 1
    assert set(ends.values()) == {2}


def test_the_decoded_events_are_annotations(packets: list[Any]) -> None:
    (record,) = [p.track_event for p in packets if p.track_event.name == "record F_TRANSLATION"]
    notes = {note.name.split(" ", 1)[1]: note.string_value for note in record.debug_annotations}
    assert notes["EventRecorded · address"] == "0x11000"
    assert list(record.categories) == ["record"]
