"""The guest's own SMMU driver, `arm-smmu-v3`, on the served SMMU of a `virt` machine."""

import re
from dataclasses import dataclass

from viommu.lab.assets import Qemu
from viommu.lab.config import Device, Machine
from viommu.lab.device_tree import SmmuTree, tree_with_smmu
from viommu.lab.errors import ConfigError, GuestError
from viommu.lab.guest import Guest

# Devices come up before the SMMU that the tree puts in front of them; no time limit makes the kernel give it up.
# A root port takes no 64-bit window in advance, which the kernel would place before the SMMU's registers.
COMMAND_LINE = "fw_devlink=permissive deferred_probe_timeout=-1 pci=hpmmioprefsize=0"
_FUNCTIONS = "/sys/bus/pci/devices"
_HAS_A_DRIVER = ("nvme",)  # in every stock kernel, though perhaps not loaded yet
# Loads what is not built in. Without a folder of modules there may be a driver all the same.
_HAS_VFIO = "modprobe -a vfio-pci vfio_iommu_type1; test -e /sys/bus/pci/drivers/vfio-pci"
_FIRST_REGION = re.compile(r"0x([0-9a-f]{16}) 0x([0-9a-f]{16}) ")


class SmmuMisplaced(GuestError):
    """The guest's kernel put the SMMU's registers elsewhere than the device tree says."""


class SmmuNotBound(GuestError):
    """The guest's `arm-smmu-v3` did not take the SMMU."""


@dataclass(frozen=True)
class LinuxSmmu:
    """What a guest needs whose kernel shall drive the machine's SMMU."""

    device: Device
    tree: SmmuTree
    endpoints: tuple[Device, ...]

    @classmethod
    def of(cls, machine: Machine, emulator: Qemu) -> "LinuxSmmu":
        """Prepare it for `machine`; raises `ConfigError` for one without such an SMMU."""
        smmu = find_smmu(machine)
        if smmu is None:
            raise ConfigError(
                "no kernel drives an SMMU in this machine: it must be an aarch64 one with a device of model 'smmuv3'"
            )
        endpoints = tuple(
            device for device in machine.devices if device.model not in ("smmuv3", *_HAS_A_DRIVER)
        )
        return cls(smmu, tree_with_smmu(machine, smmu, emulator), endpoints)

    def bind(self, guest: Guest) -> None:
        """Let the driver probe, in a guest that booted with the tree and `COMMAND_LINE`.

        The probe at boot failed: the function did not decode its BAR. Raises `SmmuMisplaced` or `SmmuNotBound`.
        An endpoint for which the kernel has no driver of its own then gets `vfio-pci`, if the guest has that: only a
        driver's probe gives it an IOMMU group.
        """
        function = f"{_FUNCTIONS}/{pci_address(self.device)}"
        found = guest.check(f"head -n 1 {function}/resource")
        region = _FIRST_REGION.match(found)
        if region is None or int(region[1], 16) != self.tree.address:
            where = f"{int(region[1], 16):#x}" if region else "nowhere"
            raise SmmuMisplaced(
                f"the guest's kernel put the SMMU's registers at {where}, and the device tree says "
                f"{self.tree.address:#x}: no other function may have a larger 64-bit BAR"
            )
        result = guest.run(
            f"echo 1 > {function}/enable && echo {self.tree.node} > /sys/bus/platform/drivers_probe && "
            f"test -e /sys/bus/platform/devices/{self.tree.node}/driver"
        )
        if result.status:
            said = guest.run("dmesg | grep -e iommu -e smmu | tail -n 5").output.strip()
            raise SmmuNotBound(f"arm-smmu-v3 did not take the SMMU; the kernel said: {said}")
        if self.endpoints and not guest.run(_HAS_VFIO).status:
            guest.check("\n".join(_give_to_vfio(device) for device in self.endpoints))


def find_smmu(machine: Machine) -> Device | None:
    """The SMMU that a guest's kernel can drive; None for a machine that has none."""
    if machine.machine_type != "virt":
        return None
    return next((device for device in machine.devices if device.model == "smmuv3"), None)


def pci_address(device: Device) -> str:
    """The function as the guest's kernel names it."""
    return f"0000:{device.address}"


def _give_to_vfio(device: Device) -> str:
    address = pci_address(device)
    function = f"{_FUNCTIONS}/{address}"
    take = (
        f"echo vfio-pci > {function}/driver_override && echo {address} > /sys/bus/pci/drivers_probe"
    )
    return f"test -e {function}/driver || {{ {take}; }}"
