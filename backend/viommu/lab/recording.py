"""What a console showed, and when."""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic

from viommu.lab.console import normalise
from viommu.lab.shell import transcript

_STAMP = re.compile(r"\[ *(\d+\.\d+)\]")


@dataclass(frozen=True, slots=True)
class ConsoleLine:
    """A line; `time` in seconds, None when that is not known."""

    text: str
    time: float | None = None


class Recorder:
    """Keeps all that a console shows, each piece with the time at which it came: `feed` is a listener of a console."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._places: list[int] = []
        self._times: list[float] = []

    def feed(self, data: bytes) -> None:
        """The next piece."""
        self._places.append(len(self._data))
        self._times.append(monotonic())
        self._data += data

    def lines(self, start: float) -> Iterator[ConsoleLine]:
        """The lines with the commands that were run; times count from `start`, of the monotonic clock."""
        place = 0
        for line in bytes(self._data).splitlines(keepends=True):
            time = self._times[bisect_right(self._places, place) - 1]
            place += len(line)
            text = transcript(normalise(line).rstrip("\r\n"))
            yield ConsoleLine(text.rstrip("\n"), round(time - start, 6))


def with_kernel_log(
    console: list[ConsoleLine], kernel: str, since: float, booted: float
) -> list[ConsoleLine]:
    """`console`, and in between what the kernel has said in its log alone.

    The kernel's clock was 0 at `booted`, in the time of the lines. What it said before `since` on its own clock was on
    the console.
    """
    lines = list(console)
    for text in kernel.splitlines():
        stamp = _STAMP.match(text)
        if stamp and float(stamp[1]) > since:
            lines.append(ConsoleLine(text, round(booted + float(stamp[1]), 6)))
    return sorted(lines, key=lambda line: line.time or 0.0)


def last_stamp(console: list[ConsoleLine]) -> float:
    """The kernel's time of its last message on the console."""
    stamps = (_STAMP.match(line.text) for line in console)
    return max((float(stamp[1]) for stamp in stamps if stamp), default=0.0)
