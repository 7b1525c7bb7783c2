"""What the kernel says about the SMMU, and its interrupts."""

import os
from time import monotonic, sleep

_DRIVER = "arm-smmu-v3"


class KernelLog:
    """The lines about the SMMU and the interrupts of the SMMU, from now on."""

    def __init__(self) -> None:
        self._file = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._file, 0, os.SEEK_END)
        self._before = _interrupts()

    @property
    def interrupts(self) -> int:
        return _interrupts() - self._before

    def wait(self, word: str, seconds: float = 3.0) -> list[str]:
        """Wait a while for a line with `word`; returns all lines until then, and those that belong to it."""
        lines: list[str] = []
        deadline = monotonic() + seconds
        while not any(word in line for line in lines):
            if monotonic() > deadline:
                return lines
            sleep(0.01)
            lines += self.read()
        # A record is logged line by line.
        sleep(0.05)
        return lines + self.read()

    def read(self) -> list[str]:
        """The lines since the last look."""
        lines: list[str] = []
        while True:
            try:
                text = os.read(self._file, 8192).decode()
            except BlockingIOError:
                return lines
            line = text.split("\n")[0].partition(";")[2]
            if _DRIVER in line:
                lines.append(line.replace("\\x09", "\t"))

    def close(self) -> None:
        os.close(self._file)


def _interrupts() -> int:
    with open("/proc/interrupts") as file:  # noqa: PTH123 - pathlib is slow to import
        rows = [line.split() for line in file if _DRIVER in line]
    return sum(int(count) for row in rows for count in row[1:] if count.isdigit())
