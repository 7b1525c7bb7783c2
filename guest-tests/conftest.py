"""Guests for our own tests, by the plugin that we ship: see docs/pytest.md."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from linux_rig import DOMAINS, LinuxRig, Ran, Result
from raw_rig import Case, RawCases

from viommu.lab.assets import Assets
from viommu.lab.config import Machine, load_machine, machine_directory, scripts_directory
from viommu.lab.guest import Guest
from viommu.lab.rig import Rig
from viommu.pytest_plugin.lab import Lab
from viommu.pytest_plugin.options import GuestOptions, chosen

INSIDE = scripts_directory()
MACHINES = ("aarch64-virt", "x86_64-q35")
# What no machine shows by default.
FULL = "endpoint_pasid = true\nvatos = true"
# Faults are what most of these tests are about, and each judges the records that it sees itself.
FAULTS = "^SMMU "


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reboots", type=int, default=2, help="how often a guest reboots")


@pytest.fixture(scope="session")
def assets() -> Assets:
    return Assets.load()


@pytest.fixture(scope="session", params=MACHINES)
def machine_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where runs keep their directories, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vc-", dir="/tmp") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        monkeypatch.setenv("TMPDIR", path)
        yield Path(path)


@pytest.fixture
def machine(machine_name: str) -> Machine:
    return load_machine(machine_name)


# Without an SMMU


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the machines without their devices."""
    folder = tmp_path_factory.mktemp("bare")
    for path in machine_directory().glob("*.toml"):
        (folder / path.name).write_text(path.read_text("utf-8").partition("[[devices]]")[0])
    return folder


@pytest.fixture
def guest(machine_name: str, bare: Path, viommu_lab: Lab) -> Guest:
    """A booted guest without devices, which other tests have used and will use."""
    return viommu_lab.rig(machine=bare / f"{machine_name}.toml").guest


@pytest.fixture
def new_guest(machine: Machine, assets: Assets, viommu_lab: Lab) -> Iterator[Callable[..., Guest]]:
    """A function that makes a guest, not yet started, with the arguments of `Guest`."""
    with ExitStack() as guests:

        def make(**arguments: object) -> Guest:
            made = Guest(machine, assets, **arguments)  # type: ignore[arg-type]
            guests.callback(made.close)
            viommu_lab.watch(made)
            return made

        yield make


# With an SMMU that scripts drive


@pytest.fixture
def rig(viommu_lab: Lab, machine_name: str) -> Rig:
    """A booted guest with the SMMU and the engines, which other tests have used and will use."""
    viommu_lab.allow(FAULTS)
    return viommu_lab.rig(machine=machine_name, raw=True)


@pytest.fixture
def full_rig(viommu_lab: Lab, machine_name: str) -> Rig:
    """The same with what no machine shows by default."""
    viommu_lab.allow(FAULTS)
    return viommu_lab.rig(machine=machine_name, raw=True, smmu=FULL)


# With an SMMU that the guest's own kernel drives


@pytest.fixture(scope="session")
def linux_rigs() -> Iterator[dict[int, LinuxRig]]:
    """By the guest's process."""
    made: dict[int, LinuxRig] = {}
    yield made
    for each in made.values():
        each.close()


@pytest.fixture
def profiled(viommu_lab: Lab, linux_rigs: dict[int, LinuxRig]) -> Callable[..., LinuxRig]:
    """Such a guest on an SMMU with a line of TOML of its own, and other options of the plugin."""
    viommu_lab.allow(FAULTS)

    def get(profile: str, **options: Any) -> LinuxRig:
        rig = viommu_lab.rig(smmu=profile, append=DOMAINS, **options)
        if rig.guest.pid not in linux_rigs:
            linux_rigs[rig.guest.pid] = LinuxRig(rig)
        return linux_rigs[rig.guest.pid]

    return get


@pytest.fixture
def linux(profiled: Callable[[str], LinuxRig]) -> LinuxRig:
    """Such a guest on the SMMU as it is, which other tests have used and will use."""
    return profiled("")


@pytest.fixture(scope="session")
def raw_cases() -> RawCases:
    return RawCases()


@pytest.fixture
def raw_case(rig: Rig, raw_cases: RawCases) -> Case:
    """The result of `group/name` of `inside/raw.py`."""
    return lambda name: raw_cases.get(rig, name)


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The kernel that the user gave, as arguments of `Guest`; empty for the guest's own."""
    named = asdict(chosen(request.config, GuestOptions))
    return {name: named[name] for name in ("kernel", "modules", "image") if named[name]}


@pytest.fixture(scope="session")
def ran() -> dict[tuple[int, str], Ran]:
    """By the guest's process and the group."""
    return {}


@pytest.fixture
def group(linux: LinuxRig, ran: dict[tuple[int, str], Ran]) -> Callable[[str], Ran]:
    """Runs a group as a whole when it is asked for first."""

    def run(name: str) -> Ran:
        key = linux.rig.guest.pid, name
        if key not in ran:
            results: list[Result] = []
            events = linux.events_of(lambda: results.extend(linux.cases(name)))
            ran[key] = Ran({each["case"]: each for each in results}, events)
        return ran[key]

    return run


@pytest.fixture
def case(group: Callable[[str], Ran]) -> Callable[[str], Result]:
    """The result of `group/name`."""

    def result(name: str) -> Result:
        results = group(name.split("/")[0]).results
        failed = [each["error"] for each in results.values() if "error" in each]
        assert name in results, f"the guest did not come to {name}: {failed}"
        assert "error" not in results[name], results[name]["error"]
        return results[name]

    return result
