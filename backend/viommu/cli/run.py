"""`viommu run` and `viommu report`: a command in a guest, and what can be told of it."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from viommu.cli.explain import complain, explained
from viommu.cli.options import (
    AppendOption,
    FaultsOption,
    GuestOption,
    InitramfsOption,
    KernelOption,
    MachineArgument,
    ModulesOption,
    RawOption,
    SeedOption,
)
from viommu.cli.reports import Wanted, write
from viommu.faults.plan import Plan
from viommu.lab.assets import Assets
from viommu.lab.config import load_machine, scripts_directory
from viommu.lab.errors import GuestError, LabError
from viommu.lab.linux_smmu import find_smmu
from viommu.lab.recording import ConsoleLine
from viommu.lab.session import Played, played, script_in_guest
from viommu.report import Run
from viommu.report.html import plain

_err = Console(stderr=True)

_PageOption = Annotated[
    Path | None, typer.Option("--report", help="A page for a browser: everything in one file.")
]
_PerfettoOption = Annotated[
    Path | None, typer.Option("--trace", help="A trace for the Perfetto UI (ui.perfetto.dev).")
]
_JsonOption = Annotated[Path | None, typer.Option("--json", help="The verdict as JSON.")]
_JunitOption = Annotated[Path | None, typer.Option("--junit", help="The verdict as JUnit XML.")]


def run(
    machine: MachineArgument,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SCRIPT [ARGUMENT]... | COMMAND...",
            help="A Python script of this host, or a shell command in the guest.",
        ),
    ],
    report: _PageOption = None,
    trace: _PerfettoOption = None,
    as_json: _JsonOption = None,
    junit: _JunitOption = None,
    kernel: KernelOption = None,
    guest: GuestOption = None,
    initramfs: InitramfsOption = None,
    modules: ModulesOption = None,
    append: AppendOption = "",
    raw: RawOption = False,
    faults: FaultsOption = None,
    ledger: Annotated[
        bool, typer.Option("--ledger/--no-ledger", help="Watch every detach; it slows DMA down.")
    ] = True,
    timeout: Annotated[float, typer.Option(help="Seconds that the command may take.", min=1)] = 600,
    seed: SeedOption = 0,
) -> None:
    """Boot MACHINE, run a script or a command in the guest, and end with its exit code.

    What it prints is shown as it comes. The exit code is 1 where the command
    was fine and something else was not: the guest panicked, or the ledger
    found a violation. Options of the command's own go behind `--`.
    """
    with explained(_err):
        wanted = Wanted(report, trace, as_json, junit)
        wanted.check()
        if faults is not None:
            Plan.load(faults)  # a mistake in it is told before anything starts
        config, assets = load_machine(machine), Assets.load()
        command, files = _command(words)
        linux_driver = not raw and find_smmu(config) is not None
        with played(
            machine,
            command,
            follow=_show,
            timeout=timeout,
            assets=assets,
            ledger=ledger and any(device.model == "smmuv3" for device in config.devices),
            seed=seed,
            faults=faults,
            linux_driver=linux_driver,
            scripts=scripts_directory(),
            extra_files=files,
            kernel=kernel,
            image=guest,
            initramfs=initramfs,
            modules=modules,
            command_line=append,
        ) as result:
            facts = {
                "machine": machine,
                "command": " ".join(words),
                "seed": str(seed),
                "QEMU": assets.qemu_for(config.arch).version,
                "kernel": result.kernel or str(kernel or guest or config.arch),
                "streams": ", ".join(f"{d.name} {d.stream_id:#x}" for d in config.devices),
                "SMMU driven by": "the guest's arm-smmu-v3"
                if linux_driver
                else "scripts in the guest",
                **({} if faults is None else {"plan": f"{faults}\n{_numbered(faults)}"}),
                "QEMU's command line": shlex.join(result.qemu),
            }
            made = write(
                _made(f"viommu run {Path(machine).stem}", facts, result), result.trace, wanted
            )
        _explain(result.error)
        for reason in made.reasons:
            complain(_err, reason)
        raise typer.Exit(made.exit_code)


def report(
    trace: Annotated[
        Path,
        typer.Argument(help="What `viommu serve --trace` wrote.", exists=True, dir_okay=False),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; else beside the trace.")
    ] = None,
    console: Annotated[
        Path | None,
        typer.Option(help="A log of the guest's console.", exists=True, dir_okay=False),
    ] = None,
    perfetto: _PerfettoOption = None,
    as_json: _JsonOption = None,
    junit: _JunitOption = None,
) -> None:
    """Make a page of a trace that exists already.

    The exit code is 1 if the ledger finds a violation in it.
    """
    with explained(_err):
        page = output or trace.with_suffix(".html")
        wanted = Wanted(page, perfetto, as_json, junit)
        wanted.check()
        lines = () if console is None else tuple(_lines(console))
        made = write(Run(trace.name, {"trace": str(trace)}, console=lines), trace, wanted)
        _err.print(f"{page} is the page.", highlight=False, markup=False, soft_wrap=True)
        for reason in made.reasons:
            complain(_err, reason)
        raise typer.Exit(made.exit_code)


def _command(words: list[str]) -> tuple[str, dict[str, bytes]]:
    """What to run in the guest, and the files that it takes there."""
    script = Path(words[0])
    if script.suffix != ".py":
        return (words[0] if len(words) == 1 else shlex.join(words)), {}
    if not script.is_file():
        raise LabError(f"there is no script {script}")
    return script_in_guest(script, words[1:])


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data.replace(b"\r\n", b"\n"))
    sys.stdout.buffer.flush()


def _made(title: str, facts: dict[str, str], result: Played) -> Run:
    failure = None if result.error is None else result.error.message
    return Run(title, facts, result.status, failure, console=result.console)


def _explain(error: GuestError | None) -> None:
    if error is not None:
        _err.print(str(error.evidence), style="dim", highlight=False, markup=False)


def _numbered(path: Path) -> str:
    """A text with the numbers of its lines, which injections name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(f"{number:4} {line}" for number, line in enumerate(lines, 1))


def _lines(path: Path) -> list[ConsoleLine]:
    text = path.read_bytes().decode(errors="replace").replace("\r\n", "\n")
    return [ConsoleLine(plain(line)) for line in text.splitlines()]
