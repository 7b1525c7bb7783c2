"""`viommu scenario`: what there is, and one run or all of them, told step by step."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from viommu.cli.explain import explained
from viommu.lab.errors import LabError
from viommu.scenarios import Outcome, Runner, Scenario, load_all

scenarios = typer.Typer(
    help="Bugs of drivers and devices, replayed on a stock guest.",
    short_help="Replay known bugs of drivers and devices on a stock guest.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_out = Console()
_err = Console(stderr=True)
_ALL = "all"


@scenarios.command("list", short_help="List the scenarios.")
def list_all(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
) -> None:
    """List what there is: each is a file, with the bug class and where the public met it."""
    with explained(_err):
        found = sorted(load_all(), key=lambda each: each.name)
        if as_json:
            typer.echo(json.dumps([_described(each) for each in found]))
            return
        table = Table("name", "who drives", "what")
        for each in found:
            table.add_row(each.name, each.driver, f"{each.title}\n[dim]{each.bug_class}[/]")
        _out.print(table)


@scenarios.command(short_help="Run scenarios by name, or all.")
def run(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Which; or `all`.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a scenario, a line each.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of all that is by chance; else the scenario's own.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Give you the guest's console afterwards.")
    ] = False,
    kernel: Annotated[
        Path | None, typer.Option(help="A kernel of your own.", exists=True, dir_okay=False)
    ] = None,
    modules: Annotated[
        Path | None,
        typer.Option(
            help="Its modules: a lib/modules/<release> directory.", exists=True, file_okay=False
        ),
    ] = None,
    guest: Annotated[
        str | None, typer.Option(help="A guest that `viommu setup --guest` provided.")
    ] = None,
) -> None:
    """Boot a stock guest, do to it what the scenario says, and compare with what a healthy kernel makes of it.

    The exit code is 1 when one did not come out as expected.
    """
    with explained(_err):
        chosen = _chosen(names)
        started, failed = time.monotonic(), []
        with Runner(guest={"kernel": kernel, "modules": modules, "image": guest}) as runner:
            for scenario in chosen:
                with _err.status(f"{scenario.name}: {scenario.title}"):
                    outcome = runner.run(scenario, seed, keep=keep)
                if as_json:
                    typer.echo(json.dumps(outcome.as_dict()))
                else:
                    show(_out, outcome)
                if not outcome.passed:
                    failed.append(outcome)
                if keep and runner.stage is not None and not runner.stage.rig.lost:
                    _err.print("Ctrl-] leaves the guest.", style="dim")
                    runner.stage.rig.guest.interact()
        if not as_json and len(chosen) > 1:
            _sum_up(_out, len(chosen), failed, time.monotonic() - started)
        raise typer.Exit(1 if failed else 0)


def _chosen(names: list[str]) -> list[Scenario]:
    found = load_all()
    if names == [_ALL]:
        return found
    known = {each.name: each for each in found}
    for name in names:
        if name not in known:
            raise LabError(f"there is no scenario {name!r}, but {', '.join(sorted(known))}")
    return [known[name] for name in names]


def _described(scenario: Scenario) -> dict[str, object]:
    return scenario.model_dump(
        mode="json", include={"name", "title", "shows", "bug_class", "references", "driver"}
    )


def show(console: Console, outcome: Outcome) -> None:
    """The story of one scenario: what was done, what interfered, what the kernel and the ledger said."""
    scenario = outcome.scenario
    console.rule(f"[bold]{scenario.name}[/]: {scenario.title}")
    console.print(f"{scenario.shows}\n", style="italic", highlight=False)
    _list(console, "What was done", outcome.steps)
    _list(console, "What went wrong on purpose", _injections(outcome.injections))
    _list(console, "What the kernel said", outcome.told)
    if outcome.verdict is not None:
        console.print("The ledger:", style="bold")
        outcome.verdict.print(console)
    word = Text("PASS", "bold green") if outcome.passed else Text("FAIL", "bold red")
    console.print(word, f"{scenario.name}, {outcome.seconds:.1f} s", highlight=False)
    if not outcome.passed:
        console.print(Text(f"  {outcome.unmet[0]}"), highlight=False)
        console.print(Text(f"  again: {outcome.replay}"), highlight=False, soft_wrap=True)


_SHOWN = 24


def _list(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print(f"{title}:", style="bold")
    for line in lines[:_SHOWN]:
        console.print(Text(f"  {line}"), highlight=False)
    if len(lines) > _SHOWN:
        console.print(f"  … and {len(lines) - _SHOWN} more", style="dim")
    console.print()


def _injections(events: list[dict[str, Any]]) -> list[str]:
    """The first of each line of the plan, and how many there were."""
    counts = Counter((event["kind"], event["line"]) for event in events)
    lines = []
    for event in events:
        count = counts.pop((event["kind"], event["line"]), 0)
        if count:
            times = f", {count:,} times; the first" if count > 1 else ""
            lines.append(f"line {event['line']}: {_injection(event)}{times}")
            lines.append(f"  {event.get('where') or event['outcome']}")
    return lines


def _injection(event: dict[str, Any]) -> str:
    if event["kind"] == "EffectCalled":
        return str(event["method"])
    return f"{event['action']} at {event['point']}"


def _sum_up(console: Console, count: int, failed: list[Outcome], seconds: float) -> None:
    style = "bold red" if failed else "bold green"
    console.rule()
    console.print(f"{count - len(failed)} of {count} passed in {seconds:.0f} s", style=style)
    for outcome in failed:
        console.print(Text(f"  {outcome.scenario.name}: {outcome.unmet[0]}"), highlight=False)
        console.print(Text(f"    again: {outcome.replay}"), highlight=False, soft_wrap=True)
