"""What boots a disk: which firmware is taken, and where the disk goes. That it boots is shown in guests."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.disk_tools import provided
from viommu.disks import ImageFormat
from viommu.lab.config import Machine, load_machine
from viommu.lab.errors import ConfigError
from viommu.lab.firmware import (
    Firmware,
    FirmwareMissing,
    Uefi,
    find_uefi,
    firmware_arguments,
)
from viommu.lab.user_disk import UserDisk

AARCH64, X86_64 = load_machine("aarch64-virt"), load_machine("x86_64-q35")


class Host:
    """A root directory with firmware, and no cache beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def describe(
        self, name: str, *, place: str = "usr/share/qemu/firmware", files: bool = True, **more: Any
    ) -> Uefi:
        """Install a firmware and its description, in which `more` differs from what suits aarch64."""
        paths = [f"/usr/share/fw/{name}.{kind}" for kind in ("code", "vars")]
        found = [self.root / path.lstrip("/") for path in paths]
        if files:
            found[0].parent.mkdir(parents=True, exist_ok=True)
            for path in found:
                path.touch()
        said: dict[str, Any] = {
            "interface-types": ["uefi"],
            "mapping": {
                "device": "flash",
                "executable": {"filename": paths[0], "format": "raw"},
                "nvram-template": {"filename": paths[1], "format": "qcow2"},
            },
            "targets": [{"architecture": "aarch64", "machines": ["virt-*"]}],
            "features": ["verbose-static"],
        }
        self.write(name, json.dumps(said | more), place)
        return Uefi(found[0], "raw", found[1], "qcow2")

    def write(self, name: str, text: str, place: str = "usr/share/qemu/firmware") -> None:
        (self.root / place).mkdir(parents=True, exist_ok=True)
        (self.root / place / f"{name}.json").write_text(text)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setenv("VIOMMU_CACHE", str(tmp_path / "cache"))
    return Host(tmp_path)


def test_the_lowest_number_comes_first(host: Host) -> None:
    host.describe("60-other")
    first = host.describe("50-best")
    assert find_uefi(AARCH64, host.root) == first


def test_the_administrator_has_the_last_word(host: Host) -> None:
    host.describe("50-best")
    second = host.describe("60-other")
    host.write("50-best", "", "etc/qemu/firmware")  # how one of them is switched off
    assert find_uefi(AARCH64, host.root) == second
    own = host.describe("40-own", place="etc/qemu/firmware")
    assert find_uefi(AARCH64, host.root) == own


@pytest.mark.parametrize(
    "more",
    [
        {"features": ["secure-boot", "enrolled-keys"]},
        {"features": ["requires-smm"]},
        {"interface-types": ["bios"]},
        {"targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}]},
        {"targets": [{"architecture": "aarch64", "machines": ["sbsa-ref"]}]},
        {"mapping": {"device": "memory", "filename": "/x"}},
        {"mapping": {"device": "flash", "executable": {"filename": "/x", "format": "raw"}}},
        {"targets": None},
        {"files": False},
    ],
)
def test_what_does_not_suit_is_passed_over(host: Host, more: dict[str, Any]) -> None:
    host.describe("10-wrong", **more)
    host.write("20-broken", "{")
    with pytest.raises(
        FirmwareMissing,
        match="no UEFI firmware for aarch64: install qemu-efi-aarch64, or run viommu setup --disks",
    ):
        find_uefi(AARCH64, host.root)
    right = host.describe("90-right")
    assert find_uefi(AARCH64, host.root) == right


def test_a_pc(host: Host) -> None:
    host.describe("10-arm")
    uefi = host.describe("20-pc", targets=[{"architecture": "x86_64", "machines": ["pc-q35-*"]}])
    assert find_uefi(X86_64, host.root) == uefi


@pytest.mark.parametrize("machine", [AARCH64, X86_64])
def test_what_setup_provides(machine: Machine, tmp_path: Path) -> None:
    root = provided().path
    found = find_uefi(machine, tmp_path)
    assert found.code.is_relative_to(root)
    assert found.code.stat().st_size > 1 << 20


def test_which_firmware() -> None:
    assert firmware_arguments(X86_64, None) == ["-machine", "graphics=off"]
    assert firmware_arguments(X86_64, Firmware.BIOS) == ["-machine", "graphics=off"]
    provided()
    for machine, wanted in ((X86_64, Firmware.UEFI), (AARCH64, None), (AARCH64, Firmware.UEFI)):
        code, variables = firmware_arguments(machine, wanted)[1::2]
        assert "unit=0,format=raw,readonly=on,file=/" in code
        assert "unit=1,format=raw,snapshot=on,file=/" in variables, "they are not written to"
    with pytest.raises(ConfigError, match="there is no BIOS for aarch64, allowed: uefi"):
        firmware_arguments(AARCH64, Firmware.BIOS)


# The disk


def test_a_disk_takes_the_place_of_the_machines_own() -> None:
    machine = load_machine("aarch64-nvme")
    changed = UserDisk(Path("/a.img"), ImageFormat.QCOW2, snapshot=True).put_into(machine)
    (before, after) = (each.device("nvme0") for each in (machine, changed))
    assert (after.disk, after.disk_format, after.snapshot) == (Path("/a.img"), "qcow2", True)
    assert (after.slot, after.size) == (before.slot, None)
    assert changed.device("smmu") == machine.device("smmu")


@pytest.mark.parametrize("machine", [AARCH64, X86_64])
def test_a_controller_is_added_where_there_is_none(machine: Machine) -> None:
    changed = UserDisk(Path("a.raw")).put_into(machine)
    assert changed.devices[:-1] == machine.devices
    added = changed.devices[-1]
    assert (added.name, added.model, added.disk) == ("disk", "nvme", Path("a.raw"))


def test_what_the_server_is_told() -> None:
    assert UserDisk(Path("a b.raw")).options() == ["--disk", "a b.raw"]
    words = UserDisk(Path("a"), ImageFormat.QCOW2, snapshot=True).options()
    assert words == ["--disk", "a", "--disk-format", "qcow2", "--snapshot"]
