"""The firmware that boots a machine's disk: SeaBIOS, which comes with QEMU, or a UEFI that the host or the cache has.

A UEFI is found by the descriptions that distributions install for QEMU's users (docs/interop/firmware.json there).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from viommu.lab.assets import boot_tools
from viommu.lab.config import Machine
from viommu.lab.errors import ConfigError, LabError

_PACKAGES = {"aarch64": "qemu-efi-aarch64", "x86_64": "ovmf"}  # Debian's
# A file of the second hides one of the same name in the first.
_DESCRIPTIONS = ("usr/share/qemu/firmware", "etc/qemu/firmware")
# What the descriptions match: a machine with a version, whichever.
_FULL_NAMES = {"virt": "virt-10.1", "q35": "pc-q35-10.1"}
# What wants a machine of another kind, or a disk that somebody has signed.
_UNWANTED = {"requires-smm", "secure-boot", "enrolled-keys"}


class Firmware(StrEnum):
    """What starts when a machine is switched on."""

    BIOS = "bios"
    UEFI = "uefi"


class FirmwareMissing(LabError):
    """No UEFI for the machine is on the host."""


@dataclass(frozen=True)
class Uefi:
    """A UEFI in two flash devices: its code, and what its variables are at first."""

    code: Path
    code_format: str
    variables: Path
    variables_format: str


def firmware_arguments(machine: Machine, wanted: Firmware | None) -> list[str]:
    """The arguments that put firmware into the machine: what is `wanted`, else SeaBIOS into a PC and UEFI elsewhere.

    UEFI forgets its variables with QEMU's end. Raises `ConfigError` or `FirmwareMissing`.
    """
    if wanted != Firmware.UEFI and machine.arch == "x86_64":
        return ["-machine", "graphics=off"]  # with which SeaBIOS uses the serial console
    if wanted == Firmware.BIOS:
        raise ConfigError(f"firmware: there is no BIOS for {machine.arch}, allowed: uefi")
    uefi = find_uefi(machine)
    flash = [
        f"if=pflash,unit=0,format={uefi.code_format},readonly=on,file={_quoted(uefi.code)}",
        f"if=pflash,unit=1,format={uefi.variables_format},snapshot=on,file={_quoted(uefi.variables)}",
    ]
    return [word for drive in flash for word in ("-drive", drive)]


def find_uefi(machine: Machine, root: Path = Path("/")) -> Uefi:
    """The UEFI for `machine` below `root`, else what `viommu setup --disks` provided; raises `FirmwareMissing`."""
    tools = boot_tools()
    for base in (root, *([tools.path] if tools else [])):
        for path in _descriptions(base):
            if (found := _suitable(path, base, machine)) is not None:
                return found
    raise FirmwareMissing(
        f"there is no UEFI firmware for {machine.arch}: install {_PACKAGES[machine.arch]}, or run viommu setup --disks"
    )


def _descriptions(base: Path) -> Iterator[Path]:
    """In the order of preference that their numbers give."""
    found = {path.name: path for place in _DESCRIPTIONS for path in (base / place).glob("*.json")}
    yield from (found[name] for name in sorted(found))


def _suitable(description: Path, base: Path, machine: Machine) -> Uefi | None:
    try:
        said = json.loads(description.read_text("utf-8"))
        mapping = said["mapping"]
        if not _fits(said, machine) or mapping["device"] != "flash":
            return None
        code, variables = mapping["executable"], mapping["nvram-template"]
        files = [base / each["filename"].lstrip("/") for each in (code, variables)]
        if not all(file.is_file() for file in files):
            return None
        return Uefi(files[0], code["format"], files[1], variables["format"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # somebody else's file: another may do


def _fits(said: dict[str, Any], machine: Machine) -> bool:
    return (
        "uefi" in said["interface-types"]
        and not _UNWANTED & set(said["features"])
        and any(
            target["architecture"] == machine.arch
            and any(fnmatch(_FULL_NAMES[machine.machine_type], name) for name in target["machines"])
            for target in said["targets"]
        )
    )


def _quoted(path: Path) -> str:
    return str(path).replace(",", ",,")
