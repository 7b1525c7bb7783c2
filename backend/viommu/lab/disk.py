"""A disk image beside the served devices: QEMU's own virtio disk, which reaches guest RAM past the SMMU."""

from pathlib import Path

from viommu.lab.config import Machine

_PINS = 4


def free_slot(machine: Machine) -> int:
    """The last free slot of the root bus whose pin is not the SMMU's."""
    taken = {device.slot for device in machine.devices}
    alone = {device.slot % _PINS for device in machine.devices if device.model == "smmuv3"}
    return next(
        slot for slot in range(30, 0, -1) if slot not in taken and slot % _PINS not in alone
    )


def disk_arguments(machine: Machine, image: Path) -> list[str]:
    """The arguments that plug it into a free slot. What the guest writes is forgotten; `image` is not touched.

    `virtio_blk` makes it /dev/vda. Its interrupt is a pin, but not the SMMU's: QEMU would send an MSI to the address
    that the guest's kernel has given it, which is an IOVA.
    """
    kind = "qcow2" if image.suffix == ".qcow2" else "raw"
    path = str(image).replace(",", ",,")
    return [
        *("-drive", f"file={path},format={kind},if=none,id=disk,snapshot=on"),
        *(
            "-device",
            f"virtio-blk-pci,drive=disk,bus=pcie.0,addr={free_slot(machine):#x},vectors=0",
        ),
    ]
