"""`viommu boot`: a guest and its console."""

from collections.abc import Callable
from contextlib import ExitStack

from rich.console import Console

from viommu.cli.explain import explained
from viommu.cli.options import (
    AppendOption,
    DiskFormatOption,
    DiskOption,
    FirmwareOption,
    GuestOption,
    InitramfsOption,
    KernelOption,
    MachineArgument,
    ModulesOption,
    RawOption,
    SeedOption,
    SnapshotOption,
    user_disk,
)
from viommu.lab.config import load_machine, scripts_directory
from viommu.lab.disk_boot import DiskBoot
from viommu.lab.errors import ConfigError, QemuExited, describe_exit
from viommu.lab.linux_smmu import find_smmu
from viommu.lab.rig import Rig
from viommu.lab.serving import ServerFailed, Serving

_err = Console(stderr=True)


def boot(
    machine: MachineArgument = "aarch64-virt",
    kernel: KernelOption = None,
    guest: GuestOption = None,
    initramfs: InitramfsOption = None,
    modules: ModulesOption = None,
    append: AppendOption = "",
    disk: DiskOption = None,
    disk_format: DiskFormatOption = None,
    snapshot: SnapshotOption = False,
    firmware: FirmwareOption = None,
    raw: RawOption = False,
    seed: SeedOption = 0,
) -> None:
    """Serve the devices of MACHINE, boot a guest with them and give you its console.

    On an aarch64 machine the guest's own arm-smmu-v3 drives the SMMU, and
    vfio-pci has the engines. On x86-64, and with --raw, the SMMU waits for
    the Python scripts in /viommu/inside. Ctrl-] leaves.

    With --disk or --firmware the machine boots what is on its NVMe disk.
    """
    with explained(_err), ExitStack() as stack:
        linux_driver = not raw and find_smmu(load_machine(machine)) is not None
        own = user_disk(disk, disk_format, snapshot=snapshot)
        if own is not None or firmware is not None:
            if any((kernel, guest, initramfs, modules, append)):
                raise ConfigError(
                    "a disk boots its own kernel: leave out --kernel, --guest, --initramfs, --modules and --append, "
                    "or else --disk and --firmware"
                )
            machine_with_disk = stack.enter_context(
                DiskBoot(machine, disk=own, firmware=firmware, linux_driver=linux_driver, seed=seed)
            )
            _converse(machine_with_disk.interact, machine_with_disk.serving)
            return
        with _err.status(f"Booting {machine} …"):
            rig = stack.enter_context(
                Rig(
                    machine,
                    seed=seed,
                    linux_driver=linux_driver,
                    scripts=scripts_directory(),
                    kernel=kernel,
                    image=guest,
                    initramfs=initramfs,
                    modules=modules,
                    command_line=append,
                )
            )
        hint = (
            "ls /sys/kernel/iommu_groups /dev/vfio"
            if linux_driver
            else "python3 /viommu/inside/raw.py attach linear"
        )
        _converse(rig.guest.interact, rig.serving, f" Try: {hint}")


def _converse(interact: Callable[[], object], serving: Serving, hint: str = "") -> None:
    """Give a person the console; then say what the server had to say meanwhile."""
    _err.print(f"Ctrl-] leaves the guest.{hint}", style="dim", highlight=False)
    try:
        interact()
    except QemuExited as error:
        if error.exit_code != 0:
            raise
        _err.print("\nThe guest switched itself off.", style="dim")
    if said := serving.output():
        _err.print(f"\nThe server of the devices said:\n{said}", highlight=False, markup=False)
    if serving.exit_code is not None:
        raise ServerFailed(f"the server of the devices: {describe_exit(serving.exit_code)}")
