"""Guests that never come to boot: what is checked before, and what QEMU says when it refuses."""

import os
import socket
import time
from pathlib import Path

import pytest

from viommu.lab.assets import Assets, GuestImage, Library, Qemu
from viommu.lab.config import Machine, load_machine
from viommu.lab.errors import (
    ConfigError,
    GuestTimeout,
    LabError,
    QemuExited,
    QemuTooOld,
    SocketPathError,
)
from viommu.lab.guest import Guest
from viommu.lab.overlay import guest_files, initial_ram_disk, module_files

# An old QEMU is not at hand; this is what one says, and how it ends.
OLD_QEMU = """#!/bin/sh
echo "qemu-system-aarch64: -device {}: 'vfio-user-pci' is not a valid device model name" >&2
exit 1
"""


@pytest.fixture
def machine() -> Machine:
    return load_machine("aarch64-virt")


def assets_with(folder: Path, emulator: str) -> Assets:
    program = folder / "qemu"
    program.write_text(emulator)
    program.chmod(0o755)
    (folder / "kernel").touch()
    (folder / "initramfs").write_bytes(b"image")
    return Assets(
        libvfio_user=Library(origin="test", path=program, version="0.2"),
        qemu={"aarch64": Qemu(origin="test", argv=(str(program),), version="10.0.2")},
        guests={
            "aarch64": GuestImage(
                origin="test",
                kernel=folder / "kernel",
                release="6.12.0",
                initramfs=folder / "initramfs",
                modules=(),
            )
        },
    )


def test_a_qemu_that_is_too_old(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "smmu.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        guest = Guest(machine, assets_with(tmp_path, OLD_QEMU), devices={"smmu": path})
        with pytest.raises(QemuTooOld) as raised:
            guest.start()
    assert raised.value.message == (
        "qemu-system-aarch64 10.0.2 has no vfio-user-pci: QEMU 10.1 or newer is needed"
    )
    device = raised.value.command_line[raised.value.command_line.index("-device") + 1]
    assert f'"addr": "0x1", "socket": {{"type": "unix", "path": "{path}"}}' in device
    assert raised.value.exit_code == 1


def test_a_qemu_that_refuses(machine: Machine, tmp_path: Path) -> None:
    emulator = "#!/bin/sh\necho 'qemu: warning: old' >&2\necho 'qemu: no memory' >&2\nexit 5\n"
    guest = Guest(machine, assets_with(tmp_path, emulator))
    with pytest.raises(QemuExited) as raised:
        guest.start()
    error = raised.value
    assert error.message == (
        "QEMU ended with exit code 5 while setting the machine up: qemu: no memory"
    )
    assert (error.exit_code, error.console) == (5, ())
    assert f"command line: {tmp_path}/qemu -no-user-config" in str(error)
    with pytest.raises(QemuExited):
        guest.run("true")


def test_a_qemu_that_says_nothing(machine: Machine, tmp_path: Path) -> None:
    guest = Guest(machine, assets_with(tmp_path, "#!/bin/sh\nexec sleep 1000\n"))
    started = time.monotonic()
    with pytest.raises(GuestTimeout, match=r"no answer within 0.5 s while setting the machine"):
        guest.start(timeout=0.5)
    assert time.monotonic() - started < 5
    with pytest.raises(ProcessLookupError):
        os.kill(guest.pid, 0)


def test_a_guest_that_was_not_started(machine: Machine, tmp_path: Path) -> None:
    guest = Guest(machine, assets_with(tmp_path, ""))
    with pytest.raises(LabError, match="the guest was not started"):
        guest.run("true")
    assert guest.console_log() == ""
    guest.close()


@pytest.mark.parametrize("name", ["plain file", "nothing"])
def test_a_socket_that_nobody_serves(machine: Machine, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "plain file":
        path.touch()
    guest = Guest(machine, assets_with(tmp_path, ""), devices={"smmu": path})
    with pytest.raises(SocketPathError, match="nobody serves 'smmu': there is no socket"):
        guest.start()


def test_a_device_that_the_machine_does_not_have(machine: Machine, tmp_path: Path) -> None:
    guest = Guest(machine, assets_with(tmp_path, ""), devices={"nvme": tmp_path})
    with pytest.raises(ConfigError, match="no device 'nvme' in this machine; its devices: smmu,"):
        guest.start()


def test_a_socket_whose_path_is_too_long(machine: Machine, tmp_path: Path) -> None:
    guest = Guest(machine, assets_with(tmp_path, ""), devices={"smmu": tmp_path / ("x" * 100)})
    with pytest.raises(SocketPathError, match=r"bytes, and at most 107 are possible"):
        guest.start()


def test_an_initramfs_that_is_not_there(machine: Machine, tmp_path: Path) -> None:
    guest = Guest(machine, assets_with(tmp_path, ""), initramfs=tmp_path / "none")
    with pytest.raises(ConfigError, match="none: cannot be read: No such file or directory"):
        guest.start()


def test_what_the_guest_gets(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "one.py").write_text("print(1)\n")
    (tmp_path / "inside" / "note.txt").write_text("no\n")
    files = guest_files(tmp_path / "inside", {"/etc/motd": b"hello\n"})
    assert files["viommu/inside/one.py"] == b"print(1)\n"
    assert files["etc/motd"] == b"hello\n"
    packages = {Path(path).parts[2] for path in files if path.startswith("viommu/viommu/")}
    assert packages == {"__init__.py", "driver", "layouts"}
    assert not [path for path in files if not path.endswith(".py") and path != "etc/motd"]


def test_the_overlay_follows_the_image(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"five!")
    with initial_ram_disk(image, {"a/b": b"contents", "lib/c": b""}) as disk:
        disk.seek(0)
        data = disk.read()
    assert data.startswith(b"five!\0\0\x00070701")
    assert b"contents" in data
    # The image's own /lib is left as it is, most often a symbolic link.
    names = [name for name in (b"a\0", b"a/b\0", b"lib\0", b"lib/c\0") if name in data]
    assert names == [b"a\0", b"a/b\0", b"lib/c\0"]


def test_modules_of_another_kernel(tmp_path: Path) -> None:
    folder = tmp_path / "6.99.0"
    (folder / "kernel").mkdir(parents=True)
    (folder / "kernel" / "one.ko").write_bytes(b"ELF")
    with pytest.raises(ConfigError, match=r"6\.99\.0 is no folder of kernel modules"):
        module_files(folder)
    (folder / "modules.dep").write_text("kernel/one.ko:\n")
    assert module_files(folder) == {
        "lib/modules/6.99.0/kernel/one.ko": b"ELF",
        "lib/modules/6.99.0/modules.dep": b"kernel/one.ko:\n",
    }


def test_nothing_stays_after_a_failed_start(machine: Machine, tmp_path: Path) -> None:
    before = open_descriptors()
    guest = Guest(machine, assets_with(tmp_path, "#!/bin/sh\nexit 1\n"))
    with pytest.raises(QemuExited):
        guest.start()
    assert open_descriptors() == before
    with pytest.raises(ProcessLookupError):
        os.kill(guest.pid, 0)


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}
