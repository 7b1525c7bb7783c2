"""QEMU with its console and its monitor, and what there is to say when it fails."""

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from viommu.lab.assets import Qemu
from viommu.lab.config import Machine
from viommu.lab.console import Console, ConsoleClosed, PanicSeen
from viommu.lab.errors import (
    Evidence,
    GuestPanic,
    GuestTimeout,
    LabError,
    MemoryNotShared,
    QemuExited,
    QemuTooOld,
    describe_exit,
)
from viommu.lab.monitor import Monitor, MonitorClosed, MonitorTimeout
from viommu.lab.process import BoundProcess
from viommu.lab.qemu import refusal_of_old, socket_arguments
from viommu.lab.shell import transcript

_EVIDENCE_LINES = 40
# How long a dying QEMU may take, in seconds.
_LAST_WORDS = 5.0


class Emulator:
    """Runs from here on until `close()`, with `arguments` and those for its console and monitor.

    `inherited` are further descriptors for it; `listener` gets what the console shows. `connect` comes next.
    """

    def __init__(
        self,
        machine: Machine,
        qemu: Qemu,
        arguments: Sequence[str],
        *,
        inherited: Sequence[int] = (),
        listener: Callable[[bytes], None] | None = None,
    ) -> None:
        self._machine = machine
        self._qemu = qemu
        self._open = ExitStack()
        try:
            console, console_end = self._channel()
            self._connection, monitor_end = self._channel()
            ends = (monitor_end.fileno(), console_end.fileno())
            self.command_line = (
                *qemu.argv,
                *arguments,
                *socket_arguments(monitor=ends[0], console=ends[1]),
            )
            self.console = Console(console)
            if listener is not None:
                self.console.listen(listener)
            self.process = BoundProcess(self.command_line, pass_fds=(*inherited, *ends))
            self._open.callback(self.process.close)
            # With our copies gone, the end of QEMU is the end of both streams.
            console_end.close()
            monitor_end.close()
        except BaseException:
            self._open.close()
            raise
        self._monitor: Monitor | None = None

    def connect(self, limit: float) -> None:
        """Wait until the machine is set up, at most `limit` seconds, and see that a device can reach its memory."""
        try:
            self._monitor = Monitor(self._connection, limit)
        except (MonitorClosed, MonitorTimeout) as error:
            raise self.explain(error, "setting the machine up", limit) from None
        self._open.callback(self._monitor.close)
        self._check_memory()

    def _check_memory(self) -> None:
        # Others may have replaced the memory with arguments of their own.
        path = self.execute("qom-get", {"path": "/machine", "property": "memory-backend"})
        if not (path and self.execute("qom-get", {"path": path, "property": "share"})):
            raise MemoryNotShared(
                "guest RAM is not shared, so no vfio-user device can reach it: "
                "use a memory-backend-memfd with share=on",
                self.evidence(),
            )

    def execute(self, command: str, arguments: Mapping[str, object]) -> object:
        """Run a QMP command and return its result."""
        assert self._monitor is not None
        limit = self._machine.timeouts.command
        try:
            return self._monitor.execute(command, arguments, limit)
        except (MonitorClosed, MonitorTimeout) as error:
            raise self.explain(error, f"running {command!r} in QEMU", limit) from None

    def console_log(self) -> str:
        """What the console has shown so far, with the commands that were run."""
        self.console.drain(0)
        return transcript(self.console.text())

    def explain(self, error: Exception, doing: str, limit: float) -> LabError:
        """Tell a panic, the end of QEMU and a time-out apart."""
        # A QEMU that ends closes its sockets; a kernel that panics ends QEMU.
        ending = isinstance(error, (ConsoleClosed, PanicSeen, MonitorClosed))
        self.console.drain(_LAST_WORDS if isinstance(error, PanicSeen) else 0)
        exit_code = self.process.wait(_LAST_WORDS if ending else 0)
        evidence = self.evidence()
        reason = self.console.panic_reason()
        old = refusal_of_old(self._machine.arch, self._qemu.version, evidence.qemu_output)
        if reason is not None:
            return GuestPanic(reason, evidence)
        if exit_code is None:
            return GuestTimeout(f"no answer within {limit:g} s while {doing}", evidence)
        if old is not None:
            return QemuTooOld(old, evidence)
        return QemuExited(_how_it_ended(evidence, doing), evidence)

    def evidence(self) -> Evidence:
        """The state it is in."""
        return Evidence(
            command_line=self.command_line,
            exit_code=self.process.exit_code,
            console=tuple(self.console_log().splitlines()[-_EVIDENCE_LINES:]),
            qemu_output=self.process.output(),
        )

    def close(self) -> None:
        """End QEMU at once and let go of everything. Any number of times."""
        self._open.close()

    def _channel(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._open.callback(ours.close)
        self._open.callback(theirs.close)
        return ours, theirs


def _how_it_ended(evidence: Evidence, doing: str) -> str:
    if evidence.exit_code == 0:
        return f"the guest switched itself off or rebooted while {doing}"
    how = f"QEMU {describe_exit(evidence.exit_code)} while {doing}"
    lines = [line for line in evidence.qemu_output.splitlines() if "warning:" not in line]
    return f"{how}: {lines[-1]}" if lines else how
