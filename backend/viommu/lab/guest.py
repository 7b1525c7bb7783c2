"""A guest: QEMU with a kernel, its console and its monitor."""

import shlex
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from viommu.closing import Closing
from viommu.lab.assets import Assets
from viommu.lab.config import Machine
from viommu.lab.console import ConsoleClosed, ConsoleTimeout, PanicSeen, normalise
from viommu.lab.emulator import Emulator
from viommu.lab.errors import CommandFailed, LabError
from viommu.lab.overlay import GUEST_ROOT, guest_files, initial_ram_disk, module_files
from viommu.lab.qemu import Boot, boot_arguments, machine_arguments, plug
from viommu.lab.shell import Shell

_UPLOAD_CHUNK = 16 << 10


@dataclass(frozen=True)
class CommandResult:
    """What a command in the guest printed (both streams), and its exit status."""

    output: str
    status: int


class Guest(Closing):
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
        self._qemu = assets.qemu_for(machine.arch)
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
        self._open = ExitStack()
        self._emulator: Emulator | None = None
        self._shell: Shell | None = None
        self._failure: LabError | None = LabError("the guest was not started")

    # Life

    def start(self, timeout: float | None = None) -> None:
        """Boot and wait until the guest takes commands, at most `timeout` seconds.

        Without a timeout, the machine's own holds. A guest that does not come up is closed.
        """
        limit = self.machine.timeouts.boot if timeout is None else timeout
        deadline = time.monotonic() + limit
        try:
            self._launch().connect(limit)
            self._greet(deadline, limit)
            self._failure = None
        except BaseException as error:
            if isinstance(error, LabError):
                self._failure = error
            self.close()
            raise

    def reboot(self, timeout: float | None = None, *, hard: bool = False) -> None:
        """Let the guest reboot, and wait until it takes commands again; QEMU and its devices stay.

        It boots the same kernel, initial RAM disk and device tree. With `hard` the machine is reset as by its button,
        and the kernel switches nothing off before. `timeout` is as for `start`.
        """
        self._require()
        assert self._emulator is not None
        limit = self.machine.timeouts.boot if timeout is None else timeout
        deadline = time.monotonic() + limit
        self._execute("set-action", {"reboot": "reset"})
        self._failure = LabError("the guest was left alone while it rebooted")
        try:
            if hard:
                self._execute("system_reset", {})
            else:
                self._emulator.console.send(b"reboot -f\n")
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

    @property
    def lost(self) -> bool:
        """Whether the guest can no longer be used."""
        return self._failure is not None

    @property
    def pid(self) -> int:
        """QEMU's process."""
        assert self._emulator is not None
        return self._emulator.process.pid

    @property
    def command_line(self) -> tuple[str, ...]:
        """QEMU's command line; empty before the start."""
        return self._emulator.command_line if self._emulator else ()

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
            assert self._emulator is not None
            evidence = self._emulator.evidence()
            raise CommandFailed(command, result.status, result.output, evidence)
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
        return self._emulator.console_log() if self._emulator else ""

    def kernel_log(self) -> str:
        """Return the kernel's log, which after boot reaches the console only in a panic."""
        return self.check("dmesg")

    # Inside

    def _launch(self) -> Emulator:
        devices = plug(self.machine, self._devices)
        with initial_ram_disk(self._initramfs, self._files) as disk:
            boot = Boot(
                kernel=self._kernel,
                initramfs=Path(f"/proc/self/fd/{disk.fileno()}"),
                command_line=self._words,
                device_tree=self._device_tree,
            )
            arguments = (
                *machine_arguments(self.machine),
                *boot_arguments(self.machine, boot),
                *devices,
                *self._more,
            )
            self._emulator = Emulator(
                self.machine,
                self._qemu,
                arguments,
                inherited=[disk.fileno()],
                listener=self._listener,
            )
        self._open.callback(self._emulator.close)
        self._shell = Shell(self._emulator.console)
        return self._emulator

    def _greet(self, deadline: float, limit: float) -> None:
        assert self._shell is not None
        try:
            self._shell.take_over(max(deadline - time.monotonic(), 0))
        except (ConsoleTimeout, ConsoleClosed, PanicSeen) as error:
            raise self._explain(error, "booting", limit) from None

    def _execute(self, command: str, arguments: Mapping[str, object]) -> object:
        assert self._emulator is not None
        try:
            return self._emulator.execute(command, arguments)
        except LabError as error:
            self._failure = error
            raise

    def _require(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _explain(self, error: Exception, doing: str, limit: float) -> LabError:
        """What is to be said of it, now and by later calls."""
        assert self._emulator is not None
        self._failure = self._emulator.explain(error, doing, limit)
        return self._failure


def _short(command: str) -> str:
    line = " ".join(command.split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
