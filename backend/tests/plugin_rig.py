"""The pytest plugin with servers that are real and a guest that says what a test lets it say."""

import re
from typing import Any

import pytest

from viommu.lab.assets import cache_directory
from viommu.lab.config import Machine, load_machine
from viommu.lab.guest import CommandResult
from viommu.lab.serving import Serving
from viommu.pytest_plugin import assets, pool
from viommu.pytest_plugin.options import GuestOptions

CACHE = cache_directory()  # pytester gives each test a home of its own


class Guest:
    """In place of QEMU: a kernel's log, and a console."""

    command_line = ("qemu",)
    lost = False

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.console = ""
        self._log: list[str] = []

    def say(self, message: str) -> None:
        """A message of its kernel."""
        self._log.append(message)

    def console_log(self) -> str:
        return self.console

    def run(self, command: str) -> CommandResult:
        """Answers what `Newsroom` asks, and nothing else."""
        asked = re.search(r"\$2 \+ 0 > ([-.\d]+)", command)
        assert asked is not None
        lines = [f"[{number:12.6f}] {message}" for number, message in enumerate(self._log)]
        new = [line for number, line in enumerate(lines) if number > float(asked[1])]
        return CommandResult("\n".join(["boot-1", "0", *new]), 0)


class Rig:
    """As `viommu.lab.rig.Rig`, with that guest."""

    def __init__(self, options: GuestOptions) -> None:
        self.machine = load_machine(options.machine, options.smmu)
        self.serving = Serving(options.machine, trace=True, ledger=options.ledger)
        self.guest = Guest(self.machine)

    @property
    def lost(self) -> bool:
        return self.serving.exit_code is not None

    def close(self) -> None:
        self.serving.close()


@pytest.fixture
def guests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A pytester whose tests have such guests."""

    def boot(options: GuestOptions, _: object) -> pool.Booted:
        rig: Any = Rig(options)
        return pool.Booted(rig, ledger=options.ledger)

    monkeypatch.setenv("VIOMMU_CACHE", str(CACHE))
    monkeypatch.setattr(pool, "_boot", boot)
    monkeypatch.setattr(assets, "provided", lambda *_: None)
    return pytester
