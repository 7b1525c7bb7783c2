"""Disk images that a machine's firmware can boot, made of Debian's packages without root.

Each is as a small distribution's: GRUB in the master boot record, for a BIOS, and on an EFI system partition; and an
ext4 root with the stock kernel, without an initial RAM disk. The console is a root shell.
"""

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import viommu.lab.provision
from viommu.lab.assets import Assets, cache_directory
from viommu.lab.provision.apt import Archive, PrivateApt, command_in, unpack
from viommu.lab.provision.cache import Cache, recipe_key

MIB = 1 << 20
SECTOR = 512
_ESP_MIB, _ROOT_MIB = 8, 64
_ROOT_AT_MIB = 1 + _ESP_MIB
_TOOLS = ("grub-common", "mtools", "e2fsprogs")
_IS_TOOL = re.compile(r"usr/(s?bin|lib/(grub|[^/]+-linux-gnu))/.")
_MODULES = ("search", "search_fs_file", "part_msdos", "ext2", "linux", "echo", "boot", "normal")
_DIRECTORIES = ("boot", "dev", "proc", "sys", "tmp", "run", "root", "etc", "usr/bin")
_GUEST_INIT = Path(viommu.lab.provision.__file__).with_name("guest_init")


@dataclass(frozen=True)
class _Platform:
    debian: str
    console: str
    packages: tuple[str, ...]  # GRUB's parts that run there
    uefi: str  # GRUB's name of it with UEFI
    loader: str  # where UEFI looks for one on a disk that it does not know


_PLATFORMS = {
    "aarch64": _Platform("arm64", "ttyAMA0", ("grub-efi-arm64-bin",), "arm64-efi", "BOOTAA64.EFI"),
    "x86_64": _Platform(
        "amd64", "ttyS0", ("grub-efi-amd64-bin", "grub-pc-bin"), "x86_64-efi", "BOOTX64.EFI"
    ),
}


def disk_image(architecture: str) -> Path:
    """A raw image for a machine of that architecture, in the cache: not to be written to."""
    cache = Cache(cache_directory())
    kernel = Assets.load().guest_for(architecture).kernel
    name = f"boot-disk-{architecture}-{recipe_key(Path(__file__), _GUEST_INIT, str(kernel))}"
    image = cache.directory / name / "disk.raw"
    if not image.exists():
        with cache.locked(print):
            _Builder(architecture, cache).build(name, kernel)
    return image


class _Builder:
    def __init__(self, architecture: str, cache: Cache) -> None:
        self._architecture = architecture
        self._platform = _PLATFORMS[architecture]
        self._cache = cache
        self._apt = PrivateApt(cache, print)

    def build(self, name: str, kernel: Path) -> None:
        with self._cache.building(name) as work:
            self._tools, self._work = work / "tools", work
            self._unpack(self._apt.closure(_TOOLS), self._tools)
            self._unpack(self._packages(*self._platform.packages), self._tools)
            (work / "grub.cfg").write_text(
                "search --no-floppy --set root --file /boot/vmlinuz\n"
                "linux /boot/vmlinuz root=/dev/nvme0n1p2 rw rootwait init=/init "
                f"console={self._platform.console}\n"
                "boot\n"
            )
            parts = {1: self._system_partition(), _ROOT_AT_MIB: self._root(kernel)}
            with (work / "disk.raw").open("wb") as disk:
                disk.write(self._boot_record())
                for at, part in parts.items():
                    disk.seek(at * MIB)
                    disk.write(part.read_bytes())
                    part.unlink()
            shutil.rmtree(self._tools)
            shutil.rmtree(work / "root")

    def _packages(self, *names: str) -> list[Archive]:
        """They alone, for the machine: what they depend on is for who installs them there."""
        closure = self._apt.closure(names, architecture=self._platform.debian)
        return [archive for archive in closure if archive.package in names]

    def _unpack(self, archives: Sequence[Archive], into: Path) -> None:
        for file in self._apt.fetch(archives, "a disk that boots"):
            # The files of another architecture's package are not the host's once more.
            unpack(
                file,
                into,
                lambda path: bool(_IS_TOOL.match(path)) and not os.path.lexists(into / path),
            )

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [*command_in(self._tools, program), *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True)

    def _grub(self, platform: str, output: str, *modules: str) -> Path:
        target = self._work / output
        self._run(
            "grub-mkimage", "-O", platform, "-d", self._tools / "usr/lib/grub" / platform,
            "-c", self._work / "grub.cfg", "-p", "/boot/grub", "-o", target, *_MODULES, *modules,
        )  # fmt: skip
        return target

    def _system_partition(self) -> Path:
        loader = self._grub(self._platform.uefi, self._platform.loader)
        part = self._work / "esp"
        sectors = _ESP_MIB * MIB // SECTOR
        self._run("mtools", "-c", "mformat", "-C", "-i", part, "-T", str(sectors), "::")
        self._run("mtools", "-c", "mmd", "-i", part, "::/EFI", "::/EFI/BOOT")
        self._run("mtools", "-c", "mcopy", "-i", part, loader, "::/EFI/BOOT/")
        loader.unlink()
        return part

    def _root(self, kernel: Path) -> Path:
        root = self._work / "root"
        for directory in _DIRECTORIES:
            (root / directory).mkdir(parents=True)
        for link in ("bin", "sbin"):
            (root / link).symlink_to("usr/bin")
        for file in self._apt.fetch(self._packages("busybox-static"), "a disk that boots"):
            unpack(file, root, lambda path: path == "usr/bin/busybox")
        shutil.copyfile(kernel, root / "boot/vmlinuz")
        shutil.copyfile(_GUEST_INIT, root / "init")
        (root / "init").chmod(0o755)
        part = self._work / "ext4"
        self._run("../sbin/mke2fs", "-t", "ext4", "-d", root, part, f"{_ROOT_MIB}M")
        return part

    def _boot_record(self) -> bytes:
        """The master boot record, and after it what GRUB's code there loads: on x86-64 only."""
        code = core = b""
        if self._architecture == "x86_64":
            code = (self._tools / "usr/lib/grub/i386-pc/boot.img").read_bytes()[:440]
            core = self._grub("i386-pc", "core.img", "biosdisk").read_bytes()
            (self._work / "core.img").unlink()
        partitions = struct.pack(
            "<" + "B3xB3xII" * 2,
            0, 0xEF, MIB // SECTOR, _ESP_MIB * MIB // SECTOR,
            0x80, 0x83, _ROOT_AT_MIB * MIB // SECTOR, _ROOT_MIB * MIB // SECTOR,
        )  # fmt: skip
        return (code.ljust(446, b"\0") + partitions).ljust(510, b"\0") + b"\x55\xaa" + core
