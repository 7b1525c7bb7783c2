"""A private directory for the sockets of one run, which does not outlive its run.

A process that is killed cannot tidy up. So a run holds a lock on its directory as long as it
lives, and whoever starts next removes the directories that nobody holds.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from viommu.closing import Closing
from viommu.lab.errors import LabError, SocketPathError

# `sun_path` of a Unix socket address, less the terminating zero.
SOCKET_PATH_LIMIT = 107

_LOCK = "lock"


def run_base() -> Path:
    """Where runs keep their directories: short, on a local file system, this user's own."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        return Path(runtime) / "viommu"
    return Path(tempfile.gettempdir()) / f"viommu-{os.getuid()}"


class RunDirectory(Closing):
    """Makes a directory below `base`; its end, or the next run's start, removes it.

    `path` is the directory. Raises `LabError` when `base` cannot be used.
    """

    def __init__(self, base: Path | None = None) -> None:
        base = base or run_base()
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            if base.stat().st_uid != os.getuid():
                raise LabError(f"{base} belongs to another user")
            # Made and locked under the lock of the base: nobody takes it for abandoned.
            with _locked(base / _LOCK):
                _remove_abandoned(base)
                self.path = Path(tempfile.mkdtemp(prefix="run-", dir=base))
                self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise LabError(f"{base} cannot hold a run's directory: {error.strerror}") from error

    def socket(self, name: str) -> Path:
        """Return the path of a socket in the directory; raises `SocketPathError` if too long."""
        path = self.path / f"{name}.sock"
        check_socket_length(path)
        return path

    def close(self) -> None:
        """Remove the directory and all that is in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def check_socket_length(path: Path) -> None:
    """Raise `SocketPathError` for a path that no Unix socket can have."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT:
        raise SocketPathError(
            f"the socket path {path} has {length} bytes, and at most {SOCKET_PATH_LIMIT} "
            "are possible: set XDG_RUNTIME_DIR or TMPDIR to a shorter directory"
        )


class _locked:  # noqa: N801 - reads as a function
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _remove_abandoned(base: Path) -> None:
    for directory in base.glob("run-*"):
        try:
            descriptor = os.open(directory / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            # Killed between making the directory and its lock.
            shutil.rmtree(directory, ignore_errors=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(descriptor)
