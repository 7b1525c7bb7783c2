"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

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
