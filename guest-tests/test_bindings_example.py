"""A stock QEMU boots with the example of the bindings, and the guest uses the device."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from viommu.lab.assets import Assets
from viommu.lab.config import load_machine
from viommu.lab.guest import Guest

BINDINGS = Path(__file__).parents[1] / "bindings"
CLIENT_GONE = "client gone, waiting for the next"
MACHINES = ("aarch64-virt", "x86_64-q35")

# Runs in the guest: finds the function, reads the id, and writes and reads the scratch register.
PROBE = b"""
import mmap, struct
from pathlib import Path

(function,) = [
    path for path in Path("/sys/bus/pci/devices").iterdir()
    if (path / "vendor").read_text() + (path / "device").read_text() == "0x1234\\n0x11e8\\n"
]
(function / "enable").write_text("1")
with open(function / "resource0", "r+b", buffering=0) as bar:
    registers = memoryview(mmap.mmap(bar.fileno(), 0x1000)).cast("I")
registers[1] = 0xC0FFEE
print(f"id {registers[0]:#x} scratch {registers[1]:#x}")
print("class", (function / "class").read_text().strip())
print("capability", (function / "config").read_bytes()[0x40])
"""


class Server:
    """The example, as a person would start it."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(BINDINGS / "examples" / "minimal.py"), str(path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(BINDINGS)},
            text=True,
        )
        assert self._process.stdout is not None
        self.qemu_arguments = shlex.split(self._process.stdout.readline())
        assert self.qemu_arguments, "the example prints QEMU's arguments once it listens"

    def stop(self) -> list[str]:
        """Wait until QEMU is gone, then end it as Ctrl-C does; returns the lines it printed."""
        assert self._process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] != CLIENT_GONE:
            line = self._process.stdout.readline()
            assert line, "the example ended by itself"
            lines.append(line.rstrip())
        self._process.send_signal(signal.SIGINT)
        assert self._process.wait(timeout=10) == 0
        return lines[:-1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "minimal.sock")
    yield running
    running._process.kill()
    running._process.communicate()


@pytest.mark.parametrize("name", MACHINES)
def test_a_guest_uses_the_minimal_device(name: str, server: Server) -> None:
    machine = load_machine(name).model_copy(update={"devices": ()})
    with Guest(machine, Assets.load(), qemu_arguments=server.qemu_arguments) as guest:
        guest.put("/tmp/probe.py", PROBE)
        lines = guest.python("/tmp/probe.py").split("\n")
    assert lines[:3] == ["id 0x10b5ed scratch 0xc0ffee", "class 0xff0000", "capability 16"]
    assert server.stop() == ["write 0x4: 00c0ffee", "read  0x0: 0x10b5ed", "read  0x4: 0xc0ffee"]
