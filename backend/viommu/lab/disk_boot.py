"""A machine that boots from its NVMe disk: firmware first, then whatever is on the disk."""

from contextlib import ExitStack
from pathlib import Path

from viommu.closing import Closing
from viommu.function import SMMU_IDENTITY
from viommu.lab.assets import Assets, Qemu
from viommu.lab.config import load_machine
from viommu.lab.console import ConsoleClosed
from viommu.lab.emulator import Emulator
from viommu.lab.errors import ConfigError
from viommu.lab.firmware import Firmware, firmware_arguments
from viommu.lab.interactive import pass_through
from viommu.lab.linux_smmu import LinuxSmmu
from viommu.lab.option_rom import smmu_option_rom
from viommu.lab.qemu import Properties, machine_arguments, plug
from viommu.lab.serving import Serving
from viommu.lab.user_disk import UserDisk


class DiskBoot(Closing):
    """The devices of a machine in a process of their own, and a QEMU that boots from the first that is a disk.

    `disk` takes that one's place. With `linux_driver` a device tree describes the machine and its SMMU, which the
    kernel's own `arm-smmu-v3` drives from the start. Without, it is ACPI, which does not tell of an SMMU: one that
    nobody programs lets all DMA through. The guest is left alone, and may reboot. It starts when it is made, and
    `close()` leaves nothing behind.
    """

    def __init__(
        self,
        machine: str | Path,
        *,
        disk: UserDisk | None = None,
        firmware: Firmware | None = None,
        linux_driver: bool = False,
        seed: int = 0,
        assets: Assets | None = None,
    ) -> None:
        self.machine = load_machine(machine)
        if disk is not None:
            self.machine = disk.put_into(self.machine)
        bootable = next((each for each in self.machine.devices if each.disk is not None), None)
        if bootable is None:
            raise ConfigError(f"{machine} has no disk to boot from: give one with --disk")
        qemu = (assets or Assets.load()).qemu_for(self.machine.arch)
        arguments = [
            *machine_arguments(self.machine),
            *firmware_arguments(self.machine, firmware),
            *("-action", "reboot=reset"),
        ]
        self._properties: dict[str, Properties] = {bootable.name: {"bootindex": 0}}
        self._open = ExitStack()
        try:
            self.serving = self._open.enter_context(Serving(machine, seed=seed, disk=disk))
            if linux_driver:
                arguments += self._describe_smmu(qemu)
            arguments += plug(self.machine, self.serving.sockets, self._properties)
            self._emulator = Emulator(self.machine, qemu, arguments)
            self._open.callback(self._emulator.close)
            self._emulator.connect(self.machine.timeouts.boot)
        except BaseException:
            self._open.close()
            raise

    def _describe_smmu(self, qemu: Qemu) -> list[str]:
        """The arguments that make the SMMU known. Its ROM sees to it that the registers are there."""
        smmu = LinuxSmmu.of(self.machine, qemu)
        tree, rom = (self.serving.directory / name for name in ("machine.dtb", "smmu.rom"))
        tree.write_bytes(smmu.tree.blob)
        rom.write_bytes(smmu_option_rom(SMMU_IDENTITY))
        self._properties[smmu.device.name] = {"romfile": str(rom)}
        # A port that can be plugged into gets a window in advance, where the SMMU's registers must be.
        ports = ["-global", "pcie-root-port.hotplug=off"]
        return ["-machine", "acpi=off", "-dtb", str(tree), *ports]

    def interact(self, source: int = 0, sink: int = 1) -> None:
        """Connect a terminal (two descriptors) with the guest's console until the person types Ctrl-].

        Raises `QemuExited` when the guest switches itself off, with exit code 0.
        """
        try:
            pass_through(self._emulator.console, b"", source, sink)
        except ConsoleClosed as error:
            raise self._emulator.explain(error, "a person used it", 0) from None

    def close(self) -> None:
        """End the guest, then the server."""
        self._open.close()
