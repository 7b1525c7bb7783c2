"""A guest: QEMU with a kernel, its console and its monitor."""

import shlex
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from viommu.lab.assets import Assets
from viommu.lab.config import Machine
from viommu.lab.console import Console, ConsoleClosed, ConsoleTimeout, PanicSeen, normalise
from viommu.lab.errors import (
    CommandFailed,
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
from viommu.lab.overlay import GUEST_ROOT, guest_files, initial_ram_disk, module_files
from viommu.lab.process import BoundProcess
from viommu.lab.qemu import (
    Boot,
    boot_arguments,
    machine_arguments,
    plug,
    refusal_of_old,
    socket_arguments,
)
from viommu.lab.shell import Shell, transcript

_EVIDENCE_LINES = 40
_UPLOAD_CHUNK = 16 << 10
# How long a dying QEMU may take, in seconds.
_LAST_WORDS = 5.0


@dataclass(frozen=True)
class CommandResult:
    """What a command in the guest printed (both streams), and its exit status."""

    output: str
    status: int


class Guest:
    """A guest that boots at `start()` (or on entering the context) and is gone at `close()`.

    `devices` maps names of the machine's devices to the vfio-user sockets that serve them;
    the others stay unplugged. `kernel`, `initramfs` and `modules` (a `lib/modules/<release>`
    folder) replace the guest's own, `image` names another guest of `Assets`. `scripts` is a folder of Python files for
    `/viommu/inside`, `extra_files` more files by their path in the guest. `listener` gets what the console shows.

    Errors are `LabError`s. After a panic, a time-out or QEMU's end the guest is lost: each
    further call raises the same error again.
    """

    def __init__(
        self,
        machine: Machine,
        assets: Assets,
        *,
        devices: Mapping[str, Path] | None = None,
        scripts: Path | None = None,
        extra_files: Mapping[str, bytes] | None = None,
        image: str | None = None,
        kernel: Path | None = None,
        initramfs: Path | None = None,
        modules: Path | None = None,
        device_tree: Path | None = None,
        command_line: str = "",
        qemu_arguments: Sequence[str] = (),
        listener: Callable[[bytes], None] | None = None,
    ) -> None:
        self.machine = machine
        self._emulator = assets.qemu_for(machine.arch)
        own = assets.guest_for(image or machine.arch)
        self._kernel = kernel or own.kernel
        self._initramfs = initramfs or own.initramfs
        self._device_tree = device_tree
        self._words = command_line
        self._devices = dict(devices or {})
        self._files = guest_files(scripts, extra_files)
        if modules is not None:
            self._files |= module_files(modules)
        self._more = tuple(qemu_arguments)
        self._listener = listener
        self._command_line: tuple[str, ...] = ()
        self._open = ExitStack()
        self._process: BoundProcess | None = None
        self._console: Console | None = None
        self._shell: Shell | None = None
        self._monitor: Monitor | None = None
        self._failure: LabError | None = LabError("the guest was not started")

    # Life

    def start(self, timeout: float | None = None) -> None:
        """Boot and wait until the guest takes commands, at most `timeout` seconds.

        Without a timeout, the machine's own holds. A guest that does not come up is closed.
        """
        limit = self.machine.timeouts.boot if timeout is None else timeout
        deadline = time.monotonic() + limit
        try:
            self._launch(limit)
            self._check_memory()
            self._greet(deadline, limit)
            self._failure = None
        except BaseException:
            self.close()
            raise

    def reboot(self, timeout: float | None = None, *, hard: bool = False) -> None:
        """Let the guest reboot, and wait until it takes commands again; QEMU and its devices stay.

        It boots the same kernel, initial RAM disk and device tree. With `hard` the machine is reset as by its button,
        and the kernel switches nothing off before. `timeout` is as for `start`.
        """
        self._require()
        assert self._console is not None
        limit = self.machine.timeouts.boot if timeout is None else timeout
        deadline = time.monotonic() + limit
        self._execute("set-action", {"reboot": "reset"})
        self._failure = LabError("the guest was left alone while it rebooted")
        try:
            if hard:
                self._execute("system_reset", {})
            else:
                self._console.send(b"reboot -f\n")
        except ConsoleClosed as error:
            raise self._explain(error, "rebooting", limit) from None
        self._greet(deadline, limit)
        self._failure = None
        self._execute("set-action", {"reboot": "shutdown"})

    def close(self) -> None:
        """End QEMU at once and let go of everything. Any number of times."""
        if self._failure is None:
            self._failure = LabError("the guest was closed")
        self._open.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def lost(self) -> bool:
        """Whether the guest can no longer be used."""
        return self._failure is not None

    @property
    def pid(self) -> int:
        """QEMU's process."""
        assert self._process is not None
        return self._process.pid

    @property
    def command_line(self) -> tuple[str, ...]:
        """QEMU's command line; empty before the start."""
        return self._command_line

    # Talking to it

    def run(
        self,
        command: str,
        timeout: float | None = None,
        follow: Callable[[bytes], None] | None = None,
    ) -> CommandResult:
        """Run a shell command in the guest; returns its output and exit status.

        Each command has a shell of its own, as root, with no standard input. `timeout` is in
        seconds; without one, the machine's own holds. `follow` gets the output as it comes.
        """
        self._require()
        limit = self.machine.timeouts.command if timeout is None else timeout
        # Whatever interrupts us, the next command would read this one's output.
        self._failure = LabError(f"the guest was left alone with {_short(command)}")
        assert self._shell is not None
        try:
            output, status = self._shell.run(command, limit, follow)
        except (ConsoleTimeout, ConsoleClosed, PanicSeen) as error:
            raise self._explain(error, f"running {_short(command)}", limit) from None
        except ValueError:
            self._failure = None
            raise
        self._failure = None
        return CommandResult(normalise(output), status)

    def check(self, command: str, timeout: float | None = None) -> str:
        """Run a command that must end with status 0; returns its output.

        Raises `CommandFailed` otherwise.
        """
        result = self.run(command, timeout)
        if result.status:
            raise CommandFailed(command, result.status, result.output, self._evidence())
        return result.output

    def python(self, script: str, timeout: float | None = None) -> str:
        """Run `python3 SCRIPT` in the guest with our packages importable; returns the output.

        `script` is the script's path in the guest, with arguments if need be.
        """
        return self.check(f"PYTHONPATH=/{GUEST_ROOT} exec python3 {script}", timeout)

    def put(self, path: str, data: bytes) -> None:
        """Write a small file in the guest (larger ones: `extra_files`)."""
        target = shlex.quote(path)
        self.check(f": > {target}")
        for start in range(0, len(data), _UPLOAD_CHUNK):
            chunk = b64encode(data[start : start + _UPLOAD_CHUNK]).decode()
            self.check(f"echo {chunk} | base64 -d >> {target}")

    def interact(self, source: int = 0, sink: int = 1) -> bool:
        """Connect a terminal (two descriptors) with a shell on the guest's console.

        Returns True when the person left the shell, and False on Ctrl-], after which the guest
        takes no more commands.
        """
        self._require()
        self._failure = LabError("the guest was left with a shell on its console")
        assert self._shell is not None
        try:
            done = self._shell.attach(self.machine.console, source, sink)
        except (ConsoleTimeout, ConsoleClosed, PanicSeen) as error:
            raise self._explain(error, "a person used it", self.machine.timeouts.command) from None
        if done:
            self._failure = None
        return done

    def qmp(self, command: str, /, **arguments: object) -> object:
        """Run a QMP command and return its result.

        Raises `qemu.qmp.ExecuteError` when QEMU refuses it.
        """
        self._require()
        return self._execute(command, arguments)

    def console_log(self) -> str:
        """What the console has shown so far, with the commands that were run."""
        if self._console is None:
            return ""
        self._console.drain(0)
        return transcript(self._console.text())

    def kernel_log(self) -> str:
        """Return the kernel's log, which after boot reaches the console only in a panic."""
        return self.check("dmesg")

    # Inside

    def _launch(self, limit: float) -> None:
        devices = plug(self.machine, self._devices)
        disk = self._open.enter_context(initial_ram_disk(self._initramfs, self._files))
        console, console_end = self._channel()
        monitor, monitor_end = self._channel()
        boot = Boot(
            kernel=self._kernel,
            initramfs=Path(f"/proc/self/fd/{disk.fileno()}"),
            command_line=self._words,
            device_tree=self._device_tree,
        )
        self._command_line = (
            *self._emulator.argv,
            *machine_arguments(self.machine),
            *boot_arguments(self.machine, boot),
            *devices,
            *socket_arguments(monitor=monitor_end.fileno(), console=console_end.fileno()),
            *self._more,
        )
        inherited = (disk.fileno(), monitor_end.fileno(), console_end.fileno())
        self._console = Console(console)
        if self._listener is not None:
            self._console.listen(self._listener)
        self._shell = Shell(self._console)
        self._process = BoundProcess(self._command_line, pass_fds=inherited)
        self._open.callback(self._process.close)
        # With our copies gone, the end of QEMU is the end of both streams.
        console_end.close()
        monitor_end.close()
        try:
            self._monitor = Monitor(monitor, limit)
        except (MonitorClosed, MonitorTimeout) as error:
            raise self._explain(error, "setting the machine up", limit) from None
        self._open.callback(self._monitor.close)
        disk.close()

    def _channel(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        self._open.callback(ours.close)
        self._open.callback(theirs.close)
        return ours, theirs

    def _check_memory(self) -> None:
        # Others may have replaced the memory with arguments of their own.
        path = self._execute("qom-get", {"path": "/machine", "property": "memory-backend"})
        shared = path and self._execute("qom-get", {"path": path, "property": "share"})
        if not shared:
            raise MemoryNotShared(
                "guest RAM is not shared, so no vfio-user device can reach it: "
                "use a memory-backend-memfd with share=on",
                self._evidence(),
            )

    def _greet(self, deadline: float, limit: float) -> None:
        assert self._shell is not None
        try:
            self._shell.take_over(max(deadline - time.monotonic(), 0))
        except (ConsoleTimeout, ConsoleClosed, PanicSeen) as error:
            raise self._explain(error, "booting", limit) from None

    def _execute(self, command: str, arguments: Mapping[str, object]) -> object:
        assert self._monitor is not None
        limit = self.machine.timeouts.command
        try:
            return self._monitor.execute(command, arguments, limit)
        except (MonitorClosed, MonitorTimeout) as error:
            raise self._explain(error, f"running {command!r} in QEMU", limit) from None

    def _require(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _explain(self, error: Exception, doing: str, limit: float) -> LabError:
        """Tell a panic, the end of QEMU and a time-out apart, and keep it for later calls."""
        assert self._process is not None
        assert self._console is not None
        # A QEMU that ends closes its sockets; a kernel that panics ends QEMU.
        ending = isinstance(error, (ConsoleClosed, PanicSeen, MonitorClosed))
        self._console.drain(_LAST_WORDS if isinstance(error, PanicSeen) else 0)
        exit_code = self._process.wait(_LAST_WORDS if ending else 0)
        evidence = self._evidence()
        reason = self._console.panic_reason()
        old = refusal_of_old(self.machine.arch, self._emulator.version, evidence.qemu_output)
        if reason is not None:
            self._failure = GuestPanic(reason, evidence)
        elif exit_code is None:
            self._failure = GuestTimeout(f"no answer within {limit:g} s while {doing}", evidence)
        elif old is not None:
            self._failure = QemuTooOld(old, evidence)
        else:
            self._failure = QemuExited(_how_it_ended(evidence, doing), evidence)
        return self._failure

    def _evidence(self) -> Evidence:
        assert self._process is not None
        return Evidence(
            command_line=self._command_line,
            exit_code=self._process.exit_code,
            console=tuple(self.console_log().splitlines()[-_EVIDENCE_LINES:]),
            qemu_output=self._process.output(),
        )


def _how_it_ended(evidence: Evidence, doing: str) -> str:
    if evidence.exit_code == 0:
        return f"the guest switched itself off or rebooted while {doing}"
    how = f"QEMU {describe_exit(evidence.exit_code)} while {doing}"
    lines = [line for line in evidence.qemu_output.splitlines() if "warning:" not in line]
    return f"{how}: {lines[-1]}" if lines else how


def _short(command: str) -> str:
    line = " ".join(command.split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
