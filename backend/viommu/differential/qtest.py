"""A QEMU without a guest, driven by its qtest protocol: one line a request, one line a reply."""

import mmap
import os
import socket
from collections.abc import Iterable, Sequence

from viommu.closing import Closing
from viommu.lab.errors import LabError
from viommu.lab.process import BoundProcess

_TIMEOUT = 30.0  # seconds for one batch; they take milliseconds


class QtestError(LabError):
    """QEMU did not start, went away or refused a request."""


class Qtest(Closing):
    """QEMU with RAM and a log that are shared with us.

    The machine stays stopped: no instruction of a guest runs, and devices do what requests tell them to. Requests are
    sent in batches, because a round trip costs more than what QEMU does with it.
    """

    def __init__(self, argv: Sequence[str], ram_size: int) -> None:
        ram = os.memfd_create("differential-ram")
        self._log = os.memfd_create("differential-log")
        os.ftruncate(ram, ram_size)
        self.ram = mmap.mmap(ram, ram_size)
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_TIMEOUT)
        self._logged = 0
        backend = (
            f"memory-backend-file,id=ram,mem-path=/proc/self/fd/{ram},size={ram_size},share=on"
        )
        self._process = BoundProcess(
            [
                *argv,
                *("-object", backend, "-machine", "memory-backend=ram", "-m", f"{ram_size >> 20}M"),
                *("-chardev", f"socket,id=qtest,fd={theirs.fileno()}", "-qtest", "chardev:qtest"),
                *("-qtest-log", "/dev/null", "-D", f"/proc/self/fd/{self._log}"),
                *("-accel", "tcg", "-S"),
            ],
            pass_fds=(ram, self._log, theirs.fileno()),
        )
        theirs.close()
        os.close(ram)
        self._replies = self._socket.makefile("rb")

    def batch(self, lines: Iterable[str]) -> list[int]:
        """Send requests and return the value of each reply, 0 where it has none.

        Raises `QtestError` with QEMU's last words when it dies, or when it refuses a request.
        """
        requests = list(lines)
        try:
            self._socket.sendall(("\n".join(requests) + "\n").encode())
            replies = [self._replies.readline() for _ in requests]
        except OSError as error:
            raise QtestError(self._last_words()) from error
        values = []
        for request, reply in zip(requests, replies, strict=True):
            words = reply.split()
            if not words:
                raise QtestError(self._last_words())
            if words[0] != b"OK":
                raise QtestError(f"{request!r}: {reply.decode().strip()}")
            values.append(int(words[1], 16) if len(words) > 1 else 0)
        return values

    def log(self) -> list[str]:
        """The lines that QEMU logged since the last call."""
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, size - self._logged, self._logged)
        self._logged = size
        return text.decode().splitlines()

    def _last_words(self) -> str:
        code = self._process.wait(5)
        output = self._process.output()[-2000:]
        state = "does not answer" if code is None else f"ended with {code}"
        return f"QEMU {state}: {output or 'no output'}"

    def close(self) -> None:
        """End QEMU."""
        self._replies.close()
        self._socket.close()
        self._process.close()
        self.ram.close()
        os.close(self._log)
