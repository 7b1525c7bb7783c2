"""`viommu boot` and `viommu demo` as a person uses them, on a terminal; and what they leave when they are ended."""

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pexpect
import pytest

ESCAPE = "\x1d"  # Ctrl-]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where runs keep their directories, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vc-", dir="/tmp") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        monkeypatch.setenv("TMPDIR", path)
        yield Path(path)


class Person:
    """`viommu` on a terminal of 80 columns, without its colours."""

    def __init__(self, *words: str) -> None:
        self._child = pexpect.spawn(
            sys.executable,
            ["-P", "-m", "viommu.cli", *words],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"},
            encoding="utf-8",
            timeout=60,
            dimensions=(24, 80),
        )
        assert self._child.pid is not None
        self.pid = self._child.pid

    def sees(self, pattern: str) -> re.Match[str]:
        """Wait for what matches, and take it with all before it."""
        self._child.expect(pattern)
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
    """Whether all of them are gone within 5 s."""
    deadline = time.monotonic() + 5
    while processes & parents().keys():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def left(home: Path) -> list[str]:
    """What runs have left behind, less the lock that they share."""
    return sorted(path.name for path in home.rglob("*") if path.name not in ("viommu", "lock"))


def test_a_person_boots_and_leaves(home: Path) -> None:
    with terminal("boot", "x86_64-q35") as person:
        hint = person.sees(r"Ctrl-\] leaves the guest\. Try: ([^\x1b\r\n]*)")[1]
        person.sees("# ")
        processes = descendants(person.pid)
        assert len(processes) == 2, "the server and QEMU"
        person.types("echo $((6 * 7)) $(stty size)\r")
        person.sees("\r\n42 24 80\r\n")
        # What the hint says works.
        person.types(f"{hint} && echo w''ell\r")
        person.sees("well\r\n")
        assert '"right_pages": 4' in person.before
        person.types(ESCAPE)
        assert person.status() == 0
    assert ended(processes)
    assert left(home) == []


def test_a_person_switches_a_guest_off_whose_kernel_drives_the_smmu(home: Path) -> None:
    with terminal("boot") as person:
        hint = person.sees(r"Ctrl-\] leaves the guest\. Try: ([^\x1b\r\n]*)")[1]
        person.sees("# ")
        processes = descendants(person.pid)
        person.types("ls /sys/bus/platform/drivers/arm-smmu-v3; echo s''o\r")
        person.sees("so\r\n")
        assert "8000000000.iommu" in person.before
        person.types(f"{hint} && echo w''ell\r")
        person.sees("well\r\n")
        assert "vfio" in person.before.rpartition("/dev/vfio:")[2]
        person.types("poweroff -f\r")
        person.sees("The guest switched itself off.")
        assert person.status() == 0
    assert ended(processes)
    assert left(home) == []


@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_boot_is_ended_while_it_boots(home: Path, blow: signal.Signals) -> None:
    with terminal("boot", "--raw") as person:
        person.sees("Booting")
        deadline = time.monotonic() + 20
        while len(processes := descendants(person.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(person.pid, blow)
        code = person.status()
    assert code == 128 + blow
    assert "Traceback" not in person.before
    assert ended(processes)
    assert left(home) == []


def test_boot_is_killed(home: Path) -> None:
    with terminal("boot", "--raw") as person:
        person.sees("# ")
        processes = descendants(person.pid)
        assert len(processes) == 2
        os.kill(person.pid, signal.SIGKILL)
        assert person.status() == -signal.SIGKILL
    assert ended(processes)
    # A killed process tidies nothing up. The next one does.
    assert left(home) != []
    with terminal("serve") as person:
        person.sees("Ctrl-C ends it")
        person.types("\x03")
        assert person.status() == 0
    assert left(home) == []


def test_the_server_is_killed_while_a_person_is_at_the_console(home: Path) -> None:
    with terminal("boot", "x86_64-q35") as person:
        person.sees("# ")
        (server,) = (
            pid
            for pid in descendants(person.pid)
            if b"viommu.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(server, signal.SIGKILL)
        person.types("echo $((6 * 7))\r")
        person.sees("\r\n42\r\n")
        person.types(ESCAPE)
        person.sees(r"viommu: the server of the devices: killed by SIGKILL")
        assert person.status() == 1
    assert left(home) == []


def test_demo_is_ended(home: Path) -> None:
    with terminal("demo") as person:
        person.sees("The guest is up after")
        person.sees("Attach")
        processes = descendants(person.pid)
        time.sleep(0.5)
        os.kill(person.pid, signal.SIGTERM)
        assert person.status() == 128 + signal.SIGTERM
    assert "Traceback" not in person.before
    assert ended(processes)
    assert left(home) == []
