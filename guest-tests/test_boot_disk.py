"""`viommu boot --disk`: firmware boots a distribution from our NVMe controller, and its root file system is there."""

import secrets
import shutil
import subprocess
from pathlib import Path

import pytest
from disk_image import disk_image
from person import ESCAPE, Person, descendants, ended, left, terminal

from viommu.lab.assets import boot_tools, cache_directory
from viommu.lab.config import machine_directory
from viommu.lab.provision.__main__ import DISKS, provision
from viommu.lab.provision.apt import command_in
from viommu.lab.provision.cache import Cache

PROMPT = "guest# "
BOOT = 150  # seconds: firmware, boot loader and kernel are all emulated
DRIVE = "/sys/block/nvme0n1/device"


@pytest.fixture(scope="module")
def tools() -> Path:
    """The folder of what `viommu setup --disks` provides."""
    provision(Cache(cache_directory()), print, [DISKS])
    found = boot_tools()
    assert found is not None
    return found.path


def qemu_img(tools: Path, *words: str | Path) -> None:
    subprocess.run([*command_in(tools, "qemu-img"), *map(str, words)], check=True, timeout=60)


def toml(machine: str) -> str:
    return (machine_directory() / f"{machine}.toml").read_text("utf-8")


def asks(person: Person, command: str) -> str:
    """What a command prints in the guest."""
    person.types(f"{command}; echo e''nd\r")
    person.sees("nd\r\n")  # of the echo
    person.sees("end\r\n")
    output = person.before
    person.sees(PROMPT)
    return output


def is_root(person: Person) -> None:
    """The root file system is on our controller."""
    person.sees(PROMPT, BOOT)
    assert "/dev/root on / type ext4" in asks(person, "mount")
    assert "root=/dev/nvme0n1p2" in asks(person, "cat /proc/cmdline")
    assert asks(person, f"cat {DRIVE}/model").startswith("viommu NVMe")


@pytest.mark.parametrize("bus", ["", "bus = 1"], ids=["on the root bus", "behind a port"])
def test_aarch64_by_uefi_and_behind_its_smmu(
    tools: Path, tmp_path: Path, home: Path, bus: str
) -> None:
    image, machine = tmp_path / "debian.raw", tmp_path / "machine.toml"
    shutil.copyfile(disk_image("aarch64"), image)
    machine.write_text(f"{toml('aarch64-nvme')}{bus}\n", "utf-8")
    mark = secrets.token_hex(16)
    with terminal("boot", str(machine), "--disk", str(image)) as person:
        is_root(person)
        processes = descendants(person.pid)
        # No word on the kernel's command line, no script in the guest: it found the SMMU as on any board.
        assert "8000000000.iommu" in asks(person, "ls /sys/bus/platform/drivers/arm-smmu-v3")
        assert asks(person, f"cat {DRIVE}/device/iommu_group/type").startswith("DMA")
        asks(person, f"echo {mark} > /written; sync")
        person.types(ESCAPE)
        assert person.status() == 0
    assert ended(processes)
    assert left(home) == []
    assert mark.encode() in image.read_bytes(), "what was synced is in the image"


def test_x86_64_by_bios_from_a_qcow2_image(tools: Path, tmp_path: Path, home: Path) -> None:
    image, raw = tmp_path / "debian.qcow2", tmp_path / "debian.raw"
    qemu_img(tools, "convert", "-O", "qcow2", disk_image("x86_64"), image)
    mark = secrets.token_hex(16)
    with terminal("boot", "x86_64-q35", "--disk", str(image)) as person:
        is_root(person)
        processes = descendants(person.pid)
        assert len(processes) == 3, "QEMU, the server, and its qemu-nbd"
        asks(person, f"echo {mark} > /written; sync")
        person.types("reboot -f\r")
        is_root(person)
        assert asks(person, "cat /written; rm /written; sync").startswith(mark)
        asks(person, f"echo {mark} twice > /again; sync")
        person.types("poweroff -f\r")
        person.sees("The guest switched itself off.")
        assert person.status() == 0
    assert ended(processes)
    assert left(home) == []
    qemu_img(tools, "check", image)
    qemu_img(tools, "convert", "-O", "raw", image, raw)
    assert f"{mark} twice".encode() in raw.read_bytes()


def test_x86_64_by_uefi_and_nothing_is_kept(tools: Path, tmp_path: Path, home: Path) -> None:
    """The machine's own disk, as its file has it."""
    image, machine = tmp_path / "debian.raw", tmp_path / "machine.toml"
    shutil.copyfile(disk_image("x86_64"), image)
    before = image.stat().st_mtime_ns
    disk = f'disk = "{image.name}"\nsnapshot = true\n'
    machine.write_text(toml("x86_64-nvme").replace("size_mib = 256\n", disk), "utf-8")
    mark = secrets.token_hex(16)
    with terminal("boot", str(machine), "--firmware", "uefi") as person:
        is_root(person)
        assert "fw_platform_size" in asks(person, "ls /sys/firmware/efi")
        assert asks(person, f"echo {mark} > /written; sync; cat /written").startswith(mark)
        person.types(ESCAPE)
        assert person.status() == 0
    assert left(home) == []
    assert image.stat().st_mtime_ns == before
    assert mark.encode() not in image.read_bytes()
