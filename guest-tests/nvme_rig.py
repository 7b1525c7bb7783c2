"""A machine with an NVMe disk in a file, behind a root port, whose stock driver is at work."""

import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Self

from linux_rig import DOMAINS

from viommu.closing import Closing
from viommu.lab.assets import Assets
from viommu.lab.config import machine_directory, scripts_directory
from viommu.lab.errors import QemuExited
from viommu.lab.rig import Rig
from viommu.lab.serving import Serving
from viommu.trace_file import TraceReader

MIB, PAGE = 1 << 20, 4096
SIZE_MIB = 256
DISK = "/dev/nvme0n1"
SGL_THRESHOLD = "/sys/module/nvme/parameters/sgl_threshold"
FUNCTION = "/sys/bus/pci/devices/0000:01:00.0"
# The driver gives up a command after 30 s else, and what it asks the controller itself after 60 s.
IO_PATIENCE, ADMIN_PATIENCE = 3, 10
PATIENCE = f"nvme_core.io_timeout={IO_PATIENCE} nvme_core.admin_timeout={ADMIN_PATIENCE}"

Result = dict[str, Any]


def pattern(number: int, size: int) -> bytes:
    """What `inside/disk.py` writes."""
    return Random(number).randbytes(PAGE) * (size // PAGE)


class NvmeRig(Closing):
    """Boots on entering the context. On aarch64 the guest drives the SMMU before the disk, unless `smmu` is False.

    The disk is a file in `directory`, and may be there; its write cache is `volatile`. The kernel has
    loaded `modules` before it is looked for. `guest` is for `Guest`.
    """

    def __init__(
        self,
        machine: str,
        assets: Assets,
        directory: Path,
        *,
        smmu: bool = True,
        volatile: bool = False,
        msix: bool = True,
        cpus: int = 1,
        modules: str = "",
        command_line: str = "",
        **guest: Any,
    ) -> None:
        self.machine = machine
        self.image = directory / "disk.raw"
        self._path = directory / "machine.toml"
        text = (machine_directory() / f"{machine}-nvme.toml").read_text("utf-8")
        text = f"msix = {str(msix).lower()}\n{text}".replace("cpus = 1", f"cpus = {cpus}")
        text += f'disk = "{self.image.name}"\nbus = 1\n'
        text += f'write_cache = "{"volatile" if volatile else "host"}"\n'
        self._path.write_text(text, "utf-8")
        self.rig = Rig(
            self._path,
            assets=assets,
            trace=True,
            linux_driver=smmu and machine == "aarch64",
            scripts=scripts_directory(),
            command_line=f"{DOMAINS} {PATIENCE} {command_line}",
            **guest,
        )
        self.guest = self.rig.guest
        self._modules = modules
        self._again: Serving | None = None
        self._marks = count(1)

    def __enter__(self) -> Self:
        self.rig.start()
        if self._modules:
            self.run(f"modprobe -a {self._modules}")
        self.await_disk()
        return self

    def close(self) -> None:
        """End the guest and its servers."""
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

    def digest(self) -> bytes:
        """Of what would be left if the power were cut now."""
        with self.image.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def queue(self, kind: str) -> tuple[int, int]:
        """Where the queue of the disk begins and ends now: its `submission` or its `completion` queue."""
        sizes = {"submission": 64, "completion": 16}
        with self.rig.serving.trace("NvmeQueueCreated") as trace:
            *_, last = (
                each for each in trace.read() if each["queue"] == kind and each["queue_id"] == 1
            )
        address: int = last["address"]
        return address, address + last["entries"] * sizes[kind] - 1

    def kernel_log(self, since: str) -> str:
        """What the kernel says after a `mark`."""
        return self.run(f"dmesg | sed '1,/{since}/d'")

    def mark(self) -> str:
        """A line of its own in the kernel's log: others read that too."""
        name = f"mark-{next(self._marks)}"
        self.run(f"echo {name} > /dev/kmsg")
        return name

    def meet(self, transfer: str, patience: int) -> tuple[Result, str]:
        """What `inside/disk.py` says of a transfer that something happens to, and what the kernel says.

        `patience` is how long the driver waits, in seconds; for a command of its own a little longer. It uses no SGL.
        """
        mark = self.mark()
        self.run(
            "[ -p /run/ask ] || { mkfifo /run/ask /run/answer; "
            f"python3 /viommu/inside/disk.py meet {DISK} /run/ask /run/answer > /dev/null 2>&1 & }}"
        )
        output = self.run(
            f"{_patience(patience, patience + 1)}; echo 0 > {SGL_THRESHOLD}; "
            f"echo {transfer} > /run/ask; cat /run/answer; "
            f"{_patience(IO_PATIENCE, ADMIN_PATIENCE)}; echo {32 << 10} > {SGL_THRESHOLD}; dmesg | sed '1,/{mark}/d'"
        )
        # When nobody cares for the pin, the kernel tells the console so.
        before, met, said = re.split(r"^(\{.*\})$", output, maxsplit=1, flags=re.MULTILINE)
        found: Result = json.loads(met)
        return found, before + said

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

    def make_file_system(self) -> None:
        """ext4 with a journal, mounted on /mnt."""
        self.run(f"mkfs.ext4 -q -F {DISK} && mkdir -p /mnt && mount -t ext4 {DISK} /mnt")

    def write_records(self, number: int, then: Callable[[], None]) -> int:
        """Files are written and made to last, and after `number` of them comes `then`, which ends it.

        Returns how many the guest says are durable.
        """
        told = bytearray()
        pending = [then]

        def follow(output: bytes) -> None:
            told.extend(output)
            if pending and told.count(b"\n") >= number:
                pending.pop()()

        with suppress(QemuExited):
            command = "PYTHONPATH=/viommu python3 /viommu/inside/records.py write /mnt"
            assert "OSError" in self.guest.run(command, timeout=120, follow=follow).output
        assert not pending, told
        return int(re.findall(rb"^(\d+)\r?\n", told, re.MULTILINE)[-1])

    def judge_records(self, last: int) -> Result:
        """Mount what has come back, look for every file that lasts, and let `e2fsck` look for the rest."""
        self.run(f"mkdir -p /mnt && mount -t ext4 {DISK} /mnt")
        assert "recovery complete" in self.run("dmesg | grep 'EXT4-fs (nvme0n1)'")
        output = self.guest.python(f"/viommu/inside/records.py check /mnt {last}", timeout=120)
        self.run(f"umount /mnt && e2fsck -fn {DISK}")
        found: Result = json.loads(output)
        return found

    def kill_server(self) -> None:
        """In the middle of what the disk does; but when all is read, or QEMU 11.1 aborts."""
        self.rig.serving.control.call("dma.pause")
        time.sleep(0.3)
        os.kill(self.rig.serving.pid, signal.SIGKILL)

    def cut_power(self) -> None:
        """Neither the machine nor the disk does anything more."""
        for process in (self.guest.pid, self.rig.serving.pid):
            os.kill(process, signal.SIGKILL)

    def unplug(self) -> None:
        """Until the guest has let go of the function, and QEMU too: only then its name can be used again."""
        self.guest.qmp("device_del", id="nvme0")
        self.run(f"while [ -e {FUNCTION} ]; do sleep 0.1; done")
        deadline = time.monotonic() + 30
        while "'nvme0'" in str(self.guest.qmp("qom-list", path="/machine/peripheral")):
            assert time.monotonic() < deadline, "QEMU keeps the function"
            time.sleep(0.05)

    def serve_again(self) -> Path:
        """Another server on the same disk; returns the socket of the function."""
        self._again = Serving(self._path)
        return self._again.sockets["nvme0"]


def _patience(io: int, admin: int) -> str:
    """The command that sets it."""
    parameters = "/sys/module/nvme_core/parameters"
    return (
        f"echo {io}000 > /sys/block/nvme0n1/queue/io_timeout; "
        f"echo {admin} > {parameters}/admin_timeout"
    )


def await_event(trace: TraceReader, kind: str, **fields: object) -> Result:
    """The first such event from now on."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for event in trace.read():
            if event["kind"] == kind and fields.items() <= event.items():
                return event
        time.sleep(0.02)
    raise TimeoutError(f"no {kind} {fields}")
