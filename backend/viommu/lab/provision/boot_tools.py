"""What `viommu boot --disk` needs besides QEMU: UEFI firmware, and `qemu-nbd` for images that are not raw.

The host's own are preferred where they are used: see `viommu.lab.firmware` and `viommu.disks.qemu_nbd`.
"""

import re
from pathlib import Path

from viommu.lab.provision.apt import BACKPORTS, PrivateApt, command_in, unpack
from viommu.lab.provision.cache import Cache, Entry, recipe_key
from viommu.lab.provision.progress import Say

_PACKAGES = ("ovmf", "qemu-efi-aarch64", "qemu-utils")
# Of the firmware what has no Secure Boot: each variant of AAVMF takes 64 MiB.
_KEPT = re.compile(
    r"usr/bin/qemu-(nbd|img)$|usr/lib/[^/]+/[^/]+\.so[^/]*$|usr/share/doc/[^/]+/copyright$"
    r"|usr/share/qemu/firmware/60-|usr/share/AAVMF/AAVMF_(CODE\.no-secboot|VARS)\.fd$"
    r"|usr/share/OVMF/OVMF_(CODE|VARS)_4M\.fd$"
)


def key() -> str:
    """Changes with the recipe."""
    return recipe_key(Path(__file__))


def provide(cache: Cache, apt: PrivateApt, say: Say) -> Entry:
    """The manifest's entry."""
    directory = cache.directory / f"boot-tools-{key()}"
    if not directory.exists():
        _install(directory.name, cache, apt, say)
    return {
        "path": str(directory),
        "argv": command_in(directory, "qemu-nbd"),
        "version": (directory / "package-version").read_text(),
        "origin": f"Debian {BACKPORTS}, {' '.join(_PACKAGES)}",
    }


def _install(name: str, cache: Cache, apt: PrivateApt, say: Say) -> None:
    archives = [
        archive
        for archive in apt.closure(_PACKAGES, suite=BACKPORTS)
        if archive.package in _PACKAGES or archive.package.startswith(("lib", "zlib"))
    ]
    files = apt.fetch(archives, "UEFI firmware and qemu-nbd")
    say(f"Unpacking UEFI firmware and qemu-nbd ({len(files)} packages)")
    with cache.building(name) as root:
        for file in files:
            unpack(file, root, lambda path: _KEPT.match(path) is not None)
        versions = [archive.version for archive in archives if archive.package == _PACKAGES[0]]
        (root / "package-version").write_text(versions[0])
