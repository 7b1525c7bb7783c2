"""The trace as a file: one JSON object a line, with a number and a time."""

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from viommu.closing import Closing
from viommu.trace import Event, Tracer

_log = logging.getLogger(__name__)


class TraceFile(Closing):
    """Writes every event of `tracer` to `path` until it is closed.

    Each line has `kind`, `seq` (from 1), `time` (seconds since the file was opened) and the event's own fields. When
    the disk is full the trace ends, and what it traces goes on. Raises `OSError` when the file cannot be opened.
    """

    def __init__(self, tracer: Tracer, path: Path) -> None:
        # Line-buffered: a reader may follow along, and a killed server loses nothing.
        self._file = path.open("w", buffering=1, encoding="utf-8")
        self._start = time.monotonic()
        self._count = 0
        self._unsubscribe = tracer.subscribe(self._write)

    def _write(self, event: Event) -> None:
        self._count += 1
        seconds = round(time.monotonic() - self._start, 6)
        line = {"seq": self._count, "time": seconds, **event.as_dict()}
        try:
            self._file.write(json.dumps(line, separators=(",", ":"), default=repr) + "\n")
        except OSError as error:
            _log.error("the trace ends before event %d: %s", self._count, error.strerror)
            self.close()

    def close(self) -> None:
        """Stop writing. Idempotent."""
        if not self._file.closed:
            self._unsubscribe()
            with suppress(OSError):  # what could not be written before
                self._file.close()


class TraceReader(Closing):
    """Reads a trace file while it is written: all events, or those of some kinds."""

    def __init__(self, path: Path, *kinds: str) -> None:
        self._file = path.open(encoding="utf-8")
        self._rest = ""
        # Looked for in the line as it stands: most events are not of these kinds, and parsing is slow.
        self._marks = [f'"kind":"{kind}"' for kind in kinds]

    def read(self) -> list[dict[str, Any]]:
        """The events since the last call, in order."""
        marks = self._marks
        return [
            json.loads(line)
            for line in self._lines()
            if not marks or any(mark in line for mark in marks)
        ]

    def skip(self) -> None:
        """Pass over the events since the last call."""
        self._lines()

    def _lines(self) -> list[str]:
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        return lines

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._file.close()
