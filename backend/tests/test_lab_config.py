"""A machine's TOML: what is accepted, and the one sentence that refuses the rest."""

from pathlib import Path

import pytest

from viommu.lab.config import Machine, load_machine, machine_directory
from viommu.lab.errors import ConfigError
from viommu.smmu import Features

GOOD = """
arch = "aarch64"
machine = "virt,gic-version=3"
cpu = "cortex-a57"
memory_mib = 512
console = "ttyAMA0"

[timeouts]
boot = 30

[[devices]]
name = "smmu"
model = "smmuv3"
slot = 1

[[devices]]
name = "engine0"
model = "test-engine"
slot = 2
"""


FOLDER = "<folder>"


def write(folder: Path, text: str) -> Path:
    path = folder / "one.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(machine_directory().glob("*.toml")), ids=lambda p: p.stem)
def test_the_machines_that_come_with_the_project_are_good(path: Path) -> None:
    machine = load_machine(path.stem)
    assert machine == load_machine(path)
    engines = [("engine0", "test-engine", 2), ("engine1", "test-engine", 3)]
    disk = [("nvme0", "nvme", 2)]
    assert [(device.name, device.model, device.slot) for device in machine.devices] == [
        ("smmu", "smmuv3", 1),
        *(disk if path.stem.endswith("-nvme") else engines),
    ]


def test_both_architectures_are_there() -> None:
    assert {path.stem for path in machine_directory().glob("*.toml")} >= {
        "aarch64-virt",
        "x86_64-q35",
        "aarch64-nvme",
        "x86_64-nvme",
    }


def test_values_and_defaults(tmp_path: Path) -> None:
    machine = load_machine(write(tmp_path, GOOD))
    assert machine.machine_type == "virt"
    assert machine.cpus == 1
    assert (machine.timeouts.boot, machine.timeouts.command) == (30, 30)
    assert machine.device("engine0").stream_id == 0x10
    with pytest.raises(ConfigError, match=r"no device 'nvme0' .* its devices: smmu, engine0"):
        machine.device("nvme0")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('cpu = "cortex-a57"', 'cpux = "x"', "cpu: must be given (and 1 more)"),
        (
            "memory_mib = 512",
            "memory_mib = 512\nram = 1",
            "ram: unknown key, allowed: accelerator, arch, command_line, console, cpu, cpus, "
            "devices, kernel_ats, machine, memory_mib, msix, smmu, timeouts",
        ),
        ("boot = 30", "bot = 30", "timeouts.bot: unknown key, allowed: boot, command"),
        ("slot = 2", "slut = 2", "devices[1].slot: must be given (and 1 more)"),
        (
            "slot = 2",
            "slot = 2\ncolour = 1",
            "devices[1].colour: unknown key, allowed: bus, disk, disk_format, model, name, options, "
            "size_mib, slot, snapshot, write_cache",
        ),
        (
            '"smmuv3"',
            '"smmuv2"',
            "devices[0].model: 'smmuv2' is wrong, it should be 'smmuv3', 'test-engine', 'nvme' or a "
            "class of yours: 'file.py:Class'",
        ),
        (
            '"aarch64"',
            '"riscv64"',
            "arch: 'riscv64' is wrong, it should be 'aarch64' or 'x86_64'",
        ),
        ('"virt,gic-version=3"', '"q35"', "machine: aarch64 needs 'virt'"),
        ("slot = 2", "slot = 0", "devices[1].slot: 0 is wrong, it should be greater than or equal"),
        ("slot = 2", "slot = 32", "devices[1].slot: 32 is wrong, it should be less than or equal"),
        (
            "slot = 2",
            "slot = 2\nbus = 2",
            "devices: the bus of 'engine0' will be 1, not 2: they are numbered in the order of",
        ),
        (
            "slot = 1",
            "slot = 1\nbus = 1",
            "devices: 'smmu' is an SMMU, and belongs on the root bus",
        ),
        ("slot = 2", "slot = 1", "devices[1].slot: 1 is taken by 'smmu'"),
        ('"engine0"', '"smmu"', "devices[1].name: 'smmu' is taken by another device"),
        ('"engine0"', '"control"', "devices[1].name: 'control' is that of the control socket"),
        ('"test-engine"', '"smmuv3"', "devices[1].model: the SMMU is 'smmu', and there is one"),
        (
            "slot = 2",
            "slot = 5",
            "devices[1].slot: 5 has the same interrupt as slot 1 ('smmu'), and an SMMU shares it "
            "with nobody; allowed: a slot that differs from it modulo 4",
        ),
        ("boot = 30", "boot = 0", "timeouts.boot: 0 is wrong, it should be greater than 0"),
        ("boot = 30", "boot = nan", "timeouts.boot: nan is wrong"),
        (
            "memory_mib = 512",
            "memory_mib = '1G'",
            "memory_mib: '1G' is wrong, it should be a valid",
        ),
        ("[timeouts]", "[smmu]\nmsi = 'x'\n[timeouts]", "smmu.msi: 'x' is wrong, it should be a"),
        (
            "[timeouts]",
            "[smmu]\noutput_address_bits = 33\n[timeouts]",
            "smmu: output_address_bits",
        ),
        (
            '"test-engine"',
            '"nvme"',
            "devices[1]: a device of model 'nvme' needs a disk or a size_mib",
        ),
        (
            "slot = 2",
            "slot = 2\nsize_mib = 1",
            "devices[1]: a device of model 'test-engine' has neither disk nor size_mib",
        ),
        (
            '"test-engine"',
            '"nvme"\nsize_mib = 1\nwrite_cache = "volatile"',
            "devices[1]: a volatile write_cache needs a disk: the RAM is lost as a whole",
        ),
        (
            "slot = 2",
            "slot = 2\noptions = { depth = 1 }",
            "devices[1]: a device of model 'test-engine' has no options",
        ),
        (
            '"test-engine"',
            '"mine.py:"',
            "devices[1].model: 'mine.py:' is wrong, it should be 'smmu",
        ),
        (
            '"test-engine"',
            '"mine.py:Mine"\nsize_mib = 1',
            f"devices[1]: a device of model '{FOLDER}/mine.py:Mine' has neither disk nor size_mib",
        ),
        ("slot = 2", "slot = 2\nsize_mib = 0", "devices[1].size_mib: 0 is wrong, it should be"),
        ("memory_mib = 512", "memory_mib = ", "not TOML: Invalid value (at line 5, column 14)"),
    ],
)
def test_a_bad_toml_gives_one_sentence(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError) as raised:
        load_machine(path)
    assert str(raised.value).startswith(f"{path}: {sentence}".replace(FOLDER, str(tmp_path)))
    assert "\n" not in str(raised.value)


def test_what_the_smmu_implements(tmp_path: Path) -> None:
    text = GOOD + "[smmu]\nmsi = false\nstream_id_bits = 9\n"
    smmu = load_machine(write(tmp_path, text)).smmu
    assert isinstance(smmu, Features)
    assert (smmu.msi, smmu.stream_id_bits) == (False, 9)
    assert load_machine(write(tmp_path, GOOD)).smmu.msi is True
    with pytest.raises(ConfigError, match=r"smmu\.mis: unknown key, allowed: .*msi, .*stream_id"):
        load_machine(write(tmp_path, GOOD + "[smmu]\nmis = false\n"))


def test_engines_may_share_an_interrupt_with_each_other(tmp_path: Path) -> None:
    more = '[[devices]]\nname = "engine1"\nmodel = "test-engine"\nslot = 6\n'
    assert len(load_machine(write(tmp_path, GOOD + more)).devices) == 3


def test_a_function_on_a_bus_of_its_own(tmp_path: Path) -> None:
    more = '[[devices]]\nname = "engine1"\nmodel = "test-engine"\nslot = 3\nbus = 2\n'
    text = GOOD.replace("slot = 2", "slot = 2\nbus = 1") + more
    smmu, first, second = load_machine(write(tmp_path, text)).devices
    assert [device.address for device in (smmu, first, second)] == ["00:01.0", "01:00.0", "02:00.0"]
    assert [first.stream_id, second.stream_id] == [0x100, 0x200]


def test_a_disk_is_beside_its_machine(tmp_path: Path) -> None:
    text = GOOD.replace('"test-engine"', '"nvme"\ndisk = "{}"\nsize_mib = 3')
    assert load_machine(write(tmp_path, text.format("a.raw"))).devices[1].disk == tmp_path / "a.raw"
    device = load_machine(write(tmp_path, text.format("/dev/vdb"))).devices[1]
    assert (device.disk, device.size) == (Path("/dev/vdb"), 3 << 20)


def test_a_model_of_ones_own_is_beside_its_machine(tmp_path: Path) -> None:
    text = GOOD.replace('"test-engine"', '"{}:Mine"\noptions = {{ depth = 3 }}')
    device = load_machine(write(tmp_path, text.format("chips/mine.py"))).devices[1]
    assert (device.model, device.options) == (f"{tmp_path}/chips/mine.py:Mine", {"depth": 3})
    for model in ("/opt/mine.py", "acme.chips"):
        assert load_machine(write(tmp_path, text.format(model))).devices[1].model == f"{model}:Mine"


def test_lines_for_the_smmu(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_machine(path, "msi = false").smmu.msi is False
    with pytest.raises(ConfigError, match=r"one\.toml: smmu\.mis: unknown key"):
        load_machine(path, "mis = false")


def test_lines_win_over_the_smmu_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "[smmu]\nmsi = false\nstream_id_bits = 9\n")
    smmu = load_machine(path, "stream_id_bits = 10").smmu
    assert (smmu.msi, smmu.stream_id_bits) == (False, 10)
    with pytest.raises(ConfigError, match=r"^the lines for \[smmu\]: not TOML: .*line 1"):
        load_machine(path, "msi = perhaps")
    with pytest.raises(ConfigError, match=r"one\.toml: smmu: 3 is wrong"):
        load_machine(write(tmp_path, "smmu = 3\n" + GOOD), "msi = false")


def test_an_image_of_another_format(tmp_path: Path) -> None:
    text = GOOD.replace('"test-engine"', '"nvme"\n{}')
    image = 'disk = "cloud.img"\ndisk_format = "qcow2"\nsnapshot = true'
    device = load_machine(write(tmp_path, text.format(image))).devices[1]
    assert (device.disk_format, device.snapshot) == ("qcow2", True)
    with pytest.raises(ConfigError, match=r"disk_format: 'vmdk' is wrong, .*'raw' or 'qcow2'"):
        load_machine(write(tmp_path, text.format(image.replace("qcow2", "vmdk"))))
    with pytest.raises(ConfigError, match=r"snapshot are of a disk, and there is none"):
        load_machine(write(tmp_path, text.format("size_mib = 1\nsnapshot = true")))


def test_slots_of_q35(tmp_path: Path) -> None:
    text = GOOD.replace('"aarch64"', '"x86_64"').replace('"virt,gic-version=3"', '"q35"')
    assert load_machine(write(tmp_path, text.replace("slot = 2", "slot = 5"))).arch == "x86_64"
    with pytest.raises(ConfigError, match=r"devices\[1\]\.slot: 31 holds q35's own functions"):
        load_machine(write(tmp_path, text.replace("slot = 2", "slot = 31")))


def test_a_name_that_is_no_machine() -> None:
    with pytest.raises(
        ConfigError, match=r"no machine 'vax'; known: aarch64-nvme, aarch64-virt, .*x86_64-q35"
    ):
        load_machine("vax")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_machine(tmp_path / "none.toml")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "one.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"one\.toml: not TOML: "):
        load_machine(path)


def test_a_machine_cannot_be_changed(tmp_path: Path) -> None:
    machine = load_machine(write(tmp_path, GOOD))
    assert isinstance(machine, Machine)
    with pytest.raises(ValueError, match="frozen"):
        machine.cpus = 2
