"""`viommu ctl` on a server: tables for people, JSON for programs, events as they come, what the shell completes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import Run, home, mistake, printed, start, viommu
from viommu.cli.shown import event_line, shown
from viommu.control import ControlClient

__all__ = ["home", "viommu"]  # fixtures


@pytest.fixture
def server(home: Path) -> Iterator[None]:
    with start("serve") as process:
        printed(process)
        yield


LOOKS = (
    *("registers", "queues", "stalls", "streams", "domains", "tlb", "cache"),
    *("stream stream_id=0x10", "contexts stream_id=16", "walk stream_id=0x10 iova=0x1000"),
)
OTHER_LOOKS = ("function.list", "dma.in_flight", "dma.state", "events.kinds", "host.domains")


def test_every_look_has_a_table_and_json(viommu: Run, server: None) -> None:
    for words in (*(f"smmu.{look}" for look in LOOKS), *OTHER_LOOKS):
        each = words.split()
        plain, parsed = viommu("ctl", *each), viommu("ctl", "--json", *each)
        assert (plain.code, plain.err, parsed.code, parsed.err) == (0, "", 0, ""), each
        assert plain.out.strip(), each
        assert max(map(len, plain.out.splitlines())) <= 80, each
        assert isinstance(json.loads(parsed.out), (list, dict)), each


def test_what_a_table_says(viommu: Run, server: None) -> None:
    assert re.search(r"│ IDR1 +│ 0x4 +│ 0x\w+ +│ sidsize=0x10", viommu("ctl", "smmu.registers").out)
    assert re.search(r"paused +no\n", viommu("ctl", "dma.state").out)
    paused = viommu("ctl", "dma.pause").out
    assert re.search(r"paused +yes\n", paused)
    assert re.search(r"│ engine0 +│ 0x10 +│ no +│ 0 +│", paused)
    mistake(viommu("ctl", "dma.step", "steps=0"), "dma.step: steps: input should be greater than")
    viommu("ctl", "dma.resume")
    mistake(viommu("ctl", "dma.step"), "DMA is not paused: call dma.pause first")


def test_the_socket_can_come_from_the_environment(
    viommu: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIOMMU_CONTROL", str(home / "own.sock"))
    mistake(viommu("ctl"), f"nobody serves {home}/own.sock")
    with start("serve", "--control", home / "own.sock", "--directory", home) as process:
        printed(process)
        assert "dma.pause" in viommu("ctl").out


# Tables


def rendered(result: Any, capsys: pytest.CaptureFixture[str]) -> str:
    from rich.console import Console

    Console(width=100).print(shown(result), highlight=False)
    return capsys.readouterr().out


def test_a_walk_as_people_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    ste = {"address": 0x4000_0400, "fields": {"valid": True, "config": "S1_TRANSLATE"}}
    leaf = {"stage": 1, "level": 3, "address": 0x4000_2008, "value": 0x4123_4443, "kind": "page"}
    text = rendered(
        {
            "iova": 0x1000,
            "ste": {**ste, "words": [1, 2]},
            "cd": None,
            "descriptors": [{**leaf, "fields": {"valid": True, "address": 0x4123_4000}}],
            "size": 4096,
        },
        capsys,
    )
    assert "iova  0x1000" in text
    assert re.search(r"ste +0x40000400: valid config=S1_TRANSLATE\s", text)
    assert re.search(r"cd +—", text)
    assert re.search(
        r"1 +│ 3 +│ 0x40002008 +│ 0x41234443 +│ page +│ valid address=0x41234000", text
    )
    assert "words" not in text


def test_rows_within_rows_and_what_was_cut(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"index": 3, "fields": {"opcode": "CMD_SYNC"}}]
    queues = [{"queue": "command", "entries": entries}, {"queue": "event", "entries": []}]
    text = rendered(queues, capsys)
    assert "command: entries" in text
    assert "event: entries" not in text
    assert re.search(r"3 +│ opcode=CMD_SYNC", text)
    assert "go on with first=0x40" in rendered({"streams": [{"a": 1}], "next": 64}, capsys)
    assert "There are more" in rendered({"entries": [{"a": 1}], "more": True}, capsys)
    assert "more" not in rendered({"entries": [{"a": 1}], "more": False}, capsys)


def test_an_event_is_a_line() -> None:
    told = {"seq": 4, "time": 1.5, "kind": "DmaMoved", "stream_id": 16, "write": True, "x": None}
    assert event_line(told) == "    1.500000  DmaMoved                stream_id=0x10 write=yes x=—"


# Events


@pytest.fixture
def follow(server: None) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `viommu ctl events …`, and makes two events once it is subscribed."""
    started: list[subprocess.Popen[str]] = []

    def run(*words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-P", "-m", "viommu.cli", "ctl", "events", *words]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def storm(home: Path, process: subprocess.Popen[str]) -> str:
    """Make events until the process has printed one."""
    (path,) = home.glob("viommu/run-*/control.sock")
    os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
    with ControlClient(path) as client:
        line = ""
        while not line.endswith("\n"):
            client.call("smmu.raise_error", error="SFM_ERR")
            client.call("smmu.record", event="F_TRANSLATION", stream_id=0x10)
            client.call("smmu.record", event="F_TRANSLATION", stream_id=0x18)
            client.call("smmu.reset")
            assert process.poll() is None, process.communicate()
            line += process.stdout.readline()  # type: ignore[union-attr]
    return line


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """What Ctrl-C makes of it: the exit code, and what it has to say."""
    os.set_blocking(process.stdout.fileno(), True)  # type: ignore[union-attr]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    return process.returncode, err


def test_events_are_followed_until_ctrl_c(
    follow: Callable[..., subprocess.Popen[str]], home: Path
) -> None:
    process = follow("EventLost", "--stream", "0x18")
    line = storm(home, process)
    assert re.match(r" +\d+\.\d{6}  EventLost +event=F_TRANSLATION stream_id=0x18 why=", line)
    assert end(process) == (0, "")


def test_events_as_json_lines(follow: Callable[..., subprocess.Popen[str]], home: Path) -> None:
    process = follow("EventLost", "GlobalErrorRaised", "--json")
    event = json.loads(storm(home, process))
    assert event["kind"] in ("EventLost", "GlobalErrorRaised")
    assert event["seq"] >= 1
    assert end(process) == (0, "")


def test_what_cannot_be_followed(viommu: Run, server: None) -> None:
    mistake(viommu("ctl", "events", "EventLos"), "no kind of event 'EventLos': try EventLost")
    mistake(viommu("ctl", "events", "--stream", "z"), "'z' is no StreamID: write a number")
    mistake(viommu("ctl", "dma.state", "--stream", "1"), "--stream is for events: give dma.state")


def test_the_server_ends_under_it(follow: Callable[..., subprocess.Popen[str]], home: Path) -> None:
    process = follow()
    storm(home, process)
    (path,) = home.glob("viommu/run-*/control.sock")
    with ControlClient(path) as client, pytest.raises(Exception, match="closed"):
        client.call("server.die")
    os.set_blocking(process.stdout.fileno(), True)  # type: ignore[union-attr]
    _, err = process.communicate(timeout=20)
    assert err == "viommu: the server closed the control socket\n"
    assert process.returncode == 1


# Completion


def completed(line: str) -> list[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    asked = {"_VIOMMU_COMPLETE": "complete_bash", "COMP_WORDS": line}
    script = "from viommu.cli import app; app(prog_name='viommu')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, **asked, "COMP_CWORD": str(len(words) - 1)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout.split()


def test_the_shell_completes_what_the_server_has(server: None) -> None:
    assert "dma.pause" in completed("viommu ctl dma.")
    assert "smmu.walk" not in completed("viommu ctl dma.")
    assert completed("viommu ctl even")[0] == "events"
    assert completed("viommu ctl smmu.walk stream_id=1 ")[:1] == ["iova="]
    assert completed("viommu ctl events EventL") == ["EventLost"]


def test_the_shell_completes_nothing_without_a_server(home: Path) -> None:
    assert completed("viommu ctl dma.") == []


def test_a_terminal_that_is_not_of_unicode(server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows a question mark for what it does not have."""
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    with start("ctl", "function.list") as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert re.search(r"engine0 .* \?", out), out
