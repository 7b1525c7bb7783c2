"""A QEMU that has vfio-user-pci: the one on PATH, else Debian's backport in the cache."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from viommu.lab.provision.apt import BACKPORTS, PrivateApt, command_in, unpack
from viommu.lab.provision.cache import Cache, Entry, ProvisionError, recipe_key
from viommu.lab.provision.progress import Say

DEVICE = "vfio-user-pci"
OLDEST = (10, 1)
PACKAGES = ("qemu-system-arm", "qemu-system-x86")
_DATA = ("qemu-system-data", "seabios", "ipxe-qemu")
# Below the unpacked root; QEMU looks its firmware up in these, in order.
_DATA_DIRECTORIES = ("usr/share/qemu", "usr/share/seabios")
_KEPT = re.compile(
    r"usr/bin/qemu-system-|usr/lib/[^/]+/[^/]+\.so[^/]*$|usr/share/(qemu|seabios)/.|usr/share/doc/[^/]+/copyright$"
)
_PROBE_TIME = 30  # seconds for `-device help`


def program(architecture: str) -> str:
    return f"qemu-system-{architecture}"


def key(architecture: str) -> str:
    """Changes with the recipe and with the QEMU that is on PATH."""
    return recipe_key(Path(__file__), *_identity(shutil.which(program(architecture))))


def _identity(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    state = Path(path).stat()
    return path, str(state.st_size), str(state.st_mtime_ns)


def version_with_device(argv: Sequence[str]) -> str | None:
    """The version of a QEMU that is new enough and lists vfio-user-pci, else None."""
    try:
        banner = _ask(argv, "--version")
        devices = _ask(argv, "-machine", "none", "-device", "help")
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"version (\d+)\.(\d+)(?:\.\d+)*", banner)
    if match is None or (int(match[1]), int(match[2])) < OLDEST or f'"{DEVICE}"' not in devices:
        return None
    return match[0].removeprefix("version ")


def _ask(argv: Sequence[str], *arguments: str) -> str:
    done = subprocess.run(
        [*argv, *arguments],
        capture_output=True, text=True, check=True, timeout=_PROBE_TIME, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout


def provide(architecture: str, cache: Cache, apt: PrivateApt, say: Say) -> Entry:
    """The manifest's entry; downloads QEMU for all architectures when PATH has none."""
    on_path = shutil.which(program(architecture))
    if on_path and (version := version_with_device([on_path])):
        return {"argv": [on_path], "version": version, "origin": on_path}
    directory = cache.directory / f"qemu-{recipe_key(Path(__file__))}"
    if not directory.exists():
        _install(directory.name, cache, apt, say)
    argv = _command(directory, program(architecture))
    found = version_with_device(argv)
    if found is None:
        raise ProvisionError(
            f"{program(architecture)} from Debian's {BACKPORTS} does not run on this host or lacks "
            f"{DEVICE}: put a QEMU ≥ {'.'.join(map(str, OLDEST))} that has it on PATH."
        )
    package = (directory / "package-version").read_text()
    return {"argv": argv, "version": found, "origin": f"Debian {BACKPORTS}, {package}"}


def _install(name: str, cache: Cache, apt: PrivateApt, say: Say) -> None:
    # Programs, firmware and shared libraries; not what only an installed system needs (adduser, …).
    archives = [
        archive
        for archive in apt.closure(PACKAGES, suite=BACKPORTS)
        if archive.package in {*PACKAGES, *_DATA} or archive.package.startswith(("lib", "zlib"))
    ]
    files = apt.fetch(archives, "QEMU")
    say(f"Unpacking QEMU ({len(files)} packages)")
    with cache.building(name) as root:
        for file in files:
            unpack(file, root, lambda path: _KEPT.match(path) is not None)
        versions = [archive.version for archive in archives if archive.package == PACKAGES[0]]
        (root / "package-version").write_text(versions[0])


def _command(root: Path, name: str) -> list[str]:
    data = [argument for path in _DATA_DIRECTORIES for argument in ("-L", str(root / path))]
    return [*command_in(root, name), *data]
