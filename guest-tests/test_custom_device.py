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

[[devices]]
name = "broken0"
model = "broken.py:Broken"
slot = 6
"""
BROKEN = """
from viommu.endpoints.master import Bar, DmaMaster, Identity

class Broken(DmaMaster):
    identity = Identity(0x1234, 0x5307, 0xFF_0000)
    bars = (Bar(0, 0x1000),)

    def read(self, bar, offset, size):
        return 1 // offset

    def write(self, bar, offset, size, value):
        pass
"""
LOOK = b"""
import pci
for ids in (0x1234, 0x5307), (0x13B5, 0xFF80):
    function = pci.find(ids=ids)[0]
    function.enable()
    bar = function.map_bar().cast("I")
    print(hex(bar[1]), hex(bar[0]), hex(bar[1]))
"""
EXAMPLE = Path(__file__).parents[1] / "examples/custom-device"
DESTINATION = 0x2_2000_0000


@pytest.fixture
def rig(viommu_lab: Lab, machine_name: str, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    path = tmp_path_factory.getbasetemp() / f"custom-{machine_name}.toml"
    text = (machine_directory() / f"{machine_name}.toml").read_text("utf-8")
    path.write_text(text + DEVICE.format(EXAMPLE))
    path.with_name("broken.py").write_text(BROKEN)
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


def test_one_that_fails_reads_all_ones_and_fails_the_test(rig: Rig, viommu_lab: Lab) -> None:
    rig.guest.put("/viommu/inside/look.py", LOOK)
    with viommu_lab.expect("device broken0 failed: ZeroDivisionError"):
        lines = rig.guest.python("/viommu/inside/look.py").splitlines()
    ones = "0xffffffff"
    assert lines == [f"0x0 {ones} {ones}", "0x0 0x1 0x0"], "the engine's cmd is ENGINE_HALTED"
    assert "return 1 // offset" in rig.serving.output(), "with the traceback"
