"""Every action that makes sense at a point is shown by a test, and `docs/faults.md` says by which."""

import pytest

from tests.faults_matrix import DOCUMENT, sensible_pairs, shown_pairs, written
from viommu.faults.actions import ACTIONS, action_name
from viommu.faults.plan import Plan
from viommu.faults.registry import POINTS


def test_every_pair_is_shown() -> None:
    assert sensible_pairs() - shown_pairs().keys() == set()


def test_nothing_is_shown_that_cannot_be_planned() -> None:
    assert shown_pairs().keys() - sensible_pairs() == set()


def test_the_document_is_as_the_code() -> None:
    assert DOCUMENT.read_text("utf-8") == written(), "run python -m tests.faults_matrix in backend/"


@pytest.mark.parametrize("name", sorted({action_name(action) for action in ACTIONS}))
def test_every_action_is_explained(name: str) -> None:
    assert f"| `{name}` |" in DOCUMENT.read_text("utf-8").partition("## Points")[0]


def test_the_plan_of_the_document_is_one() -> None:
    _, _, rest = DOCUMENT.read_text("utf-8").partition("```toml\n")
    text, _, _ = rest.partition("```")
    plan = Plan.parse(text)
    assert len(plan.fault) >= 3
    assert plan.effect
    assert all(rule.at in POINTS for rule in plan.fault)
