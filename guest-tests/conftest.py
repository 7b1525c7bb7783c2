"""Guests for tests: plain ones, booted once a machine and shared between tests.

What a guest's console showed during a test is attached to the test's report when it fails.
"""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pytest
from linux_rig import LinuxRig, Ran, Result
from raw_rig import Case, RawCases

from viommu.lab.assets import Assets
from viommu.lab.config import Machine, load_machine, machine_directory
from viommu.lab.errors import LabError
from viommu.lab.guest import Guest
from viommu.lab.rig import Rig

MACHINES = ("aarch64-virt", "x86_64-q35")
INSIDE = Path(__file__).with_name("inside")

# The guests of a test, each with the length of its console's log when the test began.
GUESTS = pytest.StashKey[list[tuple[Guest, int]]]()


GUEST_OPTIONS = {
    "kernel": "a kernel image",
    "modules": "its lib/modules/<release>",
    "image": "a guest that `scripts/setup --guest` provided",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("guests")
    for name, what in GUEST_OPTIONS.items():
        group.addoption(
            f"--guest-{name}",
            default=os.environ.get(f"VIOMMU_GUEST_{name.upper()}"),
            help=f"{what}, for the tests of the guest's own SMMU driver",
        )
    group.addoption("--reboots", type=int, default=2, help="how often that guest reboots")


class Bootable(Protocol):
    """What a guest and a rig have in common."""

    @property
    def lost(self) -> bool: ...
    def start(self) -> None: ...
    def close(self) -> None: ...


Booted = TypeVar("Booted", bound=Bootable)


class Shared(Generic[Booted]):
    """A guest or a rig that lasts for many tests, and boots anew after one that broke it."""

    def __init__(self, make: Callable[[], Booted]) -> None:
        self._make = make
        self._booted: Booted | None = None

    def get(self) -> Booted:
        if self._booted is None or self._booted.lost:
            self.close()
            self._booted = self._make()
            self._booted.start()
        return self._booted

    def close(self) -> None:
        if self._booted is not None:
            self._booted.close()
            self._booted = None


@pytest.fixture(scope="session")
def assets() -> Assets:
    return Assets.load()


@pytest.fixture(scope="session", params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Machine:
    return load_machine(request.param)


@pytest.fixture(scope="session")
def shared_guest(machine: Machine, assets: Assets) -> Iterator[Shared[Guest]]:
    shared = Shared(lambda: Guest(machine, assets))
    yield shared
    shared.close()


@pytest.fixture(scope="session", params=MACHINES)
def shared_rig(request: pytest.FixtureRequest, assets: Assets) -> Iterator[Shared[Rig]]:
    shared = Shared(lambda: Rig(request.param, assets=assets, trace=True, scripts=INSIDE))
    yield shared
    shared.close()


@pytest.fixture
def rig(shared_rig: Shared[Rig], request: pytest.FixtureRequest) -> Rig:
    """A booted guest with the SMMU and the engines, which other tests have used and will use."""
    found = shared_rig.get()
    watch(request.node, found.guest)
    return found


@pytest.fixture(scope="module", params=MACHINES)
def shared_full_rig(
    request: pytest.FixtureRequest, assets: Assets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared[Rig]]:
    path = tmp_path_factory.mktemp("machine") / "machine.toml"
    path.write_text(with_profile(request.param, "endpoint_pasid = true\nvatos = true"), "utf-8")
    shared = Shared(lambda: Rig(path, assets=assets, scripts=INSIDE))
    yield shared
    shared.close()


@pytest.fixture
def full_rig(shared_full_rig: Shared[Rig], request: pytest.FixtureRequest) -> Rig:
    """The same with what no machine shows by default."""
    found = shared_full_rig.get()
    watch(request.node, found.guest)
    return found


def with_profile(machine: str, profile: str) -> str:
    """The TOML of a machine, with lines for its SMMU."""
    base = (machine_directory() / f"{machine}.toml").read_text("utf-8")
    return f"{base}\n[smmu]\n{profile}\n"


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
    named = {name: request.config.getoption(f"guest_{name}") for name in GUEST_OPTIONS}
    return {
        name: value if name == "image" else Path(value) for name, value in named.items() if value
    }


@pytest.fixture(scope="session")
def shared_linux(kernel: dict[str, Any], assets: Assets) -> Iterator[Shared[LinuxRig]]:
    shared = Shared(lambda: LinuxRig("aarch64-virt", assets, kernel))
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def profiles(
    kernel: dict[str, Any], assets: Assets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], LinuxRig]]:
    """A function that boots that guest on an SMMU with a line of TOML of its own, one at a time."""
    path = tmp_path_factory.mktemp("machine") / "machine.toml"
    shared: dict[str, Shared[LinuxRig]] = {}

    def get(profile: str) -> LinuxRig:
        if profile not in shared:
            close()
            path.write_text(with_profile("aarch64-virt", profile), "utf-8")
            shared[profile] = Shared(lambda: LinuxRig(path, assets, kernel))
        return shared[profile].get()

    def close() -> None:
        while shared:
            shared.popitem()[1].close()

    yield get
    close()


@pytest.fixture
def linux(shared_linux: Shared[LinuxRig], request: pytest.FixtureRequest) -> LinuxRig:
    """A booted guest whose own kernel drives the SMMU, which other tests have used and will use."""
    found = shared_linux.get()
    watch(request.node, found.rig.guest)
    return found


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


@pytest.fixture
def profiled(
    profiles: Callable[[str], LinuxRig], request: pytest.FixtureRequest
) -> Callable[[str], LinuxRig]:
    """The same on an SMMU with a line of TOML of its own."""

    def get(profile: str) -> LinuxRig:
        found = profiles(profile)
        watch(request.node, found.rig.guest)
        return found

    return get


@pytest.fixture
def guest(shared_guest: Shared[Guest], request: pytest.FixtureRequest) -> Guest:
    """A booted guest without devices, which other tests have used and will use."""
    found = shared_guest.get()
    watch(request.node, found)
    return found


@pytest.fixture
def new_guest(
    machine: Machine, assets: Assets, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Guest]]:
    """A function that makes a guest, not yet started, with the arguments of `Guest`."""
    with ExitStack() as guests:

        def make(**arguments: object) -> Guest:
            made = Guest(machine, assets, **arguments)  # type: ignore[arg-type]
            guests.callback(made.close)
            watch(request.node, made)
            return made

        yield make


def watch(item: pytest.Item, guest: Guest) -> None:
    item.stash.setdefault(GUESTS, []).append((guest, len(guest.console_log())))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for guest, start in item.stash.get(GUESTS, []):
            name = f"{guest.machine.arch} guest"
            report.sections.append((f"{name}: console", guest.console_log()[start:]))
            # A guest that is lost has said its last on the console.
            with suppress(LabError):
                report.sections.append((f"{name}: kernel log", guest.kernel_log()))
    return report
