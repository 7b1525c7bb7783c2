"""Runs scenarios on real guests, and keeps a guest for the next one where that can be."""

import json
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from viommu.closing import Closing
from viommu.control import ControlError
from viommu.lab.assets import Assets
from viommu.lab.config import machine_directory, scripts_directory
from viommu.lab.errors import LabError
from viommu.lab.rig import Rig
from viommu.ledger import Ledger, Verdict
from viommu.scenarios.expectation import NEVER, Found
from viommu.scenarios.scenario import Scenario
from viommu.trace_file import TraceReader

_SCRIPT = "/run/script.py"
_INJECTIONS = ("FaultInjected", "EffectCalled")
_POLL = 0.3  # seconds

Event = dict[str, Any]


@dataclass
class Outcome:
    """What came of a scenario. It passed when nothing is `unmet`."""

    scenario: Scenario
    seed: int
    steps: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    injections: list[Event] = field(default_factory=list)
    verdict: Verdict | None = None
    unmet: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Everything was as expected."""
        return not self.unmet

    @property
    def told(self) -> list[str]:
        """The lines of the kernel's log that are about the SMMU or the devices, or that were expected."""
        wanted = re.compile("|".join(["smmu", "iommu", "vfio", *self.scenario.expect.log]))
        return [line for line in self.log if wanted.search(line) or NEVER.search(line)]

    @property
    def replay(self) -> str:
        """The command that runs it again."""
        return f"viommu scenario run {self.scenario.name} --seed {self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "scenario": self.scenario.name,
            "verdict": "pass" if self.passed else "fail",
            "unmet": self.unmet,
            "seed": self.seed,
            "replay": self.replay,
            "seconds": round(self.seconds, 1),
            "steps": self.steps,
            "facts": self.facts,
            "kernel_log": self.log,
            "injections": self.injections,
            "ledger": None if self.verdict is None else self.verdict.as_dict(),
        }


class Stage:
    """A booted guest for scenarios that are alike in machine, SMMU and driver."""

    def __init__(
        self, scenario: Scenario, assets: Assets, seed: int, guest: Mapping[str, Any]
    ) -> None:
        self.key = _key(scenario, seed)
        self._open = ExitStack()
        directory = Path(self._open.enter_context(TemporaryDirectory(prefix="viommu-")))
        self.rig = Rig(
            _machine(scenario, directory),
            assets=assets,
            ledger=True,
            seed=seed,
            linux_driver=scenario.driver == "linux",
            scripts=scripts_directory(),
            **guest,
        )
        self._open.callback(self.rig.close)
        try:
            self.rig.start()
            self._trace: TraceReader = self._open.enter_context(self.rig.serving.trace())
            if scenario.driver == "linux":
                self.rig.guest.check("modprobe vfio_iommu_type1")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End guest and server."""
        self._open.close()

    def play(self, scenario: Scenario, seed: int) -> Outcome:
        """Run `scenario` here."""
        outcome = Outcome(scenario, seed)
        started = time.monotonic()
        self._trace.read()
        events: list[Event] = []
        ledger = Ledger()
        self._mark()
        try:
            self.rig.serving.control.call("faults.load", plan=scenario.plan(seed))
            for number, script in enumerate(scenario.script):
                if number:
                    outcome.log += self._log()
                    outcome.steps.append("the machine is reset, and the guest boots anew")
                    self.rig.reboot(hard=True)
                self._run(script, outcome, scenario.expect.within)
            before = list(outcome.log)
            deadline = time.monotonic() + scenario.expect.settle
            while True:
                self._look(outcome, before, events, ledger)
                if outcome.passed or time.monotonic() > deadline:
                    break
                time.sleep(_POLL)
            self.rig.serving.control.call("faults.clear")
        except LabError as error:
            outcome.unmet.append(error.message)
        except ControlError as error:
            outcome.unmet.append(str(error))
        outcome.seconds = time.monotonic() - started
        return outcome

    def _run(self, script: str, outcome: Outcome, limit: float) -> None:
        guest = self.rig.guest
        guest.put(_SCRIPT, script.encode())
        before = len(guest.console_log())
        try:
            ran = guest.run(f"PYTHONPATH=/viommu:/viommu/inside exec python3 {_SCRIPT}", limit)
        finally:  # what it had said when it got stuck, too
            for line in guest.console_log()[before:].splitlines():
                if line.startswith('{"step"'):
                    said = json.loads(line)
                    facts = ", ".join(f"{name}={value}" for name, value in said["facts"].items())
                    outcome.steps.append(f"{said['step']}{facts and f' ({facts})'}")
                    outcome.facts |= said["facts"]
        if ran.status:
            last = (ran.output.strip().splitlines() or ["it said nothing"])[-1]
            raise LabError(f"the script in the guest failed: {last}")

    def _look(
        self, outcome: Outcome, before: list[str], events: list[Event], ledger: Ledger
    ) -> None:
        """What there is by now."""
        for event in self._trace.read():
            events.append(event)
            ledger.read(event)
        plan = self.rig.serving.control.call("faults.list")
        outcome.log = before + self._log()
        outcome.injections = [event for event in events if event["kind"] in _INJECTIONS]
        outcome.verdict = ledger.verdict()
        found = Found(outcome.facts, outcome.log, events, plan, outcome.verdict)
        outcome.unmet = outcome.scenario.expect.unmet(found)

    def _mark(self) -> None:
        """The kernel's log begins here."""
        self.rig.guest.check("dmesg -c > /dev/null")

    def _log(self) -> list[str]:
        return [
            line.partition("] ")[2] or line for line in self.rig.guest.check("dmesg").splitlines()
        ]


class Runner(Closing):
    """Has at most one guest at a time. `guest` are arguments of `Guest`: another kernel, for one."""

    def __init__(
        self, assets: Assets | None = None, guest: Mapping[str, Any] | None = None
    ) -> None:
        self._assets = assets or Assets.load()
        self._guest = dict(guest or {})
        self._stage: Stage | None = None

    @property
    def stage(self) -> Stage | None:
        """Where the last scenario ran, while that lasts."""
        return self._stage

    def run(self, scenario: Scenario, seed: int | None = None, *, keep: bool = False) -> Outcome:
        """Run one; `seed` is that of the file unless it is given. With `keep` the guest stays, whatever became of it.

        Raises `LabError` when no guest comes up.
        """
        seed = scenario.seed if seed is None else seed
        if self._stage is None or self._stage.key != _key(scenario, seed):
            self.close()
            self._stage = Stage(scenario, self._assets, seed, self._guest)
        outcome = self._stage.play(scenario, seed)
        if not keep and (scenario.spoils or not outcome.passed):
            self.close()
        return outcome

    def close(self) -> None:
        """End the guest."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None


def _key(scenario: Scenario, seed: int) -> object:
    return scenario.machine, scenario.driver, repr(scenario.smmu), scenario.kernel_ats, seed


def _machine(scenario: Scenario, directory: Path) -> str | Path:
    """The machine with the SMMU that the scenario asks for, as a file in `directory`."""
    if not scenario.smmu and not scenario.kernel_ats:
        return scenario.machine
    text = (machine_directory() / f"{scenario.machine}.toml").read_text(encoding="utf-8")
    lines = [f"{key} = {json.dumps(value)}" for key, value in scenario.smmu.items()]
    first = f"kernel_ats = {json.dumps(scenario.kernel_ats)}"
    path = directory / "machine.toml"
    path.write_text("\n".join([first, text, "[smmu]", *lines, ""]), encoding="utf-8")
    return path
