"""The cache directory: whole parts only, one setup at a time, one sentence for each way it fails."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from viommu.lab.provision.cache import Cache, ProvisionError, recipe_key

BACKEND = Path(__file__).parents[1]


def python(script: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def without_capabilities(command: list[str]) -> list[str]:
    """Runs `command` bound by permissions, as root is not."""
    return ["setpriv", "--bounding-set=-all", *command] if os.geteuid() == 0 else command


def read_only_disk(mount_point: Path, command: list[str]) -> list[str]:
    """Runs `command` where `mount_point` is a file system that is mounted read-only."""
    return _mounted("-t tmpfs -o ro", mount_point, command)


def on_small_disk(mount_point: Path, kibibytes: int, command: list[str]) -> list[str]:
    """Runs `command` where `mount_point` is a file system of that size."""
    return _mounted(f"-t tmpfs -o size={kibibytes}k", mount_point, command)


def _mounted(options: str, mount_point: Path, command: list[str]) -> list[str]:
    script = f'mount {options} none "$1" && shift && exec "$@"'
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    return ["unshare", *user, "--mount", "sh", "-c", script, "sh", str(mount_point), *command]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(BACKEND), **environment},
    )


def test_key_depends_on_content_and_order(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    recipe.write_text("a")
    first = recipe_key(recipe, "x")
    assert first == recipe_key(recipe, "x")
    recipe.write_text("b")
    assert first != recipe_key(recipe, "x")
    assert recipe_key("ab", "c") != recipe_key("a", "bc")


def test_part_appears_when_it_is_whole(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "cache")
    with cache.locked(print), cache.building("part") as work:
        (work / "file").write_text("x")
        assert not (cache.directory / "part").exists()
    assert (cache.directory / "part" / "file").read_text() == "x"


def test_failed_part_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def build() -> None:
        with cache.locked(print), cache.building("part") as work:
            (work / "file").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_killed_build_is_removed_by_the_next_setup(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom viommu.lab.provision.cache import Cache\n"
        "cache = Cache(Path(sys.argv[1]))\n"
        "with cache.locked(print), cache.building('part') as work:\n"
        "    (work / 'file').touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert run(python(script, tmp_path)).returncode == -9
    assert list(tmp_path.glob(".building-*"))
    with Cache(tmp_path).locked(print):
        assert not list(tmp_path.glob(".building-*"))
    assert not (tmp_path / "part").exists()


def test_second_setup_waits_for_the_first(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom viommu.lab.provision.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).locked(lambda text: print(text, flush=True)):\n"
        "    print((Path(sys.argv[1]) / 'result').read_text())\n"
    )
    cache = Cache(tmp_path)
    with cache.locked(print):
        second = subprocess.Popen(
            python(script, tmp_path),
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(BACKEND)},
        )
        assert second.stdout is not None
        assert second.stdout.readline() == ("Waiting for another setup that uses the same cache\n")
        (tmp_path / "result").write_text("done by the first")
    output, _ = second.communicate(timeout=30)
    assert output == "done by the first\n"
    assert second.returncode == 0


@pytest.mark.parametrize("damage", ["", "{", "[]", "\0"])
def test_damaged_manifest_counts_as_empty(tmp_path: Path, damage: str) -> None:
    cache = Cache(tmp_path)
    cache.manifest_path.write_text(damage)
    assert cache.read_manifest() == {}


def test_manifest_round_trip(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write_manifest({"qemu": {"aarch64": {"argv": ["q"]}}})
    assert cache.read_manifest() == {"qemu": {"aarch64": {"argv": ["q"]}}}


def one_sentence(output: str) -> str:
    assert output.startswith("viommu setup: ")
    assert output.count("\n") == 1
    return output


PROVISION = [sys.executable, "-P", "-m", "viommu.lab.provision"]


def test_cache_without_permission_to_write(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    done = run(without_capabilities(PROVISION), VIOMMU_CACHE=str(cache))
    assert done.returncode == 1
    assert "cannot be written (Permission denied): set VIOMMU_CACHE" in one_sentence(done.stderr)


def test_cache_that_may_not_be_made(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o555)
    done = run(without_capabilities(PROVISION), VIOMMU_CACHE=str(parent / "cache"))
    assert done.returncode == 1
    assert "cannot be written (Permission denied): set VIOMMU_CACHE" in one_sentence(done.stderr)


def test_cache_on_a_read_only_disk(tmp_path: Path) -> None:
    done = run(read_only_disk(tmp_path, PROVISION), VIOMMU_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert "cannot be written (Read-only file system)" in one_sentence(done.stderr)


def test_cache_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(PROVISION, VIOMMU_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 1
    assert "cannot be used: Not a directory" in one_sentence(done.stderr)


def test_small_disk_is_noticed_before_the_download(tmp_path: Path) -> None:
    done = run(on_small_disk(tmp_path, 1024, PROVISION), VIOMMU_CACHE=str(tmp_path))
    assert done.returncode == 1
    assert "is full: reading the package lists needs 200 MiB" in one_sentence(done.stderr)


def test_disk_that_fills_up(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from viommu.lab.provision.cache import Cache, ProvisionError\n"
        "cache = Cache(Path(sys.argv[1]))\n"
        "try:\n"
        "    with cache.locked(print), cache.building('part') as work:\n"
        "        (work / 'file').write_bytes(bytes(2 << 20))\n"
        "except ProvisionError as error:\n"
        "    print(error, [path.name for path in cache.directory.iterdir()])\n"
    )
    done = run(on_small_disk(tmp_path, 1024, python(script, tmp_path)))
    assert done.stderr == ""
    assert done.stdout.startswith(f"The cache directory {tmp_path} is full: free some space there")
    assert done.stdout.endswith("['lock']\n")


def test_space_is_compared(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.require_space(1, "a byte")
    with pytest.raises(ProvisionError, match="is full: a lot needs 1099511627776 MiB"):
        cache.require_space(1 << 60, "a lot")


def test_other_errors_keep_their_reason(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="Input/output error"), Cache(tmp_path).locked(print):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
