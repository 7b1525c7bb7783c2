"""Where a disk image is plugged in. That it works is shown in a guest (`guest-tests/test_plugin.py`)."""

from pathlib import Path

import pytest

from viommu.lab.config import Machine, load_machine
from viommu.lab.disk import disk_arguments


def machine(*slots: int) -> Machine:
    """One whose SMMU is in the first of `slots`, with engines in the others."""
    found = load_machine("aarch64-virt").model_dump()
    models = ["smmuv3", *["test-engine"] * (len(slots) - 1)]
    found["devices"] = [
        {"name": f"d{slot}", "model": model, "slot": slot}
        for slot, model in zip(slots, models, strict=True)
    ]
    return Machine.model_validate(found)


@pytest.mark.parametrize(
    ("slots", "free"), [((1, 2, 3), 30), ((1, 30, 2), 28), ((2, 1, 3), 29), ((2, 29, 28), 27)]
)
def test_its_slot_is_free_and_has_not_the_interrupt_of_the_smmu(
    slots: tuple[int, ...], free: int
) -> None:
    arguments = disk_arguments(machine(*slots), Path("/a,b/disk.qcow2"))
    drive, device = arguments[1], arguments[3]
    assert f"addr={free:#x}," in device
    assert drive == "file=/a,,b/disk.qcow2,format=qcow2,if=none,id=disk,snapshot=on"
