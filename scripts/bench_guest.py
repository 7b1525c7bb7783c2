"""The benchmarks that need a guest: its stock arm-smmu-v3 driver on our SMMU, and on QEMU's in-process one."""

import json

from viommu.lab.assets import Assets
from viommu.lab.config import load_machine, scripts_directory
from viommu.lab.guest import Guest
from viommu.lab.rig import Rig

MACHINE = "aarch64-virt"
# QEMU's own educational device, in the same slot of both machines: what is attached is the same, the SMMU is not.
# Slots equal to the SMMU's modulo 4 share its interrupt.
EDU = ("-device", "edu,addr=0x6")
EDU_IDS = "1234:11e8"
ROUNDS = 50


def attach_times() -> dict[str, dict[str, float]]:
    """Milliseconds of an attach and detach, by SMMU ("ours", "qemu") and knob ("vfio", "flip")."""
    assets = Assets.load()
    scripts = scripts_directory()
    with Rig(MACHINE, assets=assets, linux_driver=True, scripts=scripts, qemu_arguments=EDU) as rig:
        ours = _measure(rig.guest)
    machine = load_machine(MACHINE)
    own = f"{machine.machine},iommu=smmuv3"
    machine = machine.model_copy(update={"machine": own, "devices": ()})
    with Guest(machine, assets, scripts=scripts, qemu_arguments=EDU) as guest:
        qemu = _measure(guest)
    return {"ours": ours, "qemu": qemu}


def _measure(guest: Guest) -> dict[str, float]:
    guest.check("modprobe vfio_iommu_type1; modprobe vfio-pci")
    output = guest.python(f"/viommu/inside/bench_attach.py {EDU_IDS} {ROUNDS}", timeout=120)
    times: dict[str, float] = json.loads(output.splitlines()[-1])
    return times


def vfio_copy_seconds() -> float:
    """Seconds in which the engine copies 64 MiB that VFIO mapped as 4 KiB pages, as the guest sees it."""
    with Rig(MACHINE, linux_driver=True, scripts=scripts_directory()) as rig:
        output = rig.guest.python("/viommu/inside/linux.py vfio dma", timeout=120)
    (case,) = (json.loads(line) for line in output.splitlines() if line.startswith('{"case"'))
    (largest,) = (result for result in case["results"] if result["size"] == 64 << 20)
    seconds: float = largest["seconds"]
    return seconds
