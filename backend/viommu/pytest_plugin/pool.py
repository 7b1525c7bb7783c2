"""The guests of a worker: booted when a test wants one, kept for the next that wants the same."""

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from viommu.lab.assets import Assets, Qemu
from viommu.lab.config import load_machine, scripts_directory
from viommu.lab.disk import disk_arguments
from viommu.lab.errors import ConfigError
from viommu.lab.linux_smmu import find_smmu
from viommu.lab.overlay import python_files
from viommu.lab.provision.qemu import DEVICE, OLDEST, version_with_device
from viommu.lab.rig import Rig
from viommu.pytest_plugin.news import Newsroom
from viommu.pytest_plugin.options import GuestOptions

_PATIENCE = 5.0  # seconds for the server to say what it holds


class Booted:
    """A rig whose guest is up, and whether the ledger watches it. Who makes it unfit for another test says `dirty`."""

    def __init__(self, rig: Rig, *, ledger: bool) -> None:
        self.rig, self.ledger = rig, ledger
        self.newsroom = Newsroom(rig)
        self.dirty = False
        self.closed = False
        self.untold: Sequence[str] = ()
        """What the guest in whose place this one is did after its last test."""
        self._holdings = rig.serving.trace("ServerHolds")

    @property
    def usable(self) -> bool:
        """Whether another test can have it: nobody has left it dirty, and no DMA is on its way."""
        return not self.dirty and not self.rig.lost and self._at_rest()

    def _at_rest(self) -> bool:
        self._holdings.skip()
        self.rig.serving.report()
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            for holds in self._holdings.read():
                return not holds["in_flight"]
            time.sleep(0.005)
        return False

    def close(self) -> None:
        """End it."""
        self.closed = True
        self._holdings.close()
        self.newsroom.close()
        self.rig.close()


class Pool:
    """At most `limit` guests, ended in the order in which they were last asked for.

    QEMU can neither snapshot nor migrate a vfio-user device, so a guest that is not usable any more is booted anew.
    """

    def __init__(self, limit: int, assets: Callable[[str], Assets]) -> None:
        self._limit = limit
        self._assets = assets
        self._booted: dict[GuestOptions, Booted] = {}

    def get(self, options: GuestOptions) -> Booted:
        """A guest as `options` want it. What is raised when it does not boot is a `LabError`."""
        booted = self._booted.pop(options, None)
        untold: Sequence[str] = ()
        if booted is not None and not booted.usable:
            if booted.rig.lost and not booted.dirty:
                untold = booted.newsroom.ask().alarms
            booted.close()
            booted = None
        if booted is None:
            while len(self._booted) >= self._limit:
                self._booted.pop(next(iter(self._booted))).close()
            booted = _boot(options, self._assets(options.image))
            booted.untold = untold
        self._booted[options] = booted
        return booted

    def close(self) -> None:
        """End them all."""
        while self._booted:
            self._booted.popitem()[1].close()


def _boot(options: GuestOptions, assets: Assets) -> Booted:
    built = load_machine(options.machine, options.smmu)
    if options.qemu is not None:
        assets = assets.model_copy(update={"qemu": {built.arch: _emulator(options.qemu)}})
    more = shlex.split(options.qemu_arguments)
    if options.disk is not None:
        more += disk_arguments(built, options.disk)
    rig = Rig(
        options.machine,
        assets=assets,
        trace=True,
        smmu=options.smmu,
        seed=options.seed,
        ledger=options.ledger,
        faults=options.faults,
        linux_driver=not options.raw and find_smmu(built) is not None,
        scripts=scripts_directory(),
        extra_files=python_files(options.scripts) if options.scripts else None,
        image=options.image or None,
        kernel=options.kernel,
        initramfs=options.initramfs,
        modules=options.modules,
        command_line=options.append,
        qemu_arguments=more,
    )
    rig.start()
    return Booted(rig, ledger=options.ledger)


def _emulator(path: Path) -> Qemu:
    version = version_with_device([str(path)])
    if version is None:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"{path} is no QEMU ≥ {oldest} with {DEVICE}")
    return Qemu(argv=(str(path),), version=version, origin=str(path))
