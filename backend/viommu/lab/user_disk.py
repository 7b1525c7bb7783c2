"""A disk image of the user's own, in the place of a machine's."""

from dataclasses import dataclass
from pathlib import Path

from viommu.disks import ImageFormat
from viommu.lab.config import Device, Machine
from viommu.lab.disk import free_slot


@dataclass(frozen=True)
class UserDisk:
    """An image. Its format is None where its name says it; with `snapshot` it stays as it is."""

    path: Path
    format: ImageFormat | None = None
    snapshot: bool = False

    def put_into(self, machine: Machine) -> Machine:
        """The machine with this disk in its first NVMe controller, which is added where there is none."""
        devices = list(machine.devices)
        models = [each.model for each in devices]
        if "nvme" not in models:
            models.append("nvme")
            devices.append(Device(name="disk", model="nvme", slot=free_slot(machine), size_mib=1))
        place = models.index("nvme")
        disk = {"disk": self.path, "disk_format": self.format, "snapshot": self.snapshot}
        changed = devices[place].model_dump() | disk | {"size_mib": None}
        devices[place] = Device.model_validate(changed)
        return Machine.model_validate(machine.model_dump() | {"devices": devices})

    def options(self) -> list[str]:
        """The options of `viommu serve` that say the same."""
        words = ["--disk", str(self.path)]
        words += ["--disk-format", self.format] if self.format else []
        return [*words, *(["--snapshot"] if self.snapshot else [])]
