"""Domains in the guest: their calls on the raw SMMU in a BAR, with the engines as their devices, on both machines.

Scripts in the guest report what they saw; it is judged here.
"""

import pytest
from raw_rig import Case, Result, results

from tests.domain_tables import DEVICES, table
from viommu.driver.domains import Step
from viommu.lab.rig import Rig
from viommu.layouts.test_engine import EngineCommand

PAGE = 4096
SOURCE, DESTINATION = 0x1000_0000, 0x2_2000_0000
STREAM, SECOND_STREAM = 0x10, 0x18
HALTED, ERROR = EngineCommand.HALTED.name, EngineCommand.ERROR.name


def went_through(result: Result) -> bool:
    """A page of the pattern: nearly every byte of it is other than before."""
    return bool(result["status"] == HALTED and PAGE // 2 < result["bytes"] <= PAGE)


def refused(result: Result) -> bool:
    return result == {"status": ERROR, "bytes": 0}


# Statuses


@pytest.mark.parametrize("state", dict.fromkeys(state for _, state in table(DEVICES)))
def test_the_status_of_each_call(raw_case: Case, state: str) -> None:
    result = raw_case(f"domains/statuses {state}")
    expected = {call: status.name for (call, s), status in table(DEVICES).items() if s == state}
    assert result["statuses"] == expected
    assert result["global_errors"] == 0


# What DMA does


def test_a_managed_domain_and_two_engines_that_leave_together(raw_case: Case) -> None:
    result = raw_case("domains/managed")
    assert result["statuses"] == ["SUCCESS"] * 4
    for step, through in (("empty", False), ("attached", True), ("gone", False), ("after", False)):
        judge = went_through if through else refused
        assert [judge(engine) for engine in result[step]] == [True, True], step


def test_an_unmanaged_domain(raw_case: Case) -> None:
    result = raw_case("domains/unmanaged")
    assert result["statuses"] == ["SUCCESS"] * 2
    assert refused(result["blocked"])
    assert result["blocked_events"] == []
    assert went_through(result["attached"])
    # Until the owner flushes, what is unmapped still works.
    assert went_through(result["stale"])
    assert refused(result["flushed"])


def test_pass_through(raw_case: Case) -> None:
    result = raw_case("domains/pass-through")
    assert result["statuses"] == ["SUCCESS"]
    assert went_through(result["attached"])
    assert refused(result["after"])


# Detach

STEPS = [step.value for step in Step]


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("steps", ["invalidate-atc", "end-stalls"]),
        ("steps-ats", ["end-stalls"]),
        ("steps-stalls", ["invalidate-atc"]),
    ],
)
def test_a_detach_under_load_goes_step_by_step(
    raw_case: Case, name: str, absent: list[str]
) -> None:
    result = raw_case(f"domains/{name}")
    assert result["streams"] == [STREAM, SECOND_STREAM]
    *steps, end = result["told"]
    assert [step["step"] for step in steps] == [step for step in STEPS if step not in absent]
    for step in steps:
        assert (step["kind"], step["device"], step["status"]) == (
            "DetachStepped",
            "pair",
            "SUCCESS",
        )
        assert step["seconds"] > 0
    times = [result["started"], *(event["time"] for event in result["told"]), result["ended"]]
    assert times == sorted(times)
    assert sum(step["seconds"] for step in steps) <= result["ended"] - result["started"]
    assert end == {
        "kind": "DeviceDetached",
        "time": end["time"],
        "domain": result["domain"],
        "device": "pair",
        "input_mapping_id": 0,
        "status": "SUCCESS",
    }
    # They were at work, and were told that it is over.
    assert result["engines"] == [ERROR, ERROR]
    assert [refused(engine) for engine in result["after"]] == [True, True]


def test_a_detach_that_cannot_complete(raw_case: Case) -> None:
    result = raw_case("domains/stuck")
    assert result["statuses"] == ["IO_TIMEOUT", "INVALID_DEVICE_STATE", "SUCCESS"]
    assert result["patience"] <= result["seconds"] < result["patience"] + 5
    assert (result["config"], result["state"]) == ("ABORT", "blocked")
    assert went_through(result["attached"])
    assert refused(result["after"])
    assert went_through(result["back"])


# Faults


def heard(kind: str, address: int | None, *, write: bool = True, **flags: object) -> Result:
    fault = {
        "type": kind,
        "address": address,
        "stream_id": STREAM,
        "substream_id": None,
        "write": write,
        "instruction": False,
        "privileged": False,
        **flags,
    }
    return {"heard": [fault], "unclaimed": 0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("translation", heard("TRANSLATION", SOURCE + 0x10)),
        ("translation-read", heard("TRANSLATION", SOURCE, write=False)),
        (
            "translation-instruction",
            heard("TRANSLATION", SOURCE, write=False, instruction=True),
        ),
        ("permission", heard("PERMISSION", DESTINATION)),
        ("permission-privileged", heard("PERMISSION", DESTINATION, privileged=True)),
        ("access-flag", heard("ACCESS_FLAG", DESTINATION + PAGE)),
        ("unprivileged", heard("PERMISSION", DESTINATION + 2 * PAGE, write=False)),
        (
            "substream",
            heard("UNSUPPORTED_UPSTREAM_TRANSACTION", None, write=False, substream_id=5),
        ),
        ("external", heard("EXTERNAL", SOURCE)),
    ],
)
def test_the_faults_of_a_device_reach_its_handler(
    raw_case: Case, name: str, expected: Result
) -> None:
    assert raw_case("domains/faults")[name] == expected


def test_after_a_detach_no_fault_arrives(raw_case: Case) -> None:
    result = raw_case("domains/faults")
    # What came before it is handed over by it.
    assert result["flushed"] == heard("TRANSLATION", SOURCE)["heard"]
    assert result["after"] == {"heard": [], "unclaimed": 0}
    assert result["not-listening"] == {"heard": [], "unclaimed": 1}


def test_stalled_transactions_are_answered_or_ended(raw_case: Case) -> None:
    result = raw_case("domains/stalls")
    assert result["answered"] == HALTED
    assert result["waits"]
    assert result["status"] == "SUCCESS"
    assert result["ended"] == ERROR


# The verifier


def test_a_call_within_a_call_is_reported_with_both_callers(raw_case: Case) -> None:
    result = raw_case("domains/verifier")
    assert result["inner"] == ["VERIFIER_STOP"]
    assert result["status"] == "SUCCESS"
    (violation,) = [event for event in result["told"] if event["kind"] == "ConcurrentCalls"]
    assert violation["device"] == "engine0"
    assert violation["first"]["call"] == "detach_device"
    assert violation["second"]["call"] == "attach_device"
    for caller, function in (("first", "verifier"), ("second", "call_back")):
        assert "raw_domains.py:" in violation[caller]["place"]
        assert f"({function})" in violation[caller]["place"]
    assert result["config"] == "ABORT"
    assert refused(result["after"])


# Races


def test_two_hundred_detaches_race_dma(rig: Rig) -> None:
    """Zero bytes land after a detach is complete; the server's own account agrees."""
    with rig.serving.trace() as reader:
        reader.read()
        runs = list(results(rig, "domains_race", timeout=240))
        trace = reader.read()
    assert [run.get("error") for run in runs] == [None] * len(runs)
    assert sum(run["detaches"] for run in runs) == 200
    for run in runs:
        assert run["statuses"] == ["SUCCESS"], run["seed"]
        assert run["late_bytes"] == 0, run["seed"]
        assert run["events"] == [], run["seed"]
    # The points differ from seed to seed, and most detaches found the engines at work.
    assert len({tuple(run["points"]) for run in runs}) == len(runs)
    assert sum(run["cut_short"] for run in runs) > 100
    # In the server: when TLBI comes, both streams are drained; until an STE lets a stream through again, nothing moves.
    closed: set[int] = set()
    late = moved = 0
    for event in trace:
        match event["kind"]:
            case "CommandConsumed" if event["opcode"] == "CMD_TLBI_NH_ASID":
                closed = {STREAM, SECOND_STREAM}
            case "StructureFetched" if "S1_TRANSLATE" in event["text"]:
                closed.discard(event["stream_id"])
            case "DmaMoved":
                moved += 1
                late += event["stream_id"] in closed
    assert late == 0
    assert moved > 1000
