"""An image of any format that QEMU knows: its `qemu-nbd` reads and writes it, and lives as long as the store."""

import shutil
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

from viommu.disks.nbd import NbdDisk
from viommu.lab.assets import boot_tools
from viommu.lab.errors import DiskError
from viommu.lab.process import BoundProcess
from viommu.lab.rundir import RunDirectory

_START_LIMIT = 30.0  # seconds: a damaged image may be repaired before
_END_LIMIT = 10.0
_LOCKED = "is another process using the image"


class QemuNbd(NbdDisk):
    """The image at `path`, which is of the format `kind`, as `qemu-img` names it.

    With `snapshot` the image stays as it is, and what is written goes to a temporary file that ends with the store.
    When this process dies, `qemu-nbd` still puts the image in order. Raises `DiskError`, and `OSError` for an image
    that is not there.
    """

    def __init__(self, path: Path, kind: str, *, snapshot: bool = False) -> None:
        path.stat()
        program = _program()
        if program is None:
            raise DiskError(
                f"{path} needs qemu-nbd: install qemu-utils, or run viommu setup --disks"
            )
        with RunDirectory() as run:
            place = run.socket("nbd")
            options = [f"--socket={place}", f"--format={kind}", "--discard=unmap"]
            options += ["--snapshot"] if snapshot else []
            # It ends when its only client leaves.
            self._process = BoundProcess(
                [*program, *options, str(path.absolute())], death_signal=signal.SIGTERM
            )
            try:
                super().__init__(self._connect(place, path))
            except BaseException:
                self._process.close()
                raise

    def close(self) -> None:
        """Let it put the image in order and end."""
        super().close()
        self._process.wait(_END_LIMIT)
        self._process.close()

    def _connect(self, place: Path, path: Path) -> socket.socket:
        deadline = time.monotonic() + _START_LIMIT
        connection = socket.socket(socket.AF_UNIX)
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                connection.connect(str(place))
                return connection
            if self._process.wait(0.01) is not None:
                break
        connection.close()
        raise DiskError(_explain(path, self._process.output()))


def _program() -> tuple[str, ...] | None:
    """The command: that of the host, or what `viommu setup --disks` provided."""
    if path := shutil.which("qemu-nbd"):
        return (path,)
    tools = boot_tools()
    return tools.argv if tools else None


def _explain(path: Path, output: str) -> str:
    """One sentence of what `qemu-nbd` said before it ended."""
    if _LOCKED in output.lower():
        return f"{path} is in use by another program: end that first"
    lines = output.splitlines() or ["it said nothing"]
    return f"{path} cannot be opened by qemu-nbd: {lines[-1].removeprefix('qemu-nbd: ')}"
