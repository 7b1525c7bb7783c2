"""The commands, each a thin layer over the library."""

import json
import logging
import os
import shlex
import signal
import sys
from contextlib import ExitStack
from enum import StrEnum
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from viommu.cli.boot import boot
from viommu.cli.ctl import FOLLOW, call, complete, follow
from viommu.cli.demo import Demo
from viommu.cli.explain import explained
from viommu.cli.options import (
    DiskFormatOption,
    DiskOption,
    FaultsOption,
    MachineArgument,
    SeedOption,
    SmmuOption,
    SnapshotOption,
    user_disk,
)
from viommu.cli.run import report, run
from viommu.cli.scenario import scenarios
from viommu.faults.plan import Plan
from viommu.lab.assets import cache_directory
from viommu.lab.config import Machine, load_machine
from viommu.lab.errors import LabError
from viommu.lab.provision.__main__ import DISKS, check, set_up
from viommu.lab.provision.cache import Cache
from viommu.lab.provision.guest_image import ON_DEMAND
from viommu.lab.qemu import device_arguments, memory_arguments
from viommu.lab.rundir import RunDirectory
from viommu.lab.serving import CONTROL_NAME
from viommu.ledger import Ledger, Witness
from viommu.server import Server
from viommu.trace import Tracer
from viommu.trace_file import TraceFile

app = typer.Typer(
    help="A laboratory for drivers that live behind an IOMMU.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(scenarios, name="scenario")
_out = Console()
_err = Console(stderr=True)


@app.callback(invoke_without_command=True)
def about(
    version_asked: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):  # not every terminal has all that tables are made of
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if version_asked:
        typer.echo(f"viommu {version('viommu')}")
        raise typer.Exit


@app.command(short_help="Serve a machine's devices to a QEMU of your own.")
def serve(
    machine: MachineArgument = "aarch64-virt",
    directory: Annotated[
        Path | None, typer.Option(help="Where the sockets go; else a new directory.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write every event to this file, a JSON object a line.")
    ] = None,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Watch every detach, and give a verdict at the end.")
    ] = False,
    control: Annotated[
        Path | None, typer.Option(help="The control socket; else control.sock beside the others.")
    ] = None,
    smmu: SmmuOption = "",
    faults: FaultsOption = None,
    seed: SeedOption = 0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    disk: DiskOption = None,
    disk_format: DiskFormatOption = None,
    snapshot: SnapshotOption = False,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve the devices of MACHINE on vfio-user sockets, and print the QEMU arguments to use them.

    Runs until Ctrl-C. A QEMU may come, go and come again. On SIGUSR1 the trace gets what the server holds.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )
    with explained(_err), ExitStack() as stack:
        config = load_machine(machine, smmu)
        if (own := user_disk(disk, disk_format, snapshot=snapshot)) is not None:
            config = own.put_into(config)
        home = directory or stack.enter_context(RunDirectory()).path
        if not home.is_dir():
            raise LabError(f"there is no directory {home}: make it, or choose another --directory")
        tracer = Tracer()
        # On q35 no driver of the guest's own translates messages.
        msix = config.msix and config.machine_type == "q35"
        control = control or home / CONTROL_NAME
        server = stack.enter_context(
            Server(
                config.devices,
                home,
                tracer=tracer,
                features=config.smmu,
                msix=msix,
                seed=seed,
                control=control,
            )
        )
        if trace is not None:  # not before the sockets are ours: it may be the file of who has them
            stack.enter_context(_trace_file(tracer, trace))
        if faults is not None:
            server.faults.load(Plan.load(faults))
        if ledger:
            if server.smmu is None:
                raise LabError(f"there is no SMMU in {machine}: nothing for the ledger to watch")
            account = Ledger()
            account.follow(tracer)
            stack.callback(lambda: account.verdict().print(_out))
            stack.callback(Witness(server.smmu).close)  # before the verdict
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: server.stop())
        signal.signal(signal.SIGUSR1, lambda *_: server.report())
        # The library takes an interrupted call for an error.
        signal.siginterrupt(signal.SIGUSR1, False)
        if ready_fd is None:
            _show_sockets(config, server.sockets, control)
        else:
            text = json.dumps({name: str(path) for name, path in server.sockets.items()})
            os.write(ready_fd, text.encode() + b"\n")
            os.close(ready_fd)
        server.run()


def _trace_file(tracer: Tracer, path: Path) -> TraceFile:
    try:
        return TraceFile(tracer, path)
    except OSError as error:
        raise LabError(f"the trace cannot be written to {path}: {error.strerror}") from error


def _show_sockets(machine: Machine, sockets: dict[str, Path], control: Path) -> None:
    table = Table("device", "model", "slot", "StreamID", title="Serving")
    for device in machine.devices:
        table.add_row(device.name, device.model, device.address, f"{device.stream_id:#x}")
    _out.print(table)
    _out.print(
        f"To use them, add these arguments to qemu-system-{machine.arch} (10.1 or newer)\n"
        f"-machine {machine.machine}. Guest RAM must be shared, as it is here:\n",
        highlight=False,
        markup=False,
    )
    parts = [memory_arguments(machine.memory_mib)]
    parts += [device_arguments(d, sockets[d.name]) for d in machine.devices]
    _out.print(
        " \\\n".join("  " + shlex.join(part) for part in parts),
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    words = shlex.join(["viommu", "ctl", "--control", str(control)])
    _out.print(f"\n{words}\nlists what can be called meanwhile. Ctrl-C ends it.", soft_wrap=True)


@app.command(short_help="Say whether the detaches of a trace were complete.")
def ledger(
    trace: Annotated[Path, typer.Argument(help="What `viommu serve --ledger --trace` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say of every stream in TRACE whether it was detached as it must be.

    The exit code is 1 if a rule was violated.
    """
    with explained(_err):
        try:
            verdict = Ledger.of_file(trace).verdict()
        except ValueError as error:
            raise LabError(str(error)) from error
        if not verdict.witnessed:
            raise LabError(
                f"{trace} was written without `viommu serve --ledger`: it tells nothing of memory"
            )
        if as_json:
            typer.echo(json.dumps(verdict.as_dict()))
        else:
            verdict.print(_out)
        raise typer.Exit(1 if verdict.violations else 0)


app.command(short_help="Serve them, boot a guest and give you its console.")(boot)
app.command(short_help="Run a script or a command in a guest, and report.")(run)
app.command(short_help="Make a page of a trace.")(report)


@app.command(short_help="Show attach, DMA and detach on a guest.")
def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the verdict as a JSON object on the last line.")
    ] = False,
) -> None:
    """Show the main job on a guest: attach, DMA, detach in flight, refused DMA.

    The exit code is 1 if anything is not as it should be.
    """
    with explained(_err):
        verdict = Demo(_out).play()
        if as_json:
            typer.echo(json.dumps(verdict))
        raise typer.Exit(0 if verdict["verdict"] == "pass" else 1)


FurtherGuest = StrEnum("FurtherGuest", [(guest.name, guest.name) for guest in ON_DEMAND])  # type: ignore[misc]


@app.command(short_help="Provide libvfio-user, QEMU and the guests.")
def setup(
    guest: Annotated[
        list[FurtherGuest] | None, typer.Option(help="Another kernel too, for `viommu boot`.")
    ] = None,
    disks: Annotated[
        bool,
        typer.Option("--disks", help="UEFI firmware and qemu-nbd too, for `viommu boot --disk`."),
    ] = False,
) -> None:
    """Download, build and keep in the cache directory what is missing: libvfio-user, QEMU and the guests.

    An interrupted set-up goes on where it stopped. `viommu doctor` tells what is there.
    """
    further = [each.value for each in guest or ()]
    raise typer.Exit(set_up([*further, *([DISKS] if disks else [])]))


@app.command(short_help="Look into a running server, and tell it what to do.")
def ctl(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[METHOD [KEY=VALUE]... | events [KIND]...]",
            help="What to call; else what there is.",
            autocompletion=complete,
        ),
    ] = None,
    socket: Annotated[
        Path | None,
        typer.Option(
            "--control",
            envvar="VIOMMU_CONTROL",
            help="The server's control socket; else that of the only one.",
        ),
    ] = None,
    stream: Annotated[
        list[str] | None, typer.Option(help="With events: of this StreamID. May be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Call METHOD of a server that `viommu serve` or `viommu boot` started, and print its result.

    `events` follows what happens, of the given kinds or all, until Ctrl-C.
    """
    with explained(_err):
        method, *rest = words or ["methods"]
        if method == FOLLOW:
            follow(_out, rest, stream or [], socket, as_json=as_json)
        elif stream:
            raise LabError(f"--stream is for events: give {method} its parameters as key=value")
        else:
            call(_out, [method, *rest], socket, as_json=as_json)


@app.command(short_help="Report what is set up, and what is missing.")
def doctor() -> None:
    """Report each part that the lab needs, its version and where it came from.

    The exit code is 1 if one is missing.
    """
    with explained(_err):
        raise typer.Exit(0 if check(Cache(cache_directory())) else 1)
