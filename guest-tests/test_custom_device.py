"""The device of examples/custom-device where no driver of the guest's kernel is in the way, on both machines."""

from pathlib import Path
from typing import Any

import pytest
from conftest import FAULTS
from raw_rig import results

from viommu.lab.config import machine_directory
from viommu.lab.rig import Rig
from viommu.layouts.records import EventRecord, EventType
from viommu.pytest_plugin.lab import Lab

DEVICE = """
[[devices]]
name = "copy0"
model = "{}/copy_engine.py:CopyEngine"
slot = 4
"""
EXAMPLE = Path(__file__).parents[1] / "examples/custom-device"
DESTINATION = 0x2_2000_0000


@pytest.fixture
def rig(viommu_lab: Lab, machine_name: str, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    path = tmp_path_factory.getbasetemp() / f"custom-{machine_name}.toml"
    text = (machine_directory() / f"{machine_name}.toml").read_text("utf-8")
    path.write_text(text + DEVICE.format(EXAMPLE))
    viommu_lab.allow(FAULTS)
    return viommu_lab.rig(machine=path, raw=True)


def copied(rig: Rig) -> dict[str, Any]:
    (result,) = results(rig, "custom")
    assert "error" not in result, result["error"]
    return result


def test_it_copies_through_the_smmu_until_it_is_unmapped(rig: Rig) -> None:
    result = copied(rig)
    assert result["mapped"] == [0, 1, True]
    assert result["unmapped"] == [0, 2, False]
    (record,) = (EventRecord(int(value, 16)) for value in result["events"])
    assert (record.event, record.stream_id) == (EventType.F_TRANSLATION, 0x20)
    assert record.address == DESTINATION


def test_a_host_domain_blocks_it(rig: Rig) -> None:
    control = rig.serving.control
    control.call("host.block", endpoint="copy0")
    assert copied(rig)["mapped"] == [2, 0, False]
    control.call("host.unblock", endpoint="copy0")
    assert copied(rig)["mapped"] == [0, 1, True]
