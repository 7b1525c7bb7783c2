"""The trace as a file, and as somebody reads it who follows along."""

import errno
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import smmu_rig as hw
from tests.server_rig import Machine
from viommu.trace import Event, Tracer
from viommu.trace_file import TraceFile, TraceReader


@dataclass(frozen=True, slots=True)
class Ping(Event):
    number: int
    text: str = "ü\n"


@dataclass(frozen=True, slots=True)
class Packet(Event):
    data: bytes


def test_each_event_is_a_line(tmp_path: Path) -> None:
    tracer = Tracer()
    path = tmp_path / "trace.jsonl"
    with TraceFile(tracer, path):
        for number in range(3):
            tracer.emit(Ping(number))
            # A reader may follow along, and a killed server loses nothing.
            assert len(path.read_text().splitlines()) == number + 1
    assert not tracer
    tracer.emit(Ping(3))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(line) for line in lines] == [["seq", "time", "kind", "number", "text"]] * 3
    assert [line["seq"] for line in lines] == [1, 2, 3]
    assert [line["number"] for line in lines] == [0, 1, 2]
    assert lines[0]["text"] == "ü\n"
    times = [line["time"] for line in lines]
    assert 0 <= times[0] <= times[1] <= times[2] < 10


def test_what_is_no_plain_value_is_told_as_python_shows_it(tmp_path: Path) -> None:
    tracer = Tracer()
    path = tmp_path / "trace.jsonl"
    with TraceFile(tracer, path):
        tracer.emit(Packet(b"\0ab"))
    assert json.loads(path.read_text())["data"] == r"b'\x00ab'"


def test_closing_twice(tmp_path: Path) -> None:
    file = TraceFile(Tracer(), tmp_path / "trace.jsonl")
    file.close()
    file.close()


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    tracer = Tracer()
    with pytest.raises(FileNotFoundError):
        TraceFile(tracer, tmp_path / "none" / "trace.jsonl")
    assert not tracer


def test_a_full_disk_ends_the_trace_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer()
    seen: list[Event] = []
    with TraceFile(tracer, Path("/dev/full")):
        tracer.subscribe(seen.append)
        tracer.emit(Ping(1))
        tracer.emit(Ping(2))
    assert seen == [Ping(1), Ping(2)]
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "the trace ends before event 1: No space left on device")
    ]
    assert errno.ENOSPC == 28


def test_a_reader_sees_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.touch()
    with TraceReader(path) as reader, path.open("a") as writer:
        assert reader.read() == []
        for part, expected in (
            ('{"seq":1}\n{"se', [{"seq": 1}]),
            ('q":', []),
            ('2}\n{"seq":3}\n', [{"seq": 2}, {"seq": 3}]),
            ("", []),
        ):
            writer.write(part)
            writer.flush()
            assert reader.read() == expected


def test_a_reader_of_some_kinds_and_one_that_skips(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"seq":1,"kind":"A"}\n{"seq":2,"kind":"B","text":"A"}\n{"seq":3,"ki')
    with (
        TraceReader(path, "A", "C") as some,
        TraceReader(path) as later,
        path.open("a") as writer,
    ):
        assert some.read() == [{"seq": 1, "kind": "A"}]
        later.skip()
        assert writer.write('nd":"C"}\n')
        writer.flush()
        assert some.read() == later.read() == [{"seq": 3, "kind": "C"}]


def test_the_file_has_every_event_of_a_server_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with (
        tempfile.TemporaryDirectory(prefix="vt-", dir="/tmp") as directory,
        Machine(Path(directory)) as machine,
        TraceFile(machine.server.tracer, path),
        TraceReader(path) as reader,
    ):
        followed = reader.read()
        smmu = machine.connect("smmu")
        smmu.put(hw.CR0, hw.SMMUEN)
        engines = [machine.connect(f"engine{n}", bus_master=True) for n in range(2)]
        for engine in engines:
            engine.fill(1 << 16, rate=1)
            engine.start()
        smmu.put(hw.CR0, 0)
        for engine in engines:
            engine.start()
        machine.run()
        followed += reader.read()
        events = [event.as_dict() for event in machine.events]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == followed
    assert [line.pop("seq") for line in lines] == list(range(1, len(events) + 1))
    assert [line.pop("time") >= 0 for line in lines] == [True] * len(events)
    assert lines == json.loads(json.dumps(events))
    kinds = {line["kind"] for line in lines}
    assert kinds >= {"ClientAttached", "BusMasterChanged", "RegisterAccess", "EngineStarted"}
    assert kinds >= {"DmaMoved", "EngineEnded"}
