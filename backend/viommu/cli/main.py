"""The commands, each a thin layer over the library."""

import json
import logging
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from vfio_user import VfioUserError
from viommu.cli.demo import ActFailed, Demo
from viommu.lab.assets import cache_directory
from viommu.lab.config import Machine, load_machine, scripts_directory
from viommu.lab.errors import LabError
from viommu.lab.linux_smmu import find_smmu
from viommu.lab.provision.__main__ import check
from viommu.lab.provision.cache import Cache
from viommu.lab.qemu import device_arguments, memory_arguments
from viommu.lab.rig import Rig
from viommu.lab.rundir import RunDirectory
from viommu.server import Server
from viommu.trace import Tracer
from viommu.trace_file import TraceFile

app = typer.Typer(
    help="A laboratory for drivers that live behind an IOMMU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

MachineArgument = Annotated[
    str, typer.Argument(help="A machine of qemu-configs/ by name, or the path of a TOML file.")
]


@contextmanager
def _explained() -> Iterator[None]:
    """A user's mistake is one sentence and exit code 1, no traceback."""
    try:
        yield
    except (LabError, VfioUserError, ActFailed, OSError) as error:
        _err.print(f"viommu: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None


@app.command()
def serve(
    machine: MachineArgument = "aarch64-virt",
    directory: Annotated[
        Path | None, typer.Option(help="Where the sockets go; else a directory of this run.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write every event to this file, a JSON object a line.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order in which devices take turns.")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve the devices of MACHINE on vfio-user sockets, and print the QEMU arguments to use them.

    Runs until Ctrl-C. A QEMU may come, go and come again.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(name)s: %(message)s",
        handlers=[RichHandler(console=_err, show_path=False)],
    )
    with _explained(), ExitStack() as stack:
        config = load_machine(machine)
        tracer = Tracer()
        if trace is not None:
            stack.enter_context(TraceFile(tracer, trace))
        home = directory or stack.enter_context(RunDirectory()).path
        msix = config.machine_type == "q35"  # no driver of the guest's own translates MSIs there
        server = stack.enter_context(
            Server(config.devices, home, tracer=tracer, msix=msix, seed=seed)
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.stop())
        if ready_fd is None:
            _show_sockets(config, server.sockets)
        else:
            text = json.dumps({name: str(path) for name, path in server.sockets.items()})
            os.write(ready_fd, text.encode() + b"\n")
            os.close(ready_fd)
        server.run()


def _show_sockets(machine: Machine, sockets: dict[str, Path]) -> None:
    table = Table("device", "model", "slot", "StreamID", "socket", title="Serving")
    for device in machine.devices:
        table.add_row(
            device.name,
            device.model,
            f"00:{device.slot:02x}.0",
            f"{device.stream_id:#x}",
            str(sockets[device.name]),
        )
    _out.print(table)
    _out.print(
        "QEMU (10.1 or newer) reaches them with these arguments; guest RAM must be shared:\n"
    )
    parts = [memory_arguments(machine.memory_mib)]
    parts += [device_arguments(d.name, d.slot, sockets[d.name]) for d in machine.devices]
    _out.print(
        " \\\n".join("  " + shlex.join(part) for part in parts), soft_wrap=True, highlight=False
    )
    _out.print("\nCtrl-C ends it.")


@app.command()
def boot(
    machine: MachineArgument = "aarch64-virt",
    kernel: Annotated[Path | None, typer.Option(help="A kernel of your own.")] = None,
    initramfs: Annotated[Path | None, typer.Option(help="An initramfs of your own.")] = None,
    modules: Annotated[
        Path | None, typer.Option(help="Its modules: a lib/modules/<release> directory.")
    ] = None,
    append: Annotated[str, typer.Option(help="More words for the kernel command line.")] = "",
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Leave the SMMU to scripts, also where the kernel has a driver."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the order in which devices take turns.")] = 0,
) -> None:
    """Serve the devices of MACHINE, boot a guest with them and give you its console.

    On an aarch64 machine the guest's own arm-smmu-v3 drives the SMMU, and vfio-pci has the engines. Python scripts in
    /viommu/inside drive the SMMU themselves: with --raw, or on x86-64. Ctrl-] leaves.
    """
    with _explained():
        linux_driver = not raw and find_smmu(load_machine(machine)) is not None
        with ExitStack() as stack:
            with _err.status(f"Booting {machine} …"):
                rig = stack.enter_context(
                    Rig(
                        machine,
                        seed=seed,
                        linux_driver=linux_driver,
                        scripts=scripts_directory(),
                        kernel=kernel,
                        initramfs=initramfs,
                        modules=modules,
                        command_line=append,
                    )
                )
            things = "/sys/kernel/iommu_groups /dev/vfio" if linux_driver else "/viommu/inside"
            _err.print(f"Ctrl-] leaves the guest. Try: lspci -nn; ls {things}", style="dim")
            rig.guest.interact()


@app.command()
def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the verdict as a JSON object on the last line.")
    ] = False,
) -> None:
    """Show the main job on a guest: attach, DMA, detach in flight, refused DMA. Exit code 1 if anything is wrong."""
    with _explained():
        verdict = Demo(_out).play()
        if as_json:
            typer.echo(json.dumps(verdict))
        raise typer.Exit(0 if verdict["verdict"] == "pass" else 1)


@app.command()
def doctor() -> None:
    """Report each part that the lab needs, its version and where it came from; exit code 1 if one is missing."""
    if not check(Cache(cache_directory())):
        _err.print("Something is missing: run scripts/setup.", style="red")
        raise typer.Exit(1)
