"""What can go wrong in the lab, and the evidence each error carries.

LabError
 ├─ ConfigError         a machine's TOML, or what was asked of it, is wrong
 ├─ DiskError           a disk's image cannot be used
 ├─ SocketPathError     a device's socket is absent, or its path too long
 ├─ QemuTooOld          this QEMU has no `vfio-user-pci`
 ├─ MemoryNotShared     guest RAM is private to QEMU: no device can reach it
 └─ GuestError          the guest did not do what it should
     ├─ QemuExited      QEMU ended, or was killed
     ├─ GuestPanic      the guest's kernel panicked (an oops panics too)
     ├─ GuestTimeout    no answer within the time limit; QEMU is still running
     └─ CommandFailed   a command ran in the guest and its status was not 0
"""

import shlex
import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    """The state of a guest when something went wrong.

    `exit_code` is QEMU's: None while it runs, negative when a signal ended it.
    `console` holds the last console lines, `qemu_output` what QEMU itself printed.
    """

    command_line: tuple[str, ...] = ()
    exit_code: int | None = None
    console: tuple[str, ...] = ()
    qemu_output: str = ""

    def __str__(self) -> str:
        lines = [
            f"  QEMU: {describe_exit(self.exit_code)}",
            f"  command line: {shlex.join(self.command_line)}",
        ]
        if self.qemu_output:
            lines.append("  QEMU printed:")
            lines += [f"    | {line}" for line in self.qemu_output.splitlines()]
        lines.append("  last console lines:" if self.console else "  nothing on the console")
        lines += [f"    | {line}" for line in self.console]
        return "\n".join(lines)


def describe_exit(exit_code: int | None) -> str:
    """Put the exit code of a process into words."""
    if exit_code is None:
        return "still running"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name} (exit code {exit_code})"
    except ValueError:
        return f"killed by signal {-exit_code} (exit code {exit_code})"


class LabError(Exception):
    """The root. The first line of `str()` is one clear sentence; the evidence follows."""

    def __init__(self, message: str, evidence: Evidence | None = None) -> None:
        super().__init__(message if evidence is None else f"{message}\n{evidence}")
        self.message = message
        self.evidence = evidence or Evidence()

    @property
    def command_line(self) -> tuple[str, ...]:
        return self.evidence.command_line

    @property
    def exit_code(self) -> int | None:
        return self.evidence.exit_code

    @property
    def console(self) -> tuple[str, ...]:
        return self.evidence.console


class ConfigError(LabError):
    """A configuration cannot be used: says the file, the key and what is allowed."""


class DiskError(LabError):
    """A disk's image is locked, damaged or of another format, or the program that reads it is absent."""


class SocketPathError(LabError):
    """A vfio-user socket does not exist, or its path does not fit a Unix socket address."""


class QemuTooOld(LabError):
    """QEMU lacks `vfio-user-pci`, which it has from 10.1 on."""


class MemoryNotShared(LabError):
    """QEMU keeps guest RAM to itself, so that no vfio-user device could do DMA."""


class GuestError(LabError):
    """The guest, or the QEMU under it, did not do what it should."""


class QemuExited(GuestError):
    """QEMU ended while the guest was needed."""


class GuestPanic(GuestError):
    """The guest's kernel panicked; `reason` is the kernel's first line about it."""

    def __init__(self, reason: str, evidence: Evidence) -> None:
        super().__init__(f"the guest kernel panicked: {reason}", evidence)
        self.reason = reason


class GuestTimeout(GuestError):
    """The guest did not answer in time; what it does now is unknown."""


class CommandFailed(GuestError):
    """A command in the guest ended with a status other than 0."""

    def __init__(self, command: str, status: int, output: str, evidence: Evidence) -> None:
        super().__init__(f"in the guest, {command!r} ended with status {status}", evidence)
        self.command = command
        self.status = status
        self.output = output
