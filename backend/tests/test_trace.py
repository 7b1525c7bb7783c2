"""The stream of events, and what the SMMU puts into it."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.trace import Event, Tracer


@dataclass(frozen=True, slots=True)
class Ping(Event):
    number: int


def test_readers_get_every_event_in_order() -> None:
    tracer = Tracer()
    first: list[Event] = []
    second: list[Event] = []
    stop = tracer.subscribe(first.append)
    tracer.emit(Ping(1))
    tracer.subscribe(second.append)
    tracer.emit(Ping(2))
    stop()
    tracer.emit(Ping(3))
    assert first == [Ping(1), Ping(2)]
    assert second == [Ping(2), Ping(3)]


def test_a_tracer_is_true_while_somebody_reads() -> None:
    tracer = Tracer()
    assert not tracer
    stop = tracer.subscribe(lambda event: None)
    assert tracer
    stop()
    assert not tracer


def test_what_is_caused_and_what_is_said_to_it_is_told_as_such() -> None:
    tracer = Tracer()
    told: list[tuple[Event, bool]] = []

    def answer(event: Event) -> None:
        if event == Ping(1):
            with tracer.causing():
                tracer.emit(Ping(2))
            tracer.emit(Ping(3))
        elif event == Ping(2):
            tracer.emit(Ping(4))

    tracer.subscribe(answer)
    tracer.subscribe(lambda event: told.append((event, tracer.caused)))
    tracer.emit(Ping(1))
    assert told == [(Ping(1), False), (Ping(2), True), (Ping(3), False), (Ping(4), True)]
    assert not tracer.caused


def test_a_reader_may_stop_while_it_is_called() -> None:
    tracer = Tracer()
    seen: list[str] = []

    def once(event: Event) -> None:
        seen.append("once")
        stop()

    stop = tracer.subscribe(once)
    tracer.subscribe(lambda event: seen.append("other"))
    tracer.emit(Ping(1))
    tracer.emit(Ping(2))
    assert seen == ["once", "other", "other"]


def test_what_a_reader_emits_comes_after_what_it_was_called_with() -> None:
    tracer = Tracer()
    seen: list[Event] = []

    def answer(event: Event) -> None:
        if event == Ping(1):
            tracer.emit(Ping(2))
            tracer.emit(Ping(3))

    tracer.subscribe(answer)
    tracer.subscribe(seen.append)
    tracer.emit(Ping(1))
    tracer.emit(Ping(4))
    assert seen == [Ping(1), Ping(2), Ping(3), Ping(4)]


def test_a_reader_that_fails_holds_up_nobody() -> None:
    tracer = Tracer()

    def fail(event: Event) -> None:
        raise RuntimeError(event.kind)

    stop = tracer.subscribe(fail)
    with pytest.raises(RuntimeError, match="Ping"):
        tracer.emit(Ping(1))
    stop()
    seen: list[Event] = []
    tracer.subscribe(seen.append)
    tracer.emit(Ping(2))
    assert seen == [Ping(2)]


def test_events_are_plain_and_do_not_change() -> None:
    event = Ping(5)
    assert event.kind == "Ping"
    assert event.as_dict() == {"kind": "Ping", "number": 5}
    assert next(iter(event.as_dict())) == "kind"
    with pytest.raises(FrozenInstanceError):
        event.number = 6  # type: ignore[misc]


def test_what_the_smmu_emits() -> None:
    tracer = Tracer()
    events: list[Event] = []
    rig = Rig(tracer=tracer)
    rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE)
    tracer.subscribe(events.append)

    def kinds() -> list[str]:
        found = [event.kind for event in events if event.kind != "RegisterAccess"]
        events.clear()
        return found

    held = rig.begin(0x1000, 16)
    assert kinds() == ["StructureFetched", "StructureFetched", "Translated"]
    rig.submit((0x30, 0), (0x46, 0))
    assert kinds() == ["CommandConsumed", "SyncWaiting"]
    rig.smmu.retire(held)
    assert kinds() == ["CommandConsumed", "SyncCompleted"]
    rig.submit((0xFF, 0))
    assert kinds() == ["CommandFailed", "GlobalErrorRaised"]
    rig.fault(0x9000)
    assert kinds() == ["Aborted", "EventRecorded"]
    rig.write(hw.CR0, hw.SMMUEN)
    rig.fault(0x9000)
    assert kinds() == ["Aborted", "EventLost"]


def test_the_contents_of_what_the_smmu_emits() -> None:
    tracer = Tracer()
    events: dict[str, Event] = {}
    rig = Rig(tracer=tracer)
    rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE)
    tracer.subscribe(lambda event: events.update({event.kind: event}))
    rig.go(0x1010, 16, write=True)
    assert events["Translated"].as_dict() == {
        "kind": "Translated",
        "stream_id": hw.STREAM,
        "substream_id": None,
        "iova": 0x1010,
        "size": 16,
        "write": True,
        "runs": 1,
        "first": 0xA010,
        "transaction": 1,
    }
    fetched = events["StructureFetched"].as_dict()
    assert (fetched["structure"], fetched["address"]) == ("CD", rig.cd_address)
    assert "asid=0x7" in fetched["text"]
    rig.fault(0x9000)
    assert events["Aborted"].as_dict()["event"] == "F_TRANSLATION"
    assert events["EventRecorded"].as_dict()["index"] == 0
    rig.read(hw.CR0ACK)
    assert events["RegisterAccess"].as_dict() == {
        "kind": "RegisterAccess",
        "name": "CR0ACK",
        "write": False,
        "size": 4,
        "value": 0xD,
    }
    rig.submit((0x12 | 7 << 48, 0x5000))
    consumed = events["CommandConsumed"].as_dict()
    assert (consumed["opcode"], consumed["index"]) == ("CMD_TLBI_NH_VA", 0)
    assert "address=0x5000" in consumed["text"]
    assert consumed["value"] == 0x12 | 7 << 48 | 0x5000 << 64
