"""Each scenario on a real guest, by the runner of `viommu scenario run`."""

from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from viommu.cli.scenario import show
from viommu.lab.assets import Assets
from viommu.scenarios import Outcome, Runner, Scenario, load_all
from viommu.scenarios.scenario import LIBRARY


@pytest.fixture(scope="module")
def runner(assets: Assets, kernel: dict[str, Any]) -> Iterator[Runner]:
    with Runner(assets, kernel) as found:
        yield found


@pytest.mark.parametrize("scenario", load_all(), ids=lambda each: each.name)
def test_a_healthy_kernel_comes_through(scenario: Scenario, runner: Runner) -> None:
    outcome = runner.run(scenario)
    assert outcome.passed, story(outcome)


def test_what_comes_out_otherwise_fails_and_says_how_to_replay_it(runner: Runner) -> None:
    path = LIBRARY / "sync-lost.toml"
    text = path.read_text("utf-8").replace('before = "HALTED"', 'before = "ERROR"')
    outcome = runner.run(Scenario.parse(text, path), seed=5)
    assert outcome.unmet == ["before is 'HALTED', not 'ERROR'"]
    told = story(outcome)
    assert "FAIL sync-lost" in told
    assert "viommu scenario run sync-lost --seed 5" in told
    assert runner.stage is None


def story(outcome: Outcome) -> str:
    text = StringIO()
    show(Console(file=text, width=120), outcome)
    return "\n".join([*outcome.unmet, text.getvalue()])
