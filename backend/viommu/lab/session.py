"""One command in one guest, with all that is to be known of it afterwards."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from viommu.lab.errors import GuestError
from viommu.lab.overlay import GUEST_ROOT
from viommu.lab.recording import ConsoleLine, Recorder, last_stamp, with_kernel_log
from viommu.lab.rig import Rig

_SCRIPTS = f"/{GUEST_ROOT}/script"


@dataclass(frozen=True, slots=True)
class Played:
    """What came of it. `status` is the command's, None when it did not come to its end, for the reason `error`.

    `trace` is the file of the trace. `console` has times in the trace's seconds, true to some 10 ms.
    """

    status: int | None
    error: GuestError | None
    console: tuple[ConsoleLine, ...]
    kernel: str | None
    qemu: tuple[str, ...]
    trace: Path


def script_in_guest(script: Path, arguments: list[str]) -> tuple[str, dict[str, bytes]]:
    """The command that runs a Python script of the host in the guest, and the file that this takes there."""
    place = f"{_SCRIPTS}/{script.name}"
    command = (
        f"cd /{GUEST_ROOT} && PYTHONUNBUFFERED=1 PYTHONPATH=/{GUEST_ROOT}:/{GUEST_ROOT}/inside "
        f"exec python3 {shlex.join([place, *arguments])}"
    )
    return command, {place.removeprefix("/"): script.read_bytes()}


@contextmanager
def played(
    machine: str | Path,
    command: str,
    *,
    follow: Callable[[bytes], None],
    timeout: float | None = None,
    ledger: bool = True,
    **rig: Any,
) -> Iterator[Played]:
    """Boot `machine`, run `command` in the guest, end the guest and tell what came of it.

    `follow` gets the command's output as it comes. With `ledger` the trace has what the ledger needs. Further arguments
    are those of `Rig`. A guest that fails is told of in `error`; what else goes wrong is raised. The trace is there
    until the context ends.
    """
    recorder = Recorder()
    made = Rig(machine, trace=True, ledger=ledger, listener=recorder.feed, **rig)
    start = monotonic()  # the trace began when its server was ready
    status, error, kernel = None, None, None
    log, booted = "", 0.0
    try:
        try:
            # Not by the rig, whose trace goes with a guest that does not come up.
            made.guest.start()
            if made.smmu is not None:
                made.smmu.bind(made.guest)
            kernel = made.guest.check("uname -r").strip()
            status = made.guest.run(command, timeout, follow).status
            uptime, _, log = made.guest.check("cat /proc/uptime; dmesg").partition("\n")
            booted = monotonic() - start - float(uptime.split()[0])
        except GuestError as failed:
            error = failed
        console = list(recorder.lines(start))
        qemu = made.guest.command_line
        made.guest.close()
        assert made.serving.trace_path is not None
        yield Played(
            status=status,
            error=error,
            console=tuple(with_kernel_log(console, log, last_stamp(console), booted)),
            kernel=kernel,
            qemu=qemu,
            trace=made.serving.trace_path,
        )
    finally:
        made.guest.close()
        made.close()
