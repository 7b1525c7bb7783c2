"""What only some profiles show, in guests: PASIDs that have to be enabled, and the VATOS page."""

import json
from collections.abc import Callable
from typing import Any

from linux_rig import LinuxRig

from viommu.lab.rig import Rig
from viommu.layouts.atos import AtosFault, AtosResult
from viommu.layouts.records import EventRecord, EventType

STREAM, SUBSTREAM, SOURCE = 0x10, 5, 0x1000_0000


def run(rig: Rig, case: str) -> dict[str, Any]:
    output = rig.guest.python(f"/viommu/inside/raw.py profile {case}")
    (line,) = [line for line in output.splitlines() if line.startswith('{"case"')]
    result: dict[str, Any] = json.loads(line)
    assert "error" not in result, result["error"]
    return result


def test_a_pasid_goes_out_once_it_is_enabled(full_rig: Rig) -> None:
    result = run(full_rig, "pasid")
    assert result["capability"]
    assert result["at_reset"] == 0
    for refused in (result["before"], result["after"]):
        # The function does not send it: the SMMU sees nothing.
        assert (refused["status"], refused["error_address"]) == ("ERROR", SOURCE)
        assert refused["events"] == []
    assert (result["enabled"]["status"], result["enabled"]["right_pages"]) == ("HALTED", 1)
    assert result["none"]["status"] == "ERROR"
    (event,) = result["none"]["events"]
    expected = EventRecord(
        event=EventType.C_BAD_CD, stream_id=STREAM, ssv=True, substream_id=SUBSTREAM + 1
    )
    assert EventRecord(int(event, 16)) == expected


def test_the_vatos_page_answers(full_rig: Rig) -> None:
    result = run(full_rig, "vatos")
    assert result["idr0"] >> 20 & 1
    mapped, unmapped, other = (int(result[key], 16) for key in ("mapped", "unmapped", "other_vmid"))
    assert not AtosResult(mapped).fault
    assert AtosResult(mapped).address == result["frame"]
    assert AtosFault(unmapped) == AtosFault(fault=True, fault_code=EventType.F_TRANSLATION)
    assert AtosFault(other) == AtosFault(fault=True, fault_code=EventType.C_BAD_STE)


def test_the_stock_driver_takes_the_larger_bar(profiled: Callable[[str], LinuxRig]) -> None:
    linux = profiled("vatos = true")
    assert linux.id_registers["IDR0"] >> 20 & 1
    (result,) = linux.cases("vfio open-close")
    assert "error" not in result, result
    function = linux.run("cat /sys/bus/pci/devices/0000:00:01.0/resource").splitlines()[0].split()
    assert int(function[1], 16) - int(function[0], 16) + 1 == 0x4_0000
