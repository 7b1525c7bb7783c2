"""The example runs as it says; that QEMU boots with it is a guest test."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from .client import Client

BINDINGS = Path(__file__).parents[1]
EXAMPLE = BINDINGS / "examples" / "minimal.py"


def test_minimal(directory: Path) -> None:
    path = directory / "m.sock"
    server = subprocess.Popen(
        [sys.executable, str(EXAMPLE), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(BINDINGS)},
        text=True,
    )
    with server:
        assert server.stdout is not None
        option, argument = shlex.split(server.stdout.readline())
        assert option == "-device"
        assert json.loads(argument) == {
            "driver": "vfio-user-pci",
            "socket": {"type": "unix", "path": str(path)},
        }
        for _ in range(2):
            with Client(path) as client:
                client.say_version()
                client.receive()
                assert client.read_int(0, 0, 4) == 0x10B5ED
                assert client.read_int(0, 4, 4) == 0, "a lost client resets the device"
                client.write(0, 4, (0xC0FFEE).to_bytes(4, "little"))
                assert client.read_int(0, 4, 4) == 0xC0FFEE
                assert client.read_int(0, 4, 1) == 0xEE
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=10)
    assert "write 0x4: 00c0ffee" in output
    assert "client gone" in output
    assert errors == ""
    assert server.returncode == 0
    assert not path.exists(), "also an interrupt leaves no socket"
