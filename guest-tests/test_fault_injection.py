"""Plans that are loaded while a stock kernel drives the SMMU: what reaches it, and what it says."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from linux_rig import LinuxRig, Result, logged

from viommu.control import Refused
from viommu.layouts.records import EventType

Load = Callable[[str], None]


@pytest.fixture
def load(linux: LinuxRig) -> Iterator[Load]:
    """Loads a plan into the running server, and empties the kernel's log before."""

    def from_text(plan: str) -> None:
        linux.run("dmesg -c > /dev/null")
        control(linux, "faults.load", plan=plan)

    yield from_text
    if not linux.rig.lost:
        control(linux, "faults.clear")


def control(linux: LinuxRig, method: str, **parameters: Any) -> Any:
    return linux.rig.serving.control.call(method, **parameters)


def said(linux: LinuxRig, words: str) -> str:
    """The kernel's log, once it has a line with `words`; at most a few seconds are given to it."""
    return linux.run(
        f"for i in $(seq 50); do dmesg | grep -q '{words}' && break; sleep 0.1; done; dmesg"
    )


def case(linux: LinuxRig, name: str) -> Result:
    (result,) = linux.cases(f"vfio {name}")
    assert "error" not in result, result["error"]
    return result


def events(result: Result) -> list[EventType]:
    return [record.event for record in logged(result["log"])]


LOST_SYNC = """
[[fault]]
at = "sync-completing"
when = { nth = 1, since = { event = "EngineEnded" } }
do = "skip"
"""


def test_a_lost_completion_is_a_timeout_and_then_all_is_well(linux: LinuxRig, load: Load) -> None:
    load(LOST_SYNC)
    result = case(linux, "unmap")
    assert result["status"] == "ERROR"
    assert events(result) == [EventType.F_TRANSLATION]
    assert said(linux, "CMD_SYNC timeout").count("CMD_SYNC timeout") == 1
    assert case(linux, "reopen")["landed"]


STORM = """
[[effect]]
on = { event = "EngineStarted" }
when = { times = 1 }
call = "smmu.record"
arguments = { event = "F_TRANSLATION", stream_id = 0x18, address = 0x1234_5000, times = 3000 }
"""


def test_a_storm_of_records_is_handled_and_hardly_logged(linux: LinuxRig, load: Load) -> None:
    load(STORM)
    seen = linux.events_of(lambda: case(linux, "few-rounds"))
    assert sum(event["kind"] == "EventRecorded" for event in seen) == 3000
    records = logged(said(linux, "event").splitlines())
    assert 1 <= len(records) <= 50
    assert {(record.stream_id, record.address) for record in records} == {(0x18, 0x1234_5000)}
    # The queue was emptied: the next one is heard of.
    assert linux.events_of(lambda: case(linux, "unmap"))
    assert not any(event["kind"] == "EventLost" for event in seen)


def test_a_global_error_is_said(linux: LinuxRig, load: Load) -> None:
    load("")
    control(linux, "smmu.raise_error", error="EVENTQ_ABT_ERR")
    log = said(linux, "EVTQ write aborted")
    assert "unexpected global error reported (0x00000004)" in log
    assert "EVTQ write aborted -- events may have been lost" in log
    assert case(linux, "reopen")["landed"]


INVALID_STE = """
[[fault]]
at = "structure-read"
when = { structure = "STE", stream_id = 0x10 }
do = { action = "replace", keep = 0 }
"""


def test_a_corrupt_ste_is_decoded(linux: LinuxRig, load: Load) -> None:
    load(INVALID_STE)
    result = case(linux, "read-only")
    assert (result["status"], result["zero"]) == ("ERROR", True)
    assert events(result) == [EventType.C_BAD_STE]
    control(linux, "faults.clear")
    assert events(case(linux, "read-only")) == [EventType.F_PERMISSION]


LOST_INTERRUPT = """
[[fault]]
at = "interrupt-raised"
when = { cause = "EVENTQ", nth = 1 }
do = "skip"
"""


def test_what_a_lost_interrupt_told_of_is_found_with_the_next(linux: LinuxRig, load: Load) -> None:
    load(LOST_INTERRUPT)
    lost, found = case(linux, "read-only"), case(linux, "read-only")
    assert (lost["interrupts"], lost["log"]) == (0, [])
    assert found["interrupts"] == 1
    assert events(found) == [EventType.F_PERMISSION] * 2


ALL_ONES = """
[[fault]]
at = "mmio-access"
when = { function = "smmu", register = "GERROR", write = false, nth = 1 }
do = "skip"
"""


def test_a_register_of_all_ones_is_the_end_of_the_smmu(linux: LinuxRig, load: Load) -> None:
    """Among them is the bit of service failure mode: the kernel switches the SMMU off."""
    load(ALL_ONES)
    control(linux, "function.interrupt", function="smmu")
    assert "device has entered Service Failure Mode" in said(linux, "Service Failure Mode")
    control(linux, "faults.clear")
    linux.rig.reboot(hard=True)
    linux.run("modprobe vfio_iommu_type1")
    assert case(linux, "reopen")["landed"]


def test_a_plan_comes_and_goes_while_the_guest_runs(linux: LinuxRig, load: Load) -> None:
    assert control(linux, "faults.list") == []
    load(INVALID_STE)
    refused = case(linux, "read-only")
    (rule,) = control(linux, "faults.list")
    assert (rule["line"], rule["at"], rule["does"]) == (2, "structure-read", "replace")
    assert rule["count"] >= 1
    control(linux, "faults.clear")
    assert control(linux, "faults.list") == []
    assert refused["status"] == "ERROR"
    assert case(linux, "reopen")["landed"]


def test_a_wrong_plan_is_refused_with_its_place(linux: LinuxRig, load: Load) -> None:
    load(LOST_INTERRUPT)
    wrong = (
        LOST_INTERRUPT.replace("EVENTQ", "GERROR") + '\n[[fault]]\nat = "nowhere"\ndo = "skip"\n'
    )
    with pytest.raises(Refused, match=r"plan, line 7: at: 'nowhere' is no point, allowed: dma-"):
        control(linux, "faults.load", plan=wrong)
    assert [rule["at"] for rule in control(linux, "faults.list")] == ["interrupt-raised"]
