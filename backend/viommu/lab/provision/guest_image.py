"""What a guest boots: Debian's cloud kernel, and an initramfs of busybox, modules, Python and the tools of ext4.

Packages are unpacked on the host; nothing of another architecture runs.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from viommu.lab.cpio import CpioEntry, write_cpio
from viommu.lab.provision import kernel_modules
from viommu.lab.provision.apt import (
    BACKPORTS,
    STABLE,
    Archive,
    PrivateApt,
    host_architecture,
    unpack,
)
from viommu.lab.provision.bytecode import compile_library
from viommu.lab.provision.cache import Cache, Entry, ProvisionError, recipe_key
from viommu.lab.provision.kernel_modules import KernelModule, modules_alias, modules_dep
from viommu.lab.provision.progress import Say

_HERE = Path(__file__).parent
_PYTHON = "python3.13"


@dataclass(frozen=True)
class Guest:
    """A guest: its name, its architecture under its names, its kernel."""

    name: str
    architecture: str  # as QEMU and the kernel say
    debian: str  # as Debian says
    kernel: str  # Debian's package that depends on the newest
    suite: str = STABLE


GUESTS = (
    Guest("aarch64", "aarch64", "arm64", "linux-image-cloud-arm64"),
    Guest("x86_64", "x86_64", "amd64", "linux-image-cloud-amd64"),
)
ON_DEMAND = (
    Guest("aarch64-backports", "aarch64", "arm64", "linux-image-cloud-arm64", BACKPORTS),
    Guest("aarch64-16k", "aarch64", "arm64", "linux-image-arm64-16k"),
    Guest("aarch64-generic", "aarch64", "arm64", "linux-image-arm64"),
    Guest("x86_64-generic", "x86_64", "amd64", "linux-image-amd64"),
)
"""Further kernels, for who asks for one by name."""

# Modules that tests and their users load. The cloud kernels have the last line built in.
MODULES = (
    "vfio-pci", "vfio_iommu_type1", "uio_pci_generic", "virtio-iommu", "arm_smmuv3_pmu",
    "virtio_blk", "virtio_net", "virtio-rng", "virtio_scsi",
    "virtio_pci", "nvme", "ext4", "crc32c_generic",
)  # fmt: skip

_DIRECTORIES = ("dev", "proc", "sys", "tmp", "run", "root", "etc", "viommu")

# Python without its tests, and without what needs libraries that the image lacks or a display.
_LEFT_OUT = re.compile(
    r"""usr/lib/python3\.\d+/(
          test/ | idlelib/ | tkinter/ | turtledemo/ | ensurepip/ | pydoc_data/ | lib2to3/ | curses/
        | dbm/ | sqlite3/ | venv/ | xmlrpc/ | wsgiref/ | __phello__/ | config-.*/ | _sysconfigdata
        | lib-dynload/(
              _test | _xx | xx | _codecs_ | _curses | _bz2 | _dbm | _gdbm | _lzma | _sqlite3 | _ssl
            | _hashlib | _uuid | _tkinter | readline
          )
    )""",
    re.VERBOSE,
)
_FILE_SYSTEM_TOOLS = ("usr/sbin/mke2fs", "usr/sbin/mkfs.ext4", "usr/sbin/e2fsck")
# What Python, its extensions and those tools link.
_LIBRARIES = re.compile(
    r"(ld-linux|libc\.|libm\.|libdl\.|libpthread\.|librt\.|libutil\.|libz\.|libexpat\.|libffi\."
    r"|libext2fs\.|libe2p\.|libcom_err\.|libblkid\.|libuuid\.)"
)


def key(guest: Guest) -> str:
    names = ("guest_image.py", "guest_init", "bytecode.py", "kernel_modules.py", "../cpio.py")
    return recipe_key(guest.name, *(_HERE / name for name in names))


def provide(guest: Guest, cache: Cache, apt: PrivateApt, say: Say) -> Entry:
    """The manifest's entry for `guest`."""
    directory = cache.directory / f"guest-{guest.name}-{key(guest)}"
    if not directory.exists():
        _build(guest, directory.name, cache, apt, say)
    release = (directory / "release").read_text()
    return {
        "kernel": str(directory / "vmlinuz"),
        "release": release,
        "initramfs": str(directory / "initramfs.cpio"),
        "modules": (directory / "modules").read_text().split(),
        "origin": f"Debian {guest.suite}, linux-image-{release}",
    }


def _userland_packages(debian: str, apt: PrivateApt) -> list[Archive]:
    """Python and the libraries that it needs, for one architecture."""
    libraries = {"libc6", "libexpat1", "libffi8", "zlib1g"}
    python = (f"{_PYTHON}-minimal", f"lib{_PYTHON}-minimal", f"lib{_PYTHON}-stdlib")
    closure = apt.closure(python, architecture=debian)
    return [
        archive
        for archive in closure
        if archive.architecture == debian and archive.package in {*libraries, *python}
    ]


def _system_packages(guest: Guest, apt: PrivateApt) -> list[Archive]:
    """The kernel, busybox, and the tools of ext4. Newer kernels come in several packages."""
    packages = (guest.kernel, "busybox-static", "e2fsprogs")
    tools = {"busybox-static", "e2fsprogs", "libext2fs2t64", "libcom-err2", "libblkid1", "libuuid1"}
    closure = apt.closure(packages, architecture=guest.debian, suite=guest.suite)
    return [
        archive
        for archive in closure
        if archive.architecture == guest.debian
        and (
            archive.package in tools
            or re.match(r"linux-(image|binary|modules)-\d", archive.package)
        )
    ]


def _build(guest: Guest, name: str, cache: Cache, apt: PrivateApt, say: Say) -> None:
    purpose = f"the {guest.name} guest"
    guest_archives = _system_packages(guest, apt) + _userland_packages(guest.debian, apt)
    host_archives = _userland_packages(host_architecture(), apt)
    both = list(dict.fromkeys(guest_archives + host_archives))
    files = dict(zip(both, apt.fetch(both, purpose), strict=True))
    say(f"Building the initramfs of {purpose}")
    with cache.building(name) as work:
        root, host = work / "root", work / "host"
        for archives, into in ((guest_archives, root), (host_archives, host)):
            for archive in archives:
                unpack(files[archive], into, _is_for_guest)
        kernels = [*root.glob("boot/vmlinuz-*"), *root.glob("usr/lib/modules/*/vmlinuz")]
        if len(kernels) != 1:
            raise ProvisionError(
                f"Debian's packages hold {len(kernels)} kernels for {purpose}, not one."
            )
        (release_directory,) = root.glob("usr/lib/modules/*")
        release = release_directory.name
        modules = kernel_modules.select_modules(release_directory, MODULES)
        compile_library(host, _PYTHON, root / "usr/lib" / _PYTHON, root)
        entries = [*_skeleton(), *_userland(root), *_module_tree(release, modules)]
        (work / "initramfs.cpio").write_bytes(write_cpio(entries))
        kernels[0].rename(work / "vmlinuz")
        (work / "release").write_text(release)
        (work / "modules").write_text("\n".join(module.name for module in modules))
        shutil.rmtree(root)
        shutil.rmtree(host)


def _is_for_guest(path: str) -> bool:
    if path.startswith("usr/lib/python3"):
        return not _LEFT_OUT.match(path)
    if re.match(r"usr/lib/[^/]*-linux-gnu/[^/]+$", path) or path.startswith(
        ("lib64/", "usr/lib64/")
    ):
        return _LIBRARIES.match(os.path.basename(path)) is not None  # noqa: PTH119
    return path.startswith(
        (
            "boot/vmlinuz-",
            "usr/lib/modules/",
            "usr/bin/busybox",
            f"usr/bin/{_PYTHON}",
            *_FILE_SYSTEM_TOOLS,
        )
    ) or bool(re.match(r"usr/lib/ld-linux[^/]*$", path))


def _skeleton() -> Iterator[CpioEntry]:
    for name in _DIRECTORIES:
        yield CpioEntry.directory(name)
    yield CpioEntry.directory("usr/bin")
    # The kernel opens the console for the first process before anything is mounted.
    yield CpioEntry.character_device("dev/console", 5, 1)
    yield CpioEntry.character_device("dev/null", 1, 3, 0o666)
    yield CpioEntry.symlink("bin", "usr/bin")
    yield CpioEntry.symlink("sbin", "usr/bin")
    yield CpioEntry.symlink("lib", "usr/lib")
    yield CpioEntry.symlink("lib64", "usr/lib64")
    yield CpioEntry.file("init", (_HERE / "guest_init").read_bytes(), 0o755)
    yield CpioEntry.symlink("usr/bin/python3", _PYTHON)


def _userland(root: Path) -> Iterator[CpioEntry]:
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name.startswith(("boot", "usr/lib/modules")):
            continue
        if path.is_symlink():
            yield CpioEntry.symlink(name, str(path.readlink()))
        elif path.is_file():
            yield CpioEntry.file(name, path.read_bytes(), path.stat().st_mode & 0o777)


def _module_tree(release: str, modules: list[KernelModule]) -> Iterator[CpioEntry]:
    base = f"usr/lib/modules/{release}"
    for module in modules:
        yield CpioEntry.file(f"{base}/{module.path}", module.image)
    yield CpioEntry.file(f"{base}/modules.dep", modules_dep(modules).encode())
    yield CpioEntry.file(f"{base}/modules.alias", modules_alias(modules).encode())
