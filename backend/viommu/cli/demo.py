"""The demonstration: four acts that a guest plays, shown as they happen and judged at the end."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from viommu.lab.assets import Assets
from viommu.lab.config import scripts_directory
from viommu.lab.rig import Rig
from viommu.layouts.records import EventRecord
from viommu.trace_file import TraceReader

Json = dict[str, Any]
MACHINE = "aarch64-virt"
_ACT_LIMIT = 60.0  # seconds
_REQUESTS, _ANSWERS = "/run/demo.requests", "/run/demo.answers"

EXPECTED = {
    "ste-abort": ("The STE aborts", []),
    "ste-invalid": ("The STE is invalid", ["C_BAD_STE"]),
    "cd-invalid": ("The CD is invalid", ["C_BAD_CD"]),
    "unmap": ("The pages are unmapped", ["F_TRANSLATION"]),
}
"""Each form of detach: what it is, and the events that a DMA after it must leave in guest RAM."""


_REFUSED = "the engine's next transaction is aborted"
_COMPLETE = "CMD_SYNC is complete"


class ActFailed(Exception):
    """An act did not come to its end."""


class Stage:
    """A booted rig, and the guest's side of the demonstration waiting for its cues."""

    def __init__(self, rig: Rig, trace: TraceReader) -> None:
        self._guest, self._trace = rig.guest, trace
        self._guest.check(
            f"mkfifo {_REQUESTS} {_ANSWERS}; PYTHONPATH=/viommu "
            f"python3 /viommu/inside/demo.py {_REQUESTS} {_ANSWERS} > /run/demo.log 2>&1 &"
        )

    def act(self, name: str, follow: Callable[[Json], None] = lambda _: None) -> Json:
        """Let the guest play `name`; `follow` gets every event of the trace while it does. Returns its answer."""
        answers: list[str] = []
        errors: list[BaseException] = []

        def play() -> None:
            try:
                cue = f"echo {name} > {_REQUESTS} && head -n 1 {_ANSWERS}"
                answers.append(self._guest.check(cue, _ACT_LIMIT))
            except BaseException as error:
                errors.append(error)

        player = threading.Thread(target=play, daemon=True)
        player.start()
        while player.is_alive():
            player.join(0.05)
            for event in self._trace.read():
                follow(event)
        for event in self._trace.read():
            follow(event)
        if errors:
            raise errors[0]
        answer: Json = json.loads(answers[0])
        if "error" in answer:
            raise ActFailed(f"the guest's script failed in {name!r}: {answer['error']}")
        return answer


class Demo:
    """Plays the acts on `console` and keeps what the verdict needs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._events: list[str] = []
        self._failures: list[str] = []
        self._verified = 0
        self._late = 0

    def play(self) -> Json:
        """Boot, play, and return the verdict as `scripts/demo --json` prints it."""
        console = self._console
        assets = Assets.load()
        qemu, image = assets.qemu_for("aarch64"), assets.guest_for("aarch64")
        console.rule("[bold]viommu: attach, DMA, detach")
        console.print(
            Panel(
                f"A stock QEMU [bold]{qemu.version}[/] boots a stock Linux [bold]{image.release}[/].\n"
                "Its PCI bus has an SMMUv3 and two DMA engines that live in a Python process, over vfio-user.\n"
                "A script in the guest is the SMMU's driver: its tables, queues and pages are in guest RAM.",
                title=MACHINE,
            )
        )
        with ExitStack() as stack:
            started = time.monotonic()
            with console.status("Booting the guest …"):
                rig = stack.enter_context(
                    Rig(MACHINE, assets=assets, trace=True, scripts=scripts_directory())
                )
                trace = stack.enter_context(rig.serving.trace())
                stage = Stage(rig, trace)
            console.print(f"The guest is up after {time.monotonic() - started:.1f} s.\n")
            self._attach(stage)
            self._copy(stage)
            self._detach(stage)
            self._refuse(stage)
        return self._judge(qemu.version, image.release)

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            self._failures.append(what)
            self._console.print(f"[red]✗ {what}[/]")

    def _record(self, raw: list[str]) -> list[EventRecord]:
        records = [EventRecord(int(text, 16)) for text in raw]
        self._events += [record.event.name for record in records]
        return records

    # The acts

    def _attach(self, stage: Stage) -> None:
        console = self._console
        console.print(
            "[bold cyan]1  Attach[/]  the driver writes a CD and an STE, and tells the SMMU to look again\n"
        )
        commands: Counter[str] = Counter()

        def follow(event: Json) -> None:
            if event["kind"] == "CommandConsumed":
                commands[event["opcode"]] += 1

        with console.status("The guest's script starts and resets the SMMU …"):
            answer = stage.act("attach", follow)
        stream_id = answer["stream_id"]
        console.print(
            f"   stream {stream_id:#x} is attached to the domain with ASID {answer['asid']}"
        )
        listed = ", ".join(f"{count} × {name}" for name, count in commands.items())
        console.print(f"   commands consumed: {listed}\n")
        self._check(commands["CMD_CFGI_STE"] > 0, "an attach issues CMD_CFGI_STE")

    def _copy(self, stage: Stage) -> None:
        console = self._console
        console.print(
            "[bold cyan]2  DMA[/]  the engine copies 2 MiB between scattered pages, by IOVA\n"
        )
        structures: list[Json] = []
        moved = Counter[bool]()

        def follow(event: Json) -> None:
            if event["kind"] == "StructureFetched":
                structures.append(event)
            elif event["kind"] == "DmaMoved":
                moved[event["write"]] += event["size"]

        with console.status("DMA …"):
            answer = stage.act("copy", follow)
        for event in structures:
            _, _, fields = event["text"].partition(" ")
            console.print(
                f"   {event['structure']} at {event['address']:#x}: {fields}",
                style="dim",
                highlight=False,
            )
        table = Table("from IOVA", "physical", "to IOVA", "physical", "sent", "arrived")
        for page in answer["pages"]:
            same = page["sent"] == page["arrived"]
            table.add_row(
                f"{page['from_iova']:#x}", f"{page['from_address']:#x}",
                f"{page['to_iova']:#x}", f"{page['to_address']:#x}",
                page["sent"], Text(page["arrived"], "green" if same else "red"),
            )  # fmt: skip
        table.add_row("…", "…", "…", "…", "…", "…")
        console.print(table)
        self._verified = answer["verified"]
        console.print(
            f"   the engine read {moved[False]:,} and wrote {moved[True]:,} bytes;\n"
            f"   the guest found [bold]{self._verified:,}[/] of them right\n"
        )
        self._check(answer["verified"] == answer["bytes"], "every byte that was sent arrived")
        self._check(answer["stray_bytes"] == 0, "no byte went elsewhere")
        self._check(not self._record(answer["events"]), "a good DMA leaves no event")

    def _detach(self, stage: Stage) -> None:
        console = self._console
        console.print(
            "[bold cyan]3  Detach in flight[/]  64 MiB are on their way when the STE turns to abort\n"
        )
        steps: list[str] = []
        progress = Progress(
            TextColumn("   landed"),
            BarColumn(40),
            DownloadColumn(binary_units=True),
            console=console,
        )

        def follow(event: Json) -> None:
            match event["kind"]:
                case "EngineStarted":
                    total = event["end_incl"] - event["begin"] + 1
                    progress.reset(bar, total=max(total, progress.tasks[bar].total or 0))
                    steps.clear()  # what came before was the attach
                case "DmaMoved" if event["write"]:
                    progress.advance(bar, event["size"])
                case "CommandConsumed" if event["opcode"] != "CMD_SYNC":
                    fields = event["text"].partition(" ")[2]
                    steps.append(fields.strip("()").removeprefix("opcode="))
                case "SyncWaiting":
                    count = event["transactions"]
                    steps.append(
                        f"CMD_SYNC waits for {count} transaction{'s' * (count != 1)} in flight"
                    )
                case "SyncCompleted":
                    steps.append(_COMPLETE)
                case "DmaRefused" if _REFUSED not in steps:
                    steps.append(_REFUSED)

        with progress:
            bar = progress.add_task("landed", total=None)
            answer = stage.act("detach", follow)
            landed, total = answer["landed_pages"] << 12, answer["total_pages"] << 12
            progress.update(bar, completed=landed)
        for step in _story(steps):
            console.print(f"   · {step}", highlight=False)
        self._late = answer["late_pages"] << 12
        console.print(
            f"   {landed:,} of {total:,} bytes had landed; "
            f"after the detach returned: [bold]{self._late}[/]\n"
        )
        self._check(0 < landed < total, "the detach meets the DMA in the middle")
        self._check(self._late == 0, "no byte lands after the detach")
        statuses = {frame["status"] for frame in answer["frames"]}
        self._check(statuses == {"ERROR"}, "every frame of the engine sees an abort")
        self._check(not self._record(answer["events"]), "an STE that aborts is silent")

    def _refuse(self, stage: Stage) -> None:
        console = self._console
        console.print(
            "[bold cyan]4  Refused[/]  a DMA after each form of detach, and the event that it leaves\n"
        )
        with console.status("DMA …"):
            answer = stage.act("refuse")
        table = Table("detached by", "engine", "record in guest RAM", "decoded")
        for how, (what, expected) in EXPECTED.items():
            refusal = answer["refusals"][how]
            records = self._record(refusal["events"])
            names = [record.event.name for record in records]
            table.add_row(
                what,
                refusal["status"],
                "\n".join(_words(record) for record in records) or "—",
                Group(*(_decoded(record) for record in records)) if records else "no event",
            )
            self._check(refusal["worked_before"], f"{how}: the DMA works while attached")
            self._check(refusal["status"] == "ERROR", f"{how}: the engine sees an abort")
            self._check(refusal["stray_bytes"] == 0, f"{how}: no byte is written")
            self._check(names == expected, f"{how}: the events are {expected}, not {names}")
            self._late += refusal["stray_bytes"]
        console.print(table)

    def _judge(self, version: str, release: str) -> Json:
        passed = not self._failures
        style, word = ("green", "PASS") if passed else ("red", "FAIL")
        lines = [
            f"{self._verified:,} bytes verified, {self._late} bytes after a detach, "
            f"events: {', '.join(self._events) or 'none'}",
            *(f"✗ {failure}" for failure in self._failures),
        ]
        self._console.print(Panel("\n".join(lines), title=f"[bold]{word}", style=style))
        return {
            "verdict": "pass" if passed else "fail",
            "machine": MACHINE,
            "qemu_version": version,
            "guest_kernel": release,
            "dma_bytes_verified": self._verified,
            "dma_bytes_after_detach": self._late,
            "events": self._events,
            "failures": self._failures,
        }


def _story(steps: list[str]) -> list[str]:
    """The steps up to where the detach is complete and DMA is refused; what comes after is tidying up."""
    ends = [steps.index(end) for end in (_REFUSED, _COMPLETE) if end in steps]
    return steps[: max(ends) + 1] if len(ends) == 2 else steps


def _words(record: EventRecord) -> str:
    """The record as it lies in memory, four 64-bit words."""
    return "\n".join(f"{word:016x}" for word in record.qwords())


def _decoded(record: EventRecord) -> Text:
    text = Text(record.event.name, "bold")
    text.append(f"\nStreamID {record.stream_id:#x}", "not bold")
    if record.address:
        direction = "read" if record.rnw else "write"
        text.append(
            f"\n{direction} of {record.address:#x}, class {record.fault_class.name}", "not bold"
        )
    return text
