"""The packages as a third party has them: installed into an environment of its own, with no checkout in sight."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from viommu.lab.assets import Assets, cache_directory

ROOT = Path(__file__).parents[1]
OURS = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTEST_ADDOPTS"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a virtual environment that has our two packages and what they require."""
    place = tmp_path_factory.mktemp("third-party") / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    install = [place / "bin/pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*map(str, install), ROOT / "bindings", ROOT], check=True, cwd=place)
    return place / "bin"


def run(place: Path, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(
        [program, *arguments],
        cwd=place,
        env=inherited | {"VIOMMU_CACHE": str(cache_directory())},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize(
    ("name", "count", "files", "lines"),
    [
        ("vfio-pci", 3, ["test_vfio_pci.py"], 30),
        ("custom-device", 5, ["copy_engine.py", "machine.toml", "test_copy_engine.py"], 110),
    ],
)
def test_an_example_runs_with_pytest_alone(
    environment: Path,
    tmp_path: Path,
    assets: Assets,
    name: str,
    count: int,
    files: list[str],
    lines: int,
) -> None:
    suite = shutil.copytree(ROOT / "examples" / name, tmp_path / "suite")
    done = run(suite, environment / "pytest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} passed" in done.stdout
    assert sum(len((suite / each).read_text("utf-8").splitlines()) for each in files) < lines


def test_nothing_is_taken_from_the_checkout(environment: Path, tmp_path: Path) -> None:
    ask = (
        "import viommu, vfio_user; from viommu.lab.config import *;"
        "print(viommu.__file__, vfio_user.__file__, machine_directory(), scripts_directory())"
    )
    done = run(tmp_path, environment / "python", "-c", ask)
    assert done.returncode == 0, done.stderr
    paths = [Path(path) for path in done.stdout.split()]
    assert all(path.exists() and path.is_relative_to(environment.parent) for path in paths)
    assert not any(path.is_symlink() for path in paths)


def test_setup_and_doctor_are_there(environment: Path, tmp_path: Path, assets: Assets) -> None:
    done = run(tmp_path, environment / "viommu", "setup")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "all of it is there"
    assert run(tmp_path, environment / "viommu", "doctor").returncode == 0
