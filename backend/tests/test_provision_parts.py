"""The parts themselves: what setup built is right, and what the host already has is preferred."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from viommu.lab.assets import Assets, AssetsMissing, cache_directory
from viommu.lab.provision import guest_image, libvfio_user, qemu
from viommu.lab.provision.__main__ import asked_for, parts
from viommu.lab.provision.apt import PrivateApt
from viommu.lab.provision.cache import Cache, ProvisionError
from viommu.lab.provision.kernel_modules import KernelModule, modules_alias, modules_dep

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("aarch64", "x86_64")


@pytest.fixture(scope="module")
def assets() -> Assets:
    return Assets.load()


def silent(text: str) -> None:
    pass


def unused_apt(cache: Cache) -> PrivateApt:
    """For parts that must not need it: its mirror does not exist."""
    return PrivateApt(cache, silent)


# -- QEMU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_qemu_has_the_device(assets: Assets, architecture: str) -> None:
    found = qemu.version_with_device(assets.qemu_for(architecture).argv)
    assert found == assets.qemu_for(architecture).version
    assert tuple(map(int, found.split(".")[:2])) >= qemu.OLDEST


def stand_in(directory: Path, version: str, devices: str) -> Path:
    path = directory / "qemu-system-aarch64"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo "QEMU emulator version {version}";; '
        f"*) echo '{devices}';; esac\n"
    )
    path.chmod(0o755)
    return path


DEVICES = 'name "vfio-user-pci", bus PCI'


@pytest.mark.parametrize(
    ("version", "devices", "expected"),
    [
        ("10.1.0", DEVICES, "10.1.0"),
        ("11.1.3 (Debian 1:11.1.3+ds-1)", DEVICES, "11.1.3"),
        ("10.0.9", DEVICES, None),
        ("9.2.0", DEVICES, None),
        ("10.1.0", 'name "vfio-pci", bus PCI', None),
        ("unknown", DEVICES, None),
    ],
)
def test_which_qemu_will_do(
    tmp_path: Path, version: str, devices: str, expected: str | None
) -> None:
    assert qemu.version_with_device([str(stand_in(tmp_path, version, devices))]) == expected


def test_program_that_cannot_run_is_no_qemu(tmp_path: Path) -> None:
    assert qemu.version_with_device([str(tmp_path / "absent")]) is None


def test_qemu_on_path_comes_first(
    tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "qemu-system-aarch64"
    command = shlex.join(assets.qemu_for("aarch64").argv)
    wrapper.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    wrapper.chmod(0o755)
    before = qemu.key("aarch64")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert qemu.key("aarch64") != before
    cache = Cache(tmp_path / "cache")
    entry = qemu.provide("aarch64", cache, unused_apt(cache), silent)
    assert entry["argv"] == [str(wrapper)]
    assert entry["version"] == assets.qemu_for("aarch64").version


# -- libvfio-user -------------------------------------------------------------------------------


def test_library_is_one(assets: Assets) -> None:
    # In a process of its own: a library stays loaded.
    script = (
        "import ctypes, sys\nlibrary = ctypes.CDLL(sys.argv[1])\n"
        "print(all(hasattr(library, name) for name in ('vfu_create_ctx', 'vfu_run_ctx')))"
    )
    path = str(assets.libvfio_user.path)
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_library_that_the_environment_names(
    tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(libvfio_user.VARIABLE, str(assets.libvfio_user.path))
    cache = Cache(tmp_path)
    entry = libvfio_user.provide(cache, unused_apt(cache), silent)
    assert entry["path"] == str(assets.libvfio_user.path)
    assert entry["origin"] == "$VFIO_USER_LIBRARY"


@pytest.mark.parametrize("content", [None, b"no library"])
def test_library_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    named = tmp_path / "libvfio-user.so"
    if content is not None:
        named.write_bytes(content)
    monkeypatch.setenv(libvfio_user.VARIABLE, str(named))
    cache = Cache(tmp_path)
    with pytest.raises(ProvisionError, match=r"does not exist|can load") as caught:
        libvfio_user.provide(cache, unused_apt(cache), silent)
    assert str(named) in str(caught.value)


def test_missing_compiler_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    apt = unused_apt(cache)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(
        ProvisionError, match=r"No C compiler .*: sudo apt-get install gcc"
    ) as error:
        libvfio_user.provide(cache, apt, silent)
    assert "\n" not in str(error.value)


@pytest.mark.network
def test_headers_of_json_c_need_not_be_installed(tmp_path: Path) -> None:
    """Compiles and loads the library against an unpacked json-c."""
    cache = Cache(cache_directory())
    with cache.locked(silent):
        options = libvfio_user.unpack_json_c(tmp_path, cache, silent)
    source, library = tmp_path / "user.c", tmp_path / "lib" / "libuser.so"
    source.write_text("#include <json.h>\nvoid *make(void) { return json_object_new_object(); }\n")
    command = ["cc", "-shared", "-fPIC", "-Wl,-rpath,$ORIGIN", str(source), *options]
    command += ["-o", str(library)]
    subprocess.run(command, check=True)
    script = (
        "import ctypes, sys\nctypes.CDLL(sys.argv[1]).make()\n"
        "print([line.split()[5] for line in open('/proc/self/maps') if 'json-c' in line][0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(library)], capture_output=True, text=True
    )
    assert done.stdout.startswith(str(tmp_path / "lib")), done.stderr


# -- guests -------------------------------------------------------------------------------------


def members(archive: bytes) -> Mapping[str, tuple[int, bytes]]:
    """Mode and contents by path."""
    found, position = {}, 0
    while archive[position : position + 6] == b"070701":
        mode, size, name_size = (
            int(archive[position + start : position + start + 8], 16) for start in (14, 54, 94)
        )
        start = position + 110
        name = archive[start : start + name_size - 1].decode()
        start = -(-(start + name_size) // 4) * 4
        found[name] = mode, archive[start : start + size]
        position = -(-(start + size) // 4) * 4
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initramfs(assets: Assets, architecture: str) -> None:
    image = assets.guest_for(architecture)
    tree = members(image.initramfs.read_bytes())
    base = f"usr/lib/modules/{image.release}"
    mode, init = tree["init"]
    assert init.startswith(b"#!/bin/busybox sh\n")
    assert mode & 0o111
    assert stat.S_ISCHR(tree["dev/console"][0])
    assert tree["usr/bin/busybox"][1][:4] == b"\x7fELF"
    # ELF's e_machine: everything in it is of the guest's architecture.
    machine = {"aarch64": 183, "x86_64": 62}[architecture]
    binaries = [data for _, data in tree.values() if data[:4] == b"\x7fELF"]
    assert {int.from_bytes(data[18:20], "little") for data in binaries} == {machine}
    assert {"vfio_pci", "vfio_iommu_type1", "uio_pci_generic"} <= set(image.modules)
    paths = [line.partition(":")[0] for line in tree[f"{base}/modules.dep"][1].decode().split("\n")]
    assert len(image.modules) == len([path for path in paths if path])
    for path in filter(None, paths):
        assert f"{base}/{path}" in tree
    assert b"vfio_pci" in tree[f"{base}/modules.alias"][1]
    for name in ("mke2fs", "mkfs.ext4", "e2fsck"):
        assert f"usr/sbin/{name}" in tree
    for name in ("ctypes/__init__.py", "json/__pycache__/__init__.cpython-313.pyc"):
        assert f"usr/lib/python3.13/{name}" in tree
    assert not [name for name in tree if "/test/" in name or "idlelib" in name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_libraries_that_python_needs_are_there(assets: Assets, architecture: str) -> None:
    """Every shared library that a file of the image names is in it."""
    tree = members(assets.guest_for(architecture).initramfs.read_bytes())
    present = {Path(name).name for name in tree}
    for name, (_, data) in tree.items():
        if data[:4] == b"\x7fELF" and "/modules/" not in name:
            for needed in needed_libraries(data):
                assert needed in present, f"{name} needs {needed}"


def needed_libraries(elf: bytes) -> list[str]:
    """The DT_NEEDED entries of an ELF64 file."""

    def number(offset: int, size: int) -> int:
        return int.from_bytes(elf[offset : offset + size], "little")

    sections = [number(40, 8) + index * number(58, 2) for index in range(number(60, 2))]
    for section in sections:
        if number(section + 4, 4) == 6:  # SHT_DYNAMIC
            strings = number(sections[number(section + 40, 4)] + 24, 8)
            start, size = number(section + 24, 8), number(section + 32, 8)
            offsets = [
                number(entry + 8, 8)
                for entry in range(start, start + size, 16)
                if number(entry, 8) == 1  # DT_NEEDED
            ]
            return [elf[strings + o : elf.index(b"\0", strings + o)].decode() for o in offsets]
    return []


def module(name: str, *depends: str, aliases: tuple[str, ...] = ()) -> KernelModule:
    return KernelModule(name, f"kernel/{name}.ko", b"", depends, aliases)


def test_modules_dep_names_indirect_needs() -> None:
    modules = [module("a"), module("b", "a"), module("c", "b")]
    assert modules_dep(modules) == (
        "kernel/a.ko:\nkernel/b.ko: kernel/a.ko\nkernel/c.ko: kernel/b.ko kernel/a.ko\n"
    )


def test_modules_alias() -> None:
    modules = [module("a", aliases=("pci:v00001B36d*", "x")), module("b")]
    assert modules_alias(modules) == "alias pci:v00001B36d* a\nalias x a\n"


# -- the manifest -------------------------------------------------------------------------------


def test_every_part_is_found() -> None:
    manifest = Cache(cache_directory()).read_manifest()
    assert [part.title for part in parts() if part.find(manifest) is None] == []


def test_part_of_another_recipe_or_without_its_file_is_missing(tmp_path: Path) -> None:
    manifest = Cache(cache_directory()).read_manifest()
    part = next(part for part in parts() if part.place == ("guests", "aarch64"))
    entry = manifest["guests"]["aarch64"]
    assert part.find(manifest) == entry
    manifest["guests"]["aarch64"] = entry | {"key": "of another recipe"}
    assert part.find(manifest) is None
    manifest["guests"]["aarch64"] = entry | {"initramfs": str(tmp_path / "gone")}
    assert part.find(manifest) is None


def test_recipes_differ() -> None:
    guests = guest_image.GUESTS + guest_image.ON_DEMAND
    assert len({guest_image.key(guest) for guest in guests}) == len(guests)


def test_further_guests_are_parts_for_who_asks() -> None:
    names = [guest.name for guest in guest_image.ON_DEMAND]
    assert not set(names) & {part.place[-1] for part in parts()}
    for name in names:
        assert ("guests", name) in {part.place for part in parts((name, "aarch64"))}
        assert len(list(parts((name, "aarch64")))) == len(list(parts())) + 1
    done = setup("--guest", "vax")
    assert done.returncode == 2
    assert "aarch64-16k" in done.stderr


def test_assets_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(AssetsMissing, match=r"Nothing is set up in .*: run viommu setup"):
        Assets.load(tmp_path)
    manifest = json.loads((cache_directory() / "manifest.json").read_text())
    del manifest["libvfio_user"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AssetsMissing, match="lacks libvfio_user: run viommu setup"):
        Assets.load(tmp_path)
    manifest["libvfio_user"] = {"path": str(tmp_path / "gone"), "version": "", "origin": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(AssetsMissing, match="gone is gone: run viommu setup"):
        Assets.load(tmp_path)


def test_architecture_that_is_not_set_up(assets: Assets) -> None:
    with pytest.raises(AssetsMissing, match=r"No QEMU for riscv64 .*\(there is aarch64, x86_64\)"):
        assets.qemu_for("riscv64")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"VIOMMU_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/viommu"),
        ({"HOME": "/c"}, "/c/.cache/viommu"),
    ],
)
def test_cache_directory(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("VIOMMU_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)


# -- the command --------------------------------------------------------------------------------


def setup(
    *arguments: str, script: Path = ROOT / "scripts/setup", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "160", **environment},
        stdin=subprocess.DEVNULL,
    )


def test_check_reports_every_part() -> None:
    done = setup("--check")
    assert done.returncode == 0, done.stderr
    # What was asked for once is a part too.
    further = asked_for(Cache(cache_directory()).read_manifest())
    assert done.stdout.count(" ok ") == len(list(parts(further)))
    for text in ("libvfio-user", "QEMU for aarch64", "guest for x86_64", "API 0."):
        assert text in done.stdout


def test_check_of_an_empty_cache(tmp_path: Path) -> None:
    done = setup("--check", VIOMMU_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert done.stdout.count(" missing ") == len(list(parts()))
    assert "Run viommu setup" in done.stdout
    assert not (tmp_path / "cache").exists()


def test_nothing_to_do_says_nothing_and_writes_nothing() -> None:
    manifest = cache_directory() / "manifest.json"
    before = manifest.stat().st_mtime_ns
    done = setup()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert manifest.stat().st_mtime_ns == before


@pytest.fixture
def fresh_checkout(tmp_path: Path) -> Path:
    """The files that scripts/setup reads, without an environment."""
    checkout = tmp_path / "checkout"
    (checkout / "bindings").mkdir(parents=True)
    (checkout / "backend/viommu").mkdir(parents=True)
    for name in (
        "scripts/setup", "pyproject.toml", "setup.py", "bindings/pyproject.toml",
        "backend/viommu/hot_build.py",
    ):  # fmt: skip
        target = checkout / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target)
    return checkout


def test_fresh_checkout_with_a_cache_that_cannot_be_written(
    tmp_path: Path, fresh_checkout: Path
) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    done = setup(script=fresh_checkout / "scripts/setup", VIOMMU_CACHE=str(cache))
    assert done.returncode == 1
    assert done.stderr == (
        f"scripts/setup: the cache directory {cache} cannot be written: "
        "set VIOMMU_CACHE to a directory that you may write to\n"
    )


def test_host_without_a_new_enough_python(tmp_path: Path, fresh_checkout: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "env", "flock", "mkdir", "sha256sum"):
        (tools / name).symlink_to(shutil.which(name) or name)
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = setup(
        script=fresh_checkout / "scripts/setup", PATH=str(tools), VIOMMU_CACHE=str(tmp_path / "c")
    )
    assert done.returncode == 1
    assert done.stderr.startswith("scripts/setup: no Python ≥ 3.11 on PATH: install one")
    assert done.stderr.count("\n") == 1


def test_index_that_cannot_be_reached(tmp_path: Path, fresh_checkout: Path) -> None:
    done = setup(
        script=fresh_checkout / "scripts/setup",
        VIOMMU_CACHE=str(tmp_path / "cache"),
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="0",
        no_proxy="127.0.0.1",
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("scripts/setup: uv cannot be installed into")
