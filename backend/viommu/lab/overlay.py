"""What the guest gets on top of its image: our driver, the scripts that use it, one's own files.

The kernel unpacks one archive after the other from the same initial RAM disk, so the overlay is
a second archive after the image, and the image itself is never rebuilt.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import viommu
from viommu.lab.cpio import CpioEntry, write_cpio
from viommu.lab.errors import ConfigError

# Packages whose very files run in the guest. They need the standard library only.
GUEST_PACKAGES = ("driver", "layouts")

# Where it all lies in the guest; also the guest's PYTHONPATH.
GUEST_ROOT = "viommu"

_PACKAGE_DOCSTRING = b'"""The part of viommu that runs inside a guest."""\n'
# Folders that every image has, and that most have as symbolic links.
_IN_EVERY_IMAGE = ("bin", "sbin", "lib", "lib64")

# An archive begins at a multiple of 4 bytes, or the kernel does not see it.
_ALIGNMENT = 4


def guest_files(
    scripts: Path | None = None, extra: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """Return the overlay's files: contents by path in the guest, without the leading slash.

    `scripts` is a folder whose Python files go to `viommu/inside`; `extra` is added as it is.
    """
    package = Path(viommu.__file__).parent
    files = {f"{GUEST_ROOT}/viommu/__init__.py": _PACKAGE_DOCSTRING}
    for name in GUEST_PACKAGES:
        files |= python_files(package / name, f"{GUEST_ROOT}/viommu/{name}")
    if scripts is not None:
        files |= python_files(scripts)
    for path, data in (extra or {}).items():
        files[path.lstrip("/")] = data
    return files


def module_files(directory: Path) -> dict[str, bytes]:
    """Return the files of a `lib/modules/<release>` folder, as they go into the guest.

    Raises `ConfigError` when that is no folder of kernel modules.
    """
    if not (directory / "modules.dep").is_file():
        raise ConfigError(
            f"{directory} is no folder of kernel modules: it has no modules.dep, which depmod makes"
        )
    return {
        f"lib/modules/{directory.name}/{path.relative_to(directory)}": path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_relative_to(directory / "build")
    }


def initial_ram_disk(initramfs: Path, files: Mapping[str, bytes]) -> BinaryIO:
    """Join an image and an overlay in an anonymous file in memory, which the caller closes.

    Raises `ConfigError` when the image cannot be read.
    """
    disk = open(os.memfd_create("initrd"), "w+b")  # noqa: SIM115, PTH123 - the caller's
    try:
        with initramfs.open("rb") as image:
            shutil.copyfileobj(image, disk, 1 << 20)
        disk.write(bytes(-disk.tell() % _ALIGNMENT))
        entries = (CpioEntry.file(path, data) for path, data in files.items())
        disk.write(write_cpio(entries, present=_IN_EVERY_IMAGE))
        disk.flush()
    except BaseException as error:
        disk.close()
        if isinstance(error, OSError):
            raise ConfigError(f"{initramfs}: cannot be read: {error.strerror}") from error
        raise
    return disk


def python_files(directory: Path, target: str = f"{GUEST_ROOT}/inside") -> dict[str, bytes]:
    """Return the Python files below `directory`, by their path below `target`."""
    return {
        f"{target}/{path.relative_to(directory)}": path.read_bytes()
        for path in sorted(directory.rglob("*.py"))
    }
