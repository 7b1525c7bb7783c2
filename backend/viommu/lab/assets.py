"""What `viommu setup` put into the cache: libvfio-user, QEMU, guests.

The lab reads it; only provisioning writes it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from viommu.lab.errors import LabError


class AssetsMissing(LabError):
    """A part that `viommu setup` provides is absent."""


def cache_directory() -> Path:
    """`$VIOMMU_CACHE`, else `$XDG_CACHE_HOME/viommu`, else `~/.cache/viommu`. It may not exist."""
    if named := os.environ.get("VIOMMU_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "viommu"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    origin: str  # where it came from, for a person to read


class Library(_Part):
    """A libvfio-user."""

    path: Path
    version: str


class Qemu(_Part):
    """A QEMU that has vfio-user-pci."""

    argv: tuple[str, ...]  # starts it; its own options follow
    version: str


class BootTools(_Part):
    """What a disk of the user's own needs to be booted."""

    path: Path  # a directory of Debian's files with UEFI firmware
    argv: tuple[str, ...]  # starts qemu-nbd
    version: str


class GuestImage(_Part):
    """A kernel and its initramfs."""

    kernel: Path
    release: str  # as `uname -r` prints it
    initramfs: Path  # cpio archives may be appended to it
    modules: tuple[str, ...]  # that the initramfs holds, as lsmod prints them


class Assets(BaseModel):
    """The parts by name; `qemu` by architecture ("aarch64", "x86_64"), `guests` by that or by a name of their own."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    libvfio_user: Library
    qemu: Mapping[str, Qemu]
    guests: Mapping[str, GuestImage]
    boot_tools: BootTools | None = None

    @classmethod
    def load(cls, cache: Path | None = None) -> Self:
        """Reads the manifest of `cache` (default: `cache_directory()`).

        Raises `AssetsMissing` when there is none, when it is incomplete, or when a file that it
        names is gone.
        """
        path = (cache or cache_directory()) / "manifest.json"
        try:
            assets = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise AssetsMissing(f"Nothing is set up in {path.parent}: run viommu setup.") from error
        except ValidationError as error:
            what = ".".join(str(step) for step in error.errors()[0]["loc"]) or "its contents"
            raise AssetsMissing(f"{path} lacks {what}: run viommu setup.") from error
        for file in assets._files():
            if not file.exists():
                raise AssetsMissing(f"{file} is gone: run viommu setup.")
        return assets

    def _files(self) -> list[Path]:
        files = [self.libvfio_user.path]
        files += [Path(qemu.argv[0]) for qemu in self.qemu.values()]
        for guest in self.guests.values():
            files += [guest.kernel, guest.initramfs]
        return files

    def qemu_for(self, architecture: str) -> Qemu:
        """Raises `AssetsMissing` for an architecture that is not set up."""
        return _pick(self.qemu, architecture, "QEMU", "viommu setup")

    def guest_for(self, name: str) -> GuestImage:
        """The guest of that name: an architecture, or one that was set up on demand; raises `AssetsMissing`."""
        further = "" if name in self.qemu else f" --guest {name}"
        return _pick(self.guests, name, "guest", f"viommu setup{further}")


def boot_tools() -> BootTools | None:
    """What `viommu setup --disks` provided; None where nothing was."""
    try:
        return Assets.load().boot_tools
    except AssetsMissing:
        return None


Kind = TypeVar("Kind")


def _pick(parts: Mapping[str, Kind], name: str, what: str, command: str) -> Kind:
    try:
        return parts[name]
    except KeyError as error:
        known = ", ".join(parts) or "none"
        raise AssetsMissing(
            f"No {what} for {name} is set up (there is {known}): run {command}."
        ) from error
