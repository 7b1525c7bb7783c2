"""What a guest has done since somebody last asked: its kernel's messages, what its devices told, its end."""

import re
from dataclasses import dataclass
from typing import Any

from viommu.lab.errors import LabError, describe_exit
from viommu.lab.rig import Rig

# The kernel's messages that no healthy kernel prints, each at the beginning of a line.
_ALARM = re.compile(
    r"WARNING: |BUG: |watchdog: BUG: |Oops|Internal error: |Unable to handle |general protection fault|"
    r"kernel BUG at |Kernel panic |UBSAN: |INFO: task .* blocked for more than|"
    r"rcu: INFO: .*(?:stall|self-detected)|irq \d+: nobody cared|Bad page "
)
_LINE = re.compile(r"\[ *(\d+\.\d+)\](?:\[ *[TC]\d+\])? (.*)")
# Bits of /proc/sys/kernel/tainted: a bad page, an oops, a WARNING, a soft lockup.
_BROKEN = 1 << 5 | 1 << 7 | 1 << 9 | 1 << 14
_EVENTS = ("EventRecorded", "EventLost", "GlobalErrorRaised")
_FAILED = "FunctionFailed"


@dataclass(frozen=True)
class News:
    """`alarms` are what a test must have foreseen, a line each; a `broken` guest is not fit for another test."""

    kernel_log: tuple[str, ...]
    events: tuple[str, ...]
    alarms: tuple[str, ...]
    broken: bool


class Newsroom:
    """Asks a guest that has booted; the first answer begins with the boot."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._boot, self._last = "", "-1"
        self._trace = rig.serving.trace(*_EVENTS, _FAILED)
        self._over = False

    def ask(self) -> News:
        """Never raises: that a guest does not answer is news, once."""
        if self._over:
            return News((), (), (), broken=True)
        alarms: list[str] = []
        lines: list[str] = []
        tainted = 0
        try:
            tainted, lines = self._kernel()
        except LabError as error:
            alarms.append(error.message)
        if (code := self._rig.serving.exit_code) is not None:
            alarms.append(f"the server of the devices {describe_exit(code)}")
        messages = [match[2] if (match := _LINE.match(line)) else line for line in lines]
        alarms += filter(alarming, messages)
        news = self._trace.read()
        failed = [event for event in news if event["kind"] == _FAILED]
        alarms += [f"device {event['function']} failed: {event['error']}" for event in failed]
        events = [_told(event) for event in news if event["kind"] != _FAILED]
        self._over = self._rig.lost
        broken = self._over or bool(tainted & _BROKEN) or bool(failed)
        return News(tuple(lines), tuple(events), (*alarms, *events), broken)

    def close(self) -> None:
        """There will be no more."""
        self._over = True
        self._trace.close()

    def _kernel(self) -> tuple[int, list[str]]:
        """What its kernel is tainted by, and the messages since the last time."""
        boot, tainted, *lines = self._rig.guest.run(
            "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/tainted; "
            f"dmesg | awk -F '[][]' '$2 + 0 > {self._last}'"
        ).output.splitlines()
        if boot != self._boot:
            self._boot, before, self._last = boot, self._last, "-1"
            if before != self._last:  # it has rebooted, and its clock began anew
                return self._kernel()
        if lines and (match := _LINE.match(lines[-1])):
            self._last = match[1]
        return int(tainted), lines


def alarming(message: str) -> bool:
    """Whether a kernel that says so is not well. `message` is without its time."""
    return _ALARM.match(message) is not None


def _told(event: dict[str, Any]) -> str:
    match event["kind"]:
        case "EventRecorded":
            return f"SMMU event {event['event']}: {event['text']}"
        case "EventLost":
            lost = f"SMMU event {event['event']} of stream {event['stream_id']:#x}"
            return f"{lost} was lost: {event['why']}"
        case _:
            return f"SMMU global error {event['error']}"
