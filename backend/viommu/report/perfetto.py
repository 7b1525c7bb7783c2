"""A run as a trace for the Perfetto UI (ui.perfetto.dev), or for its trace processor.

A group of lanes is a track with a child for each lane, or for each row of one in which items overlap. What takes time
is a slice, else an instant; what belongs together is joined by flow arrows, in the order of time.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import BinaryIO

from viommu.report.decode import decode
from viommu.report.model import Item
from viommu.report.protobuf import fixed64s, integer, message, string
from viommu.report.timeline import Timeline

BUDGET = 200_000
"""Items that the UI takes in one go."""
_SEQUENCE = 1
_FLOWS = 8  # of one item
_EXPLICIT_ORDER = 3


class _Trace(IntEnum):
    PACKET = 1


class _Packet(IntEnum):
    TIMESTAMP = 8
    SEQUENCE_ID = 10
    TRACK_EVENT = 11
    TRACK_DESCRIPTOR = 60


class _Track(IntEnum):
    UUID = 1
    NAME = 2
    PARENT_UUID = 5
    CHILD_ORDERING = 11
    SIBLING_ORDER_RANK = 12


class _Event(IntEnum):
    ANNOTATION = 4
    TYPE = 9
    TRACK_UUID = 11
    CATEGORY = 22
    NAME = 23
    FLOW_ID = 47


class _Annotation(IntEnum):
    STRING_VALUE = 6
    NAME = 10


class _Type(IntEnum):
    SLICE_BEGIN = 1
    SLICE_END = 2
    INSTANT = 3


def write(timeline: Timeline, file: BinaryIO) -> None:
    """Write the trace to `file`."""
    for packet in _packets(timeline):
        file.write(message(_Trace.PACKET, packet))


def _packets(timeline: Timeline) -> Iterator[bytes]:
    uuids: dict[object, int] = {}
    flows = _flows(timeline)
    for rank, lane in enumerate(timeline.lanes):
        if lane.group not in uuids:
            uuids[lane.group] = len(uuids) + 1
            yield _track(uuids[lane.group], lane.group, rank)
        for item in lane.items:
            key = lane, item.row
            if key not in uuids:
                uuids[key] = len(uuids) + 1
                yield _track(uuids[key], lane.name, rank, parent=uuids[lane.group])
            yield from _item(item, uuids[key], flows.get(item, ()))


def _track(uuid: int, name: str, rank: int, parent: int = 0) -> bytes:
    return integer(_Packet.SEQUENCE_ID, _SEQUENCE) + message(
        _Packet.TRACK_DESCRIPTOR,
        integer(_Track.UUID, uuid),
        string(_Track.NAME, name),
        integer(_Track.PARENT_UUID, parent) if parent else b"",
        integer(_Track.CHILD_ORDERING, _EXPLICIT_ORDER),
        integer(_Track.SIBLING_ORDER_RANK, rank),
    )


def _item(item: Item, track: int, flows: tuple[int, ...] | list[int]) -> Iterator[bytes]:
    title = item.title if item.count == 1 else f"{item.title} ×{item.count:,}"
    begin, end = round(item.begin * 1e9), round(item.end * 1e9)
    kind = _Type.INSTANT if begin == end else _Type.SLICE_BEGIN
    yield _event(
        begin,
        track,
        kind,
        string(_Event.NAME, title),
        string(_Event.CATEGORY, item.kind),
        *_annotations(item),
        fixed64s(_Event.FLOW_ID, flows),
    )
    if end > begin:
        yield _event(end, track, _Type.SLICE_END)


def _event(time: int, track: int, kind: _Type, *more: bytes) -> bytes:
    return (
        integer(_Packet.TIMESTAMP, time)
        + integer(_Packet.SEQUENCE_ID, _SEQUENCE)
        + message(
            _Packet.TRACK_EVENT,
            integer(_Event.TYPE, kind),
            integer(_Event.TRACK_UUID, track),
            *more,
        )
    )


def _annotations(item: Item) -> Iterator[bytes]:
    for event in item.events:
        for name, value in decode(event):
            yield message(
                _Event.ANNOTATION,
                string(_Annotation.NAME, f"#{event['seq']} {event['kind']} {name}"),
                string(_Annotation.STRING_VALUE, value),
            )


def _flows(timeline: Timeline) -> dict[Item, list[int]]:
    """An arrow has a number that the two items at its ends share."""
    flows: dict[Item, list[int]] = {}
    seen = set[frozenset[int]]()
    for item in timeline.items:
        for related in item.related:
            other = related.current()
            pair = frozenset((id(item), id(other)))
            ends = flows.setdefault(item, []), flows.setdefault(other, [])
            if other is item or pair in seen or any(len(end) >= _FLOWS for end in ends):
                continue
            seen.add(pair)
            for end in ends:
                end.append(len(seen))
    return flows
