"""Events on the control socket: who subscribed gets them, a slow one loses some and is told, nobody is harmed."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.test_control import Service, directory, request, result
from viommu.control import CallFailed, ErrorCode
from viommu.control.subscription import Subscription, known_kinds
from viommu.smmu.events import SyncCompleted
from viommu.trace import Event, Tracer

__all__ = ["directory"]  # a fixture

Told = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class DmaSeen(Event):
    """A DMA of a stream."""

    stream_id: int
    iova: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class DmaMissed(Event):
    """Another one."""

    stream_id: int
    iova: int


@dataclass(frozen=True, slots=True)
class PacketSeen(Event):
    """Bytes, which JSON does not know."""

    data: bytes


class Source(Service):
    """A control socket with events."""

    def __init__(self, path: Path) -> None:
        self.tracer = Tracer()
        super().__init__(path, tracer=self.tracer)

    def moved(self, number: int, stream_id: int = 0x10, text: str = "") -> None:
        self.tracer.emit(DmaSeen(stream_id, number, text))

    def subscribed(self, **parameters: Any) -> socket.socket:
        client = self.connect()
        assert self.say(client, request("events.subscribe", **parameters)) == [result(None)]
        return client

    def told(self, client: socket.socket) -> Told:
        """What a client has been sent since it was asked last."""
        told: Told = []
        while self.pending(client):
            told += self.say(client, b"")
        return told

    def pending(self, client: socket.socket) -> bool:
        self.turns()
        try:
            return bool(client.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False


@pytest.fixture
def source(directory: Path) -> Iterator[Source]:
    with closing(Source(directory / "control.sock")) as made:
        yield made


def places(told: Told) -> list[int]:
    """The IOVAs of the events, or the negative number of those that were lost in their place."""
    return [
        each["params"]["iova"] if each["method"] == "events.event" else -each["params"]["count"]
        for each in told
    ]


def test_an_event_is_a_notification(source: Source) -> None:
    client = source.subscribed()
    source.moved(0x1000)
    (told,) = source.told(client)
    assert told.pop("jsonrpc") == "2.0"
    assert told["params"].pop("time") >= 0
    assert told == {
        "method": "events.event",
        "params": {
            "seq": 1,
            "kind": "DmaSeen",
            "stream_id": 0x10,
            "iova": 0x1000,
            "text": "",
        },
    }


def test_what_is_no_plain_value_is_told_as_python_shows_it(source: Source) -> None:
    client = source.subscribed()
    source.tracer.emit(PacketSeen(b"ab"))
    (told,) = source.told(client)
    assert told["params"]["data"] == "b'ab'"


def test_only_what_was_asked_for(source: Source) -> None:
    everything = source.subscribed()
    kind = source.subscribed(kinds=["DmaMissed", "SyncCompleted"])
    stream = source.subscribed(streams=[0x18])
    both = source.subscribed(kinds=["DmaSeen"], streams=[0x18, 0x20])
    source.moved(1)
    source.moved(2, 0x18)
    source.moved(3, 0x20)
    source.tracer.emit(DmaMissed(0x18, 4))
    source.tracer.emit(SyncCompleted("SIG_NONE"))
    found = [
        [each["params"].get("iova", each["params"]["kind"]) for each in source.told(client)]
        for client in (everything, kind, stream, both)
    ]
    assert found == [[1, 2, 3, 4, "SyncCompleted"], [4, "SyncCompleted"], [2, 4], [2, 3]]


def test_answers_come_between_events(source: Source) -> None:
    client = source.subscribed()
    for number in range(200):
        source.moved(number)
    told = source.say(client, request("echo", 7, text="on"))
    answers = [each for each in told if "method" not in each]
    assert answers == [result("on", 7)]
    assert places([each for each in told if "method" in each]) == list(range(200))
    assert told.index(answers[0]) < 150, "events do not keep an answer waiting"


def test_a_new_subscription_replaces_the_old_one(source: Source) -> None:
    client = source.subscribed(kinds=["DmaSeen"])
    assert source.say(client, request("events.subscribe", kinds=["DmaMissed"])) == [result(None)]
    source.moved(1)
    source.tracer.emit(DmaMissed(0x10, 2))
    assert places(source.told(client)) == [2]


def test_nobody_reads_along_when_nobody_is_subscribed(source: Source) -> None:
    assert not source.tracer
    first, second = source.subscribed(), source.subscribed()
    assert source.tracer
    assert source.say(first, request("events.unsubscribe")) == [result(None)]
    assert source.say(first, request("events.unsubscribe")) == [result(None)]
    source.moved(1)
    assert source.told(first) == []
    second.close()
    source.turns()
    assert not source.tracer
    source.moved(2)
    assert source.works()


def test_a_kind_that_is_none(source: Source) -> None:
    for kind, hint in (("DmaSee", "DmaSeen"), ("ZZZ", "what events.kinds lists")):
        (answer,) = source.say(source.connect(), request("events.subscribe", kinds=[kind]))
        assert answer["error"]["code"] == ErrorCode.REFUSED
        assert f"no kind of event {kind!r}: try {hint}" in answer["error"]["message"]
    assert not source.tracer


def test_who_is_no_client_cannot_subscribe(source: Source) -> None:
    with pytest.raises(CallFailed, match="to a client of the control socket"):
        source.methods.call("events.subscribe", {})
    source.methods.call("events.unsubscribe", {})
    assert not source.tracer


def test_the_kinds_are_listed(source: Source) -> None:
    listed = source.methods.call("events.kinds", {})
    assert {"kind": "DmaSeen", "tells": (DmaSeen.__doc__ or "")} in listed
    assert {each["kind"] for each in listed} == set(known_kinds())
    assert all(each["tells"] for each in listed)
    assert "TransactionArrived" not in known_kinds(), "a point is no event"


# Clients that are too slow


def test_a_full_subscription_counts_what_it_lost_where_it_is_missing() -> None:
    subscription = Subscription((), (), 2)
    taken: Told = []

    def emit(*numbers: int) -> None:
        for number in numbers:
            assert subscription.offer(DmaSeen(0x10, number))

    def take(count: int) -> None:
        for _ in range(count):
            assert subscription
            taken.append(subscription.take())

    emit(1, 2, 3, 4)
    take(1)
    emit(5)  # there is room again, behind the gap
    emit(6)
    take(4)
    assert not subscription
    emit(7)
    take(1)
    assert places(taken) == [1, 2, -2, 5, -1, 7]
    numbers = [each["params"]["seq"] for each in taken if each["method"] == "events.event"]
    assert numbers == [1, 2, 5, 7]


def test_a_slow_client_loses_events_and_is_told(source: Source) -> None:
    slow, quick = source.subscribed(limit=100), source.subscribed(limit=10_000)
    count, got = 5_000, 0
    for number in range(count):
        source.moved(number, text="x" * 1000)
        if number % 50 == 0:
            got += len(source.told(quick))
    assert source.works()
    got += len(source.told(quick))
    assert got == count, "one that takes its events loses none"
    found = places(source.told(slow))
    lost = -sum(place for place in found if place < 0)
    kept = [place for place in found if place >= 0]
    assert lost > 0
    assert lost + len(kept) == count
    assert kept == sorted(kept)
    source.moved(count)
    assert places(source.told(slow)) == [count], "it goes on from here"


def test_a_client_that_takes_nothing_costs_little(source: Source) -> None:
    client = source.subscribed(limit=10)
    for number in range(5000):
        source.moved(number, text="x" * 1000)
        source.turns(1)
    (held,) = (each for each in source.socket._clients.values() if each.called)
    assert len(held.answers) < 128 << 10
    assert source.works()
    client.close()
    source.turns()
    assert not source.tracer


def test_a_client_that_only_listens_any_more_is_gone(source: Source) -> None:
    client = source.subscribed()
    client.shutdown(socket.SHUT_WR)
    source.turns()
    assert source.ended(client)
    assert not source.tracer


def test_subscribers_that_come_and_go_in_the_middle(source: Source) -> None:
    for number in range(200):
        client = source.subscribed(limit=3)
        for _ in range(10):
            source.moved(number)
        if number % 2:
            os.close(client.detach())
        else:
            client.close()
    source.turns()
    assert source.works()
    assert not source.tracer
