"""The devices of a machine, served by a process of their own, as they are for a user."""

import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from viommu.closing import Closing
from viommu.control import ControlClient
from viommu.lab.errors import LabError
from viommu.lab.process import BoundProcess
from viommu.lab.rundir import RunDirectory
from viommu.lab.user_disk import UserDisk
from viommu.trace_file import TraceReader

CONTROL_NAME = "control.sock"
"""The control socket in a server's directory."""
_START_LIMIT = 30.0  # seconds


class ServerFailed(LabError):
    """The process that serves the devices did not start, or ended."""


class Serving(Closing):
    """Runs `viommu serve` for a machine; gone at `close()`, or when this process dies.

    `sockets` maps the names of the devices to their sockets. With `trace`, `trace()` reads what happens; with `ledger`
    the trace has what `viommu.ledger.Ledger` needs. `smmu` are lines for the machine's `[smmu]` table, `faults` is the
    path of a plan, `disk` takes the place of the machine's own.
    """

    def __init__(
        self,
        machine: str | Path,
        *,
        trace: bool = False,
        ledger: bool = False,
        smmu: str = "",
        seed: int = 0,
        faults: Path | None = None,
        disk: UserDisk | None = None,
    ) -> None:
        self._directory = RunDirectory()
        self._open = ExitStack()
        self._trace = self._directory.path / "trace.jsonl" if trace or ledger else None
        reader, writer = os.pipe()
        argv = [sys.executable, "-P", "-m", "viommu.cli", "serve", str(machine)]
        argv += ["--directory", str(self._directory.path), "--seed", str(seed)]
        argv += ["--ready-fd", str(writer)]
        if disk is not None:
            argv += disk.options()
        if smmu:
            argv += ["--smmu", smmu]
        if self._trace is not None:
            argv += ["--trace", str(self._trace)]
        if ledger:
            argv += ["--ledger"]
        if faults is not None:
            argv += ["--faults", str(faults)]
        try:
            self._process = BoundProcess(argv, pass_fds=(writer,))
        except BaseException:
            os.close(reader)
            self._directory.close()
            raise
        finally:
            os.close(writer)
        try:
            self.sockets: Mapping[str, Path] = self._wait(reader)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(reader)

    def _wait(self, reader: int) -> dict[str, Path]:
        text = b""
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([reader], [], [], _START_LIMIT)
            chunk = os.read(reader, 65536) if ready else b""
            if not chunk:
                self._process.wait(1.0)
                said = self.output().splitlines() or ["it said nothing"]
                reason = said[-1].removeprefix("viommu: ")
                raise ServerFailed(f"`viommu serve` did not start: {reason}")
            text += chunk
        return {name: Path(path) for name, path in json.loads(text).items()}

    @property
    def directory(self) -> Path:
        """A directory for the files of this run; it goes with it."""
        return self._directory.path

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The server's exit code; None while it serves."""
        return self._process.exit_code

    @cached_property
    def control(self) -> ControlClient:
        """A client of the server's control socket."""
        return self._open.enter_context(ControlClient(self.directory / CONTROL_NAME))

    def report(self) -> None:
        """Let the server put what it holds into the trace, as `ServerHolds`."""
        os.kill(self.pid, signal.SIGUSR1)

    def output(self) -> str:
        """What the server has logged."""
        return self._process.output()

    @property
    def trace_path(self) -> Path | None:
        """The file of the trace."""
        return self._trace

    def trace(self, *kinds: str) -> TraceReader:
        """A reader of the trace, from its beginning: of all events, or of some kinds."""
        if self._trace is None:
            raise ValueError("the trace is off: pass trace=True")
        return TraceReader(self._trace, *kinds)

    def close(self) -> None:
        """End the server and remove its directory."""
        self._open.close()
        self._process.close()
        self._directory.close()
