"""The pytest plugin `viommu`: guests behind an IOMMU as fixtures, and a test fails when its guest misbehaves.

docs/pytest.md tells how it is used. Every pytest of an environment with viommu loads this file, so it imports the lab
only when a test wants a guest.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from viommu.pytest_plugin.options import GuestOptions, RunOptions, changed, chosen, declare

if TYPE_CHECKING:
    from viommu.control import ControlClient
    from viommu.lab.config import Device
    from viommu.lab.guest import Guest
    from viommu.lab.rig import Rig
    from viommu.pytest_plugin.lab import Lab
    from viommu.pytest_plugin.pool import Pool
    from viommu.pytest_plugin.views import Account, Faults, Smmu

_POOL = pytest.StashKey["Pool"]()
_GUEST = pytest.StashKey[GuestOptions]()
_RUN = pytest.StashKey[RunOptions]()
_LAB = pytest.StashKey["Lab"]()

_MARKERS = (
    "viommu(**options, dirty=False): the guest of the test, by the options of viommu; a dirty one is for no other test",
    "viommu_allow(*patterns): what the guest or its SMMU may do that would else fail the test, by regular expressions",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    declare(parser)


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    config.stash[_GUEST], config.stash[_RUN] = (
        chosen(config, GuestOptions),
        chosen(config, RunOptions),
    )
    if (folder := config.stash[_RUN].artifacts) is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise pytest.UsageError(
                f"--viommu-artifacts: {folder} cannot be made: {error.strerror}"
            ) from None


# The fixtures


@pytest.fixture
def viommu_lab(request: pytest.FixtureRequest) -> "Lab":
    """Makes guests for the test, and says what of their doings is foreseen."""
    from viommu.pytest_plugin.lab import Lab

    item = request.node
    base = request.config.stash[_GUEST]
    marked: dict[str, Any] = {}
    for marker in reversed(list(item.iter_markers("viommu"))):
        marked |= marker.kwargs
    if "viommu_ledger" in request.fixturenames:
        marked["ledger"] = True
    dirty = marked.pop("dirty", False)
    allowed = [pattern for marker in item.iter_markers("viommu_allow") for pattern in marker.args]
    pool = _pool(request.config)
    lab = Lab(lambda options: pool.get(changed(base, marked | options, item.path.parent)), allowed)
    if dirty:
        lab.soil()
    item.stash[_LAB] = lab
    return lab


@pytest.fixture
def viommu_rig(viommu_lab: "Lab") -> "Rig":
    """A machine with its devices served and its guest up, which other tests may have used and may use."""
    return viommu_lab.rig()


@pytest.fixture
def viommu_guest(viommu_rig: "Rig") -> "Guest":
    """The guest of `viommu_rig`: runs commands, takes files, and talks to its QEMU."""
    return viommu_rig.guest


@pytest.fixture
def viommu_endpoints(viommu_rig: "Rig") -> "Sequence[Device]":
    """The DMA masters of `viommu_rig`: their names, slots and StreamIDs."""
    return [device for device in viommu_rig.machine.devices if device.model != "smmuv3"]


@pytest.fixture
def viommu_smmu(viommu_rig: "Rig") -> "Iterator[Smmu]":
    """The SMMU of `viommu_rig`: what it does from here on."""
    from viommu.pytest_plugin.views import Smmu

    (device,) = [device for device in viommu_rig.machine.devices if device.model == "smmuv3"]
    with viommu_rig.serving.trace() as trace:
        yield Smmu(device, trace)


@pytest.fixture
def viommu_control(viommu_rig: "Rig") -> "ControlClient":
    """The control socket of `viommu_rig`'s server: device stacks, host domains. Closed with the server."""
    return viommu_rig.serving.control


@pytest.fixture
def viommu_ledger(viommu_rig: "Rig") -> "Iterator[Account]":
    """What the ledger says of the detaches in `viommu_rig`, from here on."""
    from viommu.pytest_plugin.views import Account

    with Account(viommu_rig.serving.trace()) as account:
        yield account


@pytest.fixture
def viommu_faults(viommu_lab: "Lab", viommu_control: "ControlClient") -> "Iterator[Faults]":
    """Plans of what goes wrong on purpose in `viommu_rig`, until the test ends."""
    from viommu.control import ControlLost
    from viommu.pytest_plugin.views import Faults

    yield Faults(viommu_control, viommu_lab.soil)
    with suppress(ControlLost):  # the plan may have ended the server, and the pool the guest
        viommu_control.call("faults.clear")


def _pool(config: pytest.Config) -> "Pool":
    """The guests of this process."""
    from viommu.pytest_plugin.assets import provided
    from viommu.pytest_plugin.pool import Pool

    if _POOL not in config.stash:
        pool = Pool(config.stash[_RUN].guests, lambda image: provided(config, image))
        config.stash[_POOL] = pool
        config.add_cleanup(pool.close)
    return config.stash[_POOL]


# The verdict


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A body that has passed is not the end of it."""
    fails_for_it = False
    try:
        yield
        fails_for_it = not item.config.stash[_RUN].keep_going
    finally:
        lab = item.stash.get(_LAB, None)
        unforeseen = "\n".join(lab.unforeseen()) if lab is not None else ""
        if unforeseen and not fails_for_it:
            item.add_report_section("call", "viommu", unforeseen)
    if unforeseen and fails_for_it:
        pytest.fail(f"the guest did what the test does not foresee:\n{unforeseen}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    lab = item.stash.get(_LAB, None)
    if report.failed and lab is not None:
        # What is told here is not told of the guest's next test.
        told = [("viommu", "\n".join(lab.unforeseen()))] if report.when == "setup" else []
        report.sections += [(title, text) for title, text in (*told, *lab.sections()) if text]
        if (folder := item.config.stash[_RUN].artifacts) is not None:
            from viommu.pytest_plugin.artifacts import keep

            try:
                kept = str(keep(folder, item.nodeid, lab))
            except OSError as error:  # a full disk ends no session
                kept = f"not kept: {error}"
            report.sections.append(("viommu: artifacts", kept))
    if report.when == "teardown" and lab is not None:
        lab.leave()
    return report
