"""A child process that dies with its parent and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO

_EXEC_BOUND = Path(__file__).with_name("exec_bound.py")


class BoundProcess:
    """Runs `argv` in a session of its own; this process's death kills it, whatever the cause.

    It gets `death_signal` then. `pass_fds` are inherited. Standard input is empty; what the process prints is kept, see
    `output()`. A terminal's Ctrl-C does not reach it: `close()` ends it.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        starter = [sys.executable, "-I", "-S", str(_EXEC_BOUND)]
        self._argv = [*starter, str(os.getpid()), str(int(death_signal)), *argv]
        self._pass_fds = tuple(pass_fds)
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._ended = threading.Event()
        # The kernel ties the child to the *thread* that started it, so a thread that lives
        # exactly as long as the child starts it, and not whoever happens to call us.
        started: SimpleQueue[subprocess.Popen[bytes] | BaseException] = SimpleQueue()
        self._keeper = threading.Thread(
            target=self._keep, args=(started,), name="lab-process", daemon=True
        )
        self._keeper.start()
        outcome = started.get()
        if isinstance(outcome, BaseException):
            self._output.close()
            raise outcome
        self._process = outcome

    def _keep(self, started: SimpleQueue[subprocess.Popen[bytes] | BaseException]) -> None:
        try:
            process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=self._pass_fds,
                start_new_session=True,
            )
        except BaseException as error:
            started.put(error)
            return
        started.put(process)
        process.wait()
        self._ended.set()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.returncode if self._ended.is_set() else None

    def wait(self, timeout: float) -> int | None:
        """Wait up to `timeout` seconds for the end; returns `exit_code`."""
        self._ended.wait(timeout)
        return self.exit_code

    def output(self) -> str:
        """What the process printed so far, on both streams."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace").strip()

    def close(self) -> None:
        """Kill the process if it still runs, and wait for its end."""
        if self._output.closed:
            return
        if not self._ended.is_set():
            self._process.kill()
        self._keeper.join()
        self._output.close()
