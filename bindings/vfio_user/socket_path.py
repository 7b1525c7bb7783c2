"""Whether a server may have a socket path, said clearly before the library tries."""

import errno
import os
import socket
import stat
from pathlib import Path

from vfio_user.errors import SocketBusy, SocketError

LONGEST = 107
"""Bytes that a path may have: `sun_path` has 108 with the terminating zero (unix(7))."""


def claim(path: Path) -> bytes:
    """Make `path` free to bind and return it as bytes. A stale socket is removed.

    Raises `SocketBusy` if a server lives there and `SocketError` if the path cannot be used.
    """
    encoded = os.fsencode(path)
    if len(encoded) > LONGEST:
        raise SocketError(
            f"socket path of {len(encoded)} bytes is longer than the {LONGEST} that a Unix socket "
            f"allows: {path}"
        )
    if b"\0" in encoded:
        raise SocketError(f"socket path contains a zero byte: {str(path)!r}")
    if not path.parent.is_dir():
        raise SocketError(f"no such directory for the socket: {path.parent}")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return encoded
    except OSError as error:
        raise SocketError(f"socket path {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise SocketError(f"{path} exists and is not a socket; it is left alone")
    if is_live(path):
        raise SocketBusy(f"another server is listening on {path}")
    path.unlink(missing_ok=True)
    return encoded


def is_live(path: Path) -> bool:
    """Whether somebody listens on the socket. Raises `SocketError` if that cannot be told."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(os.fspath(path))
    if code in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    if code in (0, errno.EAGAIN):  # EAGAIN: it listens, and its queue is full
        return True
    raise SocketError(f"socket path {path}: {os.strerror(code)}")
