"""An image of any format that QEMU knows: its `qemu-nbd` reads and writes it for us, and ends when we do."""

import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from viommu.disks.nbd import NbdDisk
from viommu.lab.assets import boot_tools
from viommu.lab.errors import DiskError
from viommu.lab.process import BoundProcess
from viommu.lab.rundir import RunDirectory

_START_LIMIT = 30.0  # seconds: a damaged image may be repaired first
_END_LIMIT = 10.0
_LOCKED = "is another process using the image"


@contextmanager
def served(
    path: Path, kind: str, *, snapshot: bool = False, wake: Callable[[], None] = lambda: None
) -> Iterator[NbdDisk]:
    """The image at `path`, which is of the format `kind`, as `qemu-img` names it.

    With `snapshot` the image stays as it is, and what is written goes to a temporary file that ends with the block.
    When this process dies, `qemu-nbd` still puts the image in order. See `Flusher` for `wake`.

    Raises `DiskError`, and `OSError` for an image that is not there.
    """
    path.stat()
    program = _program()
    if program is None:
        raise DiskError(f"{path} needs qemu-nbd: install qemu-utils, or run viommu setup --disks")
    with ExitStack() as stack:
        with RunDirectory() as run:
            place = run.socket("nbd")
            options = [f"--socket={place}", f"--format={kind}", "--discard=unmap", "--shared=2"]
            options += ["--snapshot"] if snapshot else []
            command = [*program, *options, str(path.absolute())]
            process = BoundProcess(command, death_signal=signal.SIGTERM)
            stack.callback(process.close)
            stack.callback(process.wait, _END_LIMIT)  # it ends when its clients have left
            try:
                disk = NbdDisk(lambda: _connect(place, process), wake)
            except ConnectionError:  # it listens before it opens the image
                process.wait(_END_LIMIT)
                raise DiskError(_explain(path, process.output())) from None
        yield stack.enter_context(disk)


def _connect(place: Path, process: BoundProcess) -> socket.socket:
    deadline = time.monotonic() + _START_LIMIT
    connection = socket.socket(socket.AF_UNIX)
    while True:
        try:
            connection.connect(str(place))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            if process.wait(0.01) is not None or time.monotonic() > deadline:
                connection.close()
                raise ConnectionRefusedError from None


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
    reason = lines[-1].removeprefix("qemu-nbd: ")
    reason = reason.removeprefix(f"Failed to blk_new_open '{path.absolute()}': ")
    return f"{path} cannot be opened by qemu-nbd: {reason}"
