"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from viommu.disks import ImageFormat
from viommu.lab.errors import ConfigError
from viommu.lab.firmware import Firmware
from viommu.lab.user_disk import UserDisk

MachineArgument = Annotated[
    str, typer.Argument(help="A machine of qemu-configs/ by name, or the path of a TOML file.")
]
KernelOption = Annotated[
    Path | None, typer.Option(help="A kernel of your own.", exists=True, dir_okay=False)
]
GuestOption = Annotated[
    str | None, typer.Option(help="A guest that `viommu setup --guest` provided.")
]
InitramfsOption = Annotated[
    Path | None, typer.Option(help="An initramfs of your own.", exists=True, dir_okay=False)
]
ModulesOption = Annotated[
    Path | None,
    typer.Option(
        help="Its modules: a lib/modules/<release> directory.", exists=True, file_okay=False
    ),
]
AppendOption = Annotated[str, typer.Option(help="More words for the kernel command line.")]
RawOption = Annotated[
    bool,
    typer.Option("--raw", help="Leave the SMMU to scripts, also where the kernel has a driver."),
]
SmmuOption = Annotated[
    str, typer.Option(help="Lines for the machine's [smmu] table: what its SMMU implements.")
]
FaultsOption = Annotated[
    Path | None, typer.Option(help="What goes wrong on purpose: a plan, a TOML file.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the order in which devices take turns.")]
DiskOption = Annotated[
    Path | None, typer.Option(help="An image of your own for the NVMe disk: raw or qcow2.")
]
DiskFormatOption = Annotated[
    ImageFormat | None, typer.Option(help="Its format, if its name does not say so.")
]
SnapshotOption = Annotated[
    bool, typer.Option("--snapshot", help="Leave the image as it is: forget what the guest writes.")
]
FirmwareOption = Annotated[
    Firmware | None,
    typer.Option(help="What boots the disk; else bios on x86-64, uefi on aarch64."),
]


def user_disk(path: Path | None, kind: ImageFormat | None, *, snapshot: bool) -> UserDisk | None:
    """The disk that these options name; raises `ConfigError` when they name none, and say more of it."""
    if path is not None:
        return UserDisk(path, kind, snapshot)
    if kind is not None or snapshot:
        raise ConfigError("--disk-format and --snapshot are of an image: name it with --disk")
    return None
