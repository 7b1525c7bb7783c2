"""Wired interrupts of the SMMU and the engine, counted in the guest, on both machines."""

import json
from typing import Any

import pytest

from viommu.lab.rig import Rig
from viommu.layouts.records import EventRecord, EventType, FaultClass

STREAM = 0x10


def run(rig: Rig, case: str) -> dict[str, Any]:
    output = rig.guest.python(f"/viommu/inside/raw.py interrupts {case}")
    (line,) = [line for line in output.splitlines() if line.startswith('{"case"')]
    result: dict[str, Any] = json.loads(line)
    assert "error" not in result, result["error"]
    return result


def fault(*, write: bool) -> EventRecord:
    return EventRecord(
        event=EventType.F_TRANSLATION,
        stream_id=STREAM,
        rnw=not write,
        fault_class=FaultClass.IN,
    )


def test_an_event_interrupts_once(rig: Rig) -> None:
    result = run(rig, "event")
    assert result["works"]["status"] == "HALTED"
    assert result["quiet"] == 0
    assert result["counts"] == [1, 1, 1]
    assert result["status"] == ["ERROR"] * 4
    assert [EventRecord(int(value, 16)) for value in result["events"]] == [fault(write=False)] * 3
    assert result["off"] == 0


def test_a_global_error_interrupts_once(rig: Rig) -> None:
    result = run(rig, "global-error")
    assert (result["quiet"], result["count"], result["code"]) == (0, 1, 1)


def test_the_end_of_a_command_interrupts_when_asked_to(rig: Rig) -> None:
    result = run(rig, "completion")
    assert result["counts"] == [0, 1, 1, 1]
    assert result["status"] == ["HALTED", "HALTED", "HALTED", "ERROR"]
    assert [EventRecord(int(value, 16)) for value in result["events"]] == [fault(write=True)]


@pytest.mark.parametrize("case", ["event", "completion"])
def test_the_pin_works_again_after_a_process_that_used_it(rig: Rig, case: str) -> None:
    assert 1 in run(rig, case)["counts"]
