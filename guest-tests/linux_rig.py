"""A machine whose SMMU the guest's own kernel drives, and what its trace and the kernel's log tell."""

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from viommu.lab.rig import Rig
from viommu.layouts.records import EventRecord

DOMAINS = "iommu.passthrough=0 iommu.strict=1"
"""For the kernel's command line: the default domains of Debian's kernel, for those that choose others."""

Event = dict[str, Any]
Result = dict[str, Any]
Steps = list[tuple[str, int]]


class LinuxRig:
    """Of a rig that has just booted."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._trace = rig.serving.trace()
        self.boot_events = self._trace.read()
        # As modules or built in; what the console tells if not is the error's evidence.
        self.run("ls -d /sys/bus/pci/drivers/vfio-pci /sys/module/vfio_iommu_type1")

    def close(self) -> None:
        self._trace.close()

    def run(self, command: str) -> str:
        """A shell command in the guest that must succeed; returns its output."""
        return self.rig.guest.check(command, timeout=120)

    def cases(self, arguments: str) -> list[Result]:
        """Run cases of a group in the guest; see `inside/linux.py`."""
        output = self.rig.guest.python(f"/viommu/inside/linux.py {arguments}", timeout=120)
        return [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]

    def events_of(self, work: Callable[[], object]) -> list[Event]:
        """What the trace has of `work`."""
        self._trace.read()
        work()
        return self._trace.read()

    def holds(self) -> dict[str, int]:
        """What the server holds for the guest, by name."""
        self._trace.read()
        self.rig.serving.report()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for event in self._trace.read():
                if event.pop("kind") == "ServerHolds":
                    return {key: event[key] for key in event if key not in ("seq", "time")}
            time.sleep(0.01)
        raise TimeoutError("the server does not say what it holds")

    @property
    def id_registers(self) -> dict[str, int]:
        """What the driver read of the ID registers when it probed."""
        return id_registers(self.boot_events)


@dataclass
class Ran:
    """A group of cases that a guest has run: their results by name, and what the trace has of it."""

    results: dict[str, Result]
    events: list[Event]


# Of the trace


def id_registers(events: list[Event]) -> dict[str, int]:
    """The ID registers that were read, by name."""
    return {
        event["name"]: event["value"]
        for event in events
        if event["kind"] == "RegisterAccess" and event["name"].startswith("IDR")
    }


def reads(events: list[Event], name: str) -> int:
    """How often a register was read."""
    return sum(
        event["kind"] == "RegisterAccess" and event["name"] == name and not event["write"]
        for event in events
    )


def commands(events: list[Event], opcode: str) -> list[str]:
    """The commands of that opcode, as text."""
    consumed = [event for event in events if event["kind"] == "CommandConsumed"]
    return [event["text"] for event in consumed if event["opcode"] == opcode]


def contexts(events: list[Event]) -> list[str]:
    """The CDs that were fetched and have a table, as text."""
    fetched = [event["text"] for event in events if event["kind"] == "StructureFetched"]
    return [text for text in fetched if "ttb0=" in text]


def syncs(events: list[Event]) -> Steps:
    """The CMD_SYNCs that completed configuration commands: which kind, and how many in a row."""
    opcodes = [event["opcode"] for event in events if event["kind"] == "CommandConsumed"]
    awaited = [opcodes[at - 1] for at, opcode in enumerate(opcodes) if opcode == "CMD_SYNC"]
    return joined((opcode, 1) for opcode in awaited if opcode.startswith("CMD_CFGI"))


def joined(steps: Iterable[tuple[str, int]]) -> Steps:
    """Put what follows its like into one step."""
    rows = groupby(steps, lambda step: step[0])
    return [(kind, sum(count for _, count in row)) for kind, row in rows]


def ste_updates(events: list[Event]) -> list[int]:
    """For each STE that the driver wrote, how many CMD_SYNCs that took. A prefetch ends each."""
    counts = [0]
    for event in (event for event in events if event["kind"] == "CommandConsumed"):
        if event["opcode"] == "CMD_CFGI_STE":
            counts[-1] += 1  # each with a CMD_SYNC of its own
        elif event["opcode"] == "CMD_PREFETCH_CONFIG":
            counts.append(0)
    return [count for count in counts if count]


def late(events: list[Event]) -> list[Event]:
    """The transactions that a CMD_SYNC did not wait for, though something had been invalidated before it.

    What moves bytes after a CMD_SYNC is complete has been translated after it began.
    """
    found = []
    translated: dict[tuple[int, int], int] = {}  # the place in `events`, by StreamID and IOVA
    synced = began = -1
    invalidated = False
    for place, event in enumerate(events):
        match event["kind"]:
            case "Translated":
                translated[event["stream_id"], event["iova"]] = place
            case "CommandConsumed":
                invalidated |= event["opcode"].startswith(("CMD_CFGI", "CMD_TLBI"))
            case "SyncWaiting":
                began = place
            case "SyncCompleted":
                if invalidated:
                    synced = place if began < 0 else began
                began, invalidated = -1, False
            case "DmaMoved" if translated.get((event["stream_id"], event["iova"]), place) < synced:
                found.append(event)
    return found


# Of the kernel's log


def logged(lines: list[str]) -> list[EventRecord]:
    """The event records that the driver logged."""
    found = []
    words: list[int] = []
    for line in lines:
        text = line.split(".iommu: ")[-1]
        if re.match(r"event(:| 0x\w+ received:)", text):
            words = []
        elif word := re.match(r"\t0x(\w{16})$", text):
            words.append(int(word[1], 16))
        if len(words) == 4:
            found.append(EventRecord(sum(part << 64 * at for at, part in enumerate(words))))
            words = []
    return found
