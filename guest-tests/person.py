"""A person who uses `viommu` on a terminal, and what is left when they leave."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pexpect

ESCAPE = "\x1d"  # Ctrl-]


class Person:
    """`viommu` on a terminal of 80 columns, without its colours."""

    def __init__(self, *words: str) -> None:
        self._child = pexpect.spawn(
            sys.executable,
            ["-P", "-m", "viommu.cli", *words],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"},
            encoding="utf-8",
            dimensions=(24, 80),
        )
        assert self._child.pid is not None
        self.pid = self._child.pid

    def sees(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """Wait for what matches, and take it with all before it."""
        self._child.expect(pattern, timeout=timeout)
        assert isinstance(self._child.match, re.Match)
        return self._child.match

    @property
    def before(self) -> str:
        """What came before the last that was seen."""
        return self._child.before or ""

    def types(self, text: str) -> None:
        self._child.send(text)

    def status(self) -> int | None:
        """How the command ended; negative for a signal."""
        self._child.expect(pexpect.EOF, timeout=20)
        self._child.wait()
        if self._child.signalstatus is not None:
            return -int(self._child.signalstatus)
        return self._child.exitstatus

    def close(self) -> None:
        self._child.close(force=True)


@contextmanager
def terminal(*words: str) -> Iterator[Person]:
    with closing(Person(*words)) as person:
        yield person


def parents() -> dict[int, int]:
    """The parent of each process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        found[int(path.parent.name)] = int(fields[1])
    return found


def descendants(pid: int) -> set[int]:
    children = {person for person, parent in parents().items() if parent == pid}
    return children.union(*(descendants(person) for person in children))


def ended(processes: set[int]) -> bool:
    """Whether all of them are gone within 20 s."""
    deadline = time.monotonic() + 20
    while processes & parents().keys():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def left(home: Path) -> list[str]:
    """What runs have left behind, less the lock that they share."""
    return sorted(path.name for path in home.rglob("*") if path.name not in ("viommu", "lock"))
