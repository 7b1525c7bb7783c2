"""A machine with an NVMe disk in a file, behind a root port, whose stock driver is at work."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

from linux_rig import DOMAINS

from viommu.lab.assets import Assets
from viommu.lab.config import machine_directory, scripts_directory
from viommu.lab.rig import Rig
from viommu.lab.serving import Serving
from viommu.trace_file import TraceReader

MIB, PAGE = 1 << 20, 4096
SIZE_MIB = 256
DISK = "/dev/nvme0n1"
SGL_THRESHOLD = "/sys/module/nvme/parameters/sgl_threshold"
FUNCTION = "/sys/bus/pci/devices/0000:01:00.0"
# The driver gives up a command after 30 s else, and what it asks the controller itself after 60 s.
PATIENCE = "nvme_core.io_timeout=3 nvme_core.admin_timeout=10"

Result = dict[str, Any]


def pattern(number: int, size: int) -> bytes:
    """What `inside/disk.py` writes."""
    return Random(number).randbytes(PAGE) * (size // PAGE)


class NvmeRig:
    """Boots on entering the context. On aarch64 the guest drives the SMMU before the disk, unless `smmu` is False.

    `guest` is for `Guest`.
    """

    def __init__(
        self, machine: str, assets: Assets, directory: Path, *, smmu: bool = True, **guest: Any
    ) -> None:
        self.machine = machine
        self.image = directory / "disk.raw"
        self._path = directory / "machine.toml"
        text = (machine_directory() / f"{machine}-nvme.toml").read_text("utf-8")
        self._path.write_text(f'{text}disk = "{self.image.name}"\nbus = 1\n', "utf-8")
        self.rig = Rig(
            self._path,
            assets=assets,
            trace=True,
            linux_driver=smmu and machine == "aarch64",
            scripts=scripts_directory(),
            command_line=f"{DOMAINS} {PATIENCE}",
            **guest,
        )
        self.guest = self.rig.guest
        self._again: Serving | None = None

    def __enter__(self) -> Self:
        self.rig.start()
        self.await_disk()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._again is not None:
            self._again.close()
        self.rig.close()

    def await_disk(self) -> None:
        """Until the guest has it."""
        self.run(f"until [ -b {DISK} ] && [ -e {FUNCTION}/nvme/nvme0 ]; do sleep 0.1; done")

    def run(self, command: str) -> str:
        return self.guest.check(command, timeout=120)

    def disk(self, arguments: str) -> Result:
        """What `inside/disk.py` says of it."""
        output = self.guest.python(f"/viommu/inside/disk.py {arguments}", timeout=240)
        found: Result = json.loads(output.splitlines()[-1])
        return found

    @contextmanager
    def load(self) -> Iterator[Result]:
        """The disk is written and read all the while; the result is filled in at the end."""
        result: Result = {}
        self.run(
            "touch /run/go; rm -f /run/load; PYTHONPATH=/viommu python3 /viommu/inside/disk.py "
            f"load {DISK} 4 /run/go > /run/load 2>&1 & sleep 1"
        )
        yield result
        self.run("rm /run/go; until [ -s /run/load ]; do sleep 0.1; done; sleep 0.2")
        said = self.run("cat /run/load")
        assert said.startswith("{"), said
        result |= json.loads(said)

    def kill_server(self) -> None:
        """As by power failure."""
        os.kill(self.rig.serving.pid, signal.SIGKILL)

    def serve_again(self) -> Path:
        """Another server on the same disk; returns the socket of the function."""
        self._again = Serving(self._path)
        return self._again.sockets["nvme0"]


def await_event(trace: TraceReader, kind: str, **fields: object) -> Result:
    """The first such event from now on."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for event in trace.read():
            if event["kind"] == kind and fields.items() <= event.items():
                return event
        time.sleep(0.02)
    raise TimeoutError(f"no {kind} {fields}")
