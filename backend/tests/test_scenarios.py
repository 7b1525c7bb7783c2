import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.scenario_table import DOCUMENT, written
from viommu.cli import app
from viommu.ledger import Finding, Severity, Verdict
from viommu.scenarios import Scenario, ScenarioError, load_all
from viommu.scenarios.expectation import Expectation, Found

PATH = Path("some/where.toml")
GOOD = """# A comment.
title = "t"
shows = "s"
bug_class = "b"
references = [{ what = "w", url = "https://example.org/x" }]
script = '''
facts = {
[1]: 2}
'''

[[fault]]
at = "sync-completing"
do = "skip"

[expect]
ledger = { verdict = "clean" }

[[effect]]
call = "smmu.reset"
[effect.on]
event = "EngineEnded"
"""
WANTED = (
    "dma in flight at detach", "dma after detach", "missing tlb invalidation", "late tlb invalidation",
    "stale iotlb entry with page reuse", "stall queued at detach", "atc invalidation time-out",
    "event queue overflow that is never acknowledged", "fault storm", "torn ste update", "cd cleared live",
    "sync completions out of order", "the end of an invalidation is lost", "command queue error in mid-batch",
    "gbpa aborts", "gbpa bypasses", "pri response lost", "interrupt lost at completion",
    "surprise removal under load", "deferred flush (dma-fq)",
)  # fmt: skip


def parse(text: str) -> Scenario:
    return Scenario.parse(text, PATH)


def test_every_bug_class_that_was_wanted_is_there() -> None:
    classes = " | ".join(each.bug_class.lower() for each in load_all())
    assert [wanted for wanted in WANTED if wanted not in classes] == []


def test_a_scenario_has_the_name_of_its_file() -> None:
    assert parse(GOOD).name == "where"


def test_the_plan_keeps_its_lines_and_nothing_else() -> None:
    plan = parse(GOOD).plan(7).splitlines()
    assert plan[0] == "seed = 7"
    kept = {number: line for number, line in enumerate(plan, 1) if line and number > 1}
    assert kept == {
        11: "[[fault]]",
        12: 'at = "sync-completing"',
        13: 'do = "skip"',
        18: "[[effect]]",
        19: 'call = "smmu.reset"',
        20: "[effect.on]",
        21: 'event = "EngineEnded"',
    }


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("title = ", "titel = ", "title: Field required"),
        ("https://example.org/x", "example", "references.0.url: String should match"),
        ('[{ what = "w", url = "https://example.org/x" }]', "[]", "references: Tuple should have"),
        ('"sync-completing"', '"nowhere"', "line 11: at: 'nowhere' is no point, allowed:"),
        ('call = "smmu.reset"', "", "line 18: call: Field required"),
        ("[expect]", "[expect]\nlog = ['(']", r"expect.log: '\(' is no regular expression"),
        ('"clean"', '"fine"', "expect.ledger.verdict: Input should be 'clean'"),
        ("[expect]", "[expect]\nwithin = 1000", "expect.within: Input should be less"),
        ('shows = "s"', 'shows = "s"\ndriver = "raw"', "why_raw: a scenario whose driver is raw"),
        ("[expect]", "[expect", "not TOML: .* line 15"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    with pytest.raises(ScenarioError, match=rf"^some/where.toml(: |, ){sentence}"):
        parse(GOOD.replace(old, new, 1))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ScenarioError, match=r"where.toml: cannot be read: No such file"):
        Scenario.load(PATH)


# Judging

EXPECTED = Expectation.model_validate(
    {
        "facts": {"status": "ERROR", "seconds": [1, 2.5]},
        "log": ["time-?out"],
        "log_not": ["event"],
        "event": [
            {"kind": "EventRecorded", "event": ["F_TRANSLATION", "F_ACCESS"], "times": [1, 2]},
            {"kind": "SyncCompleted"},
            {"kind": "EventLost", "times": 0},
        ],
        "ledger": {"verdict": "violated", "finds": ["page-reuse"]},
    }
)
RECORDED = {"kind": "EventRecorded", "event": "F_ACCESS"}
SYNCED = {"kind": "SyncCompleted"}
REUSE = Finding(Severity.VIOLATION, "page-reuse", "…")


def found(**changes: Any) -> Found:
    whole: dict[str, Any] = {
        "facts": {"status": "ERROR", "seconds": 2, "other": 1},
        "log": ["smmu: CMD_SYNC timeout"],
        "events": [RECORDED, SYNCED],
        "plan": [{"line": 3, "at": "tlb-fill", "does": "skip", "count": 1}],
        "verdict": Verdict((REUSE,), (), 2, True),
    }
    return Found(**whole | changes)


def test_what_is_as_expected() -> None:
    assert EXPECTED.unmet(found()) == []


@pytest.mark.parametrize(
    ("changes", "unmet"),
    [
        ({"facts": {"seconds": 1}}, "the guest did not say status"),
        ({"facts": {"status": "ERROR", "seconds": 3}}, "seconds is 3, not 1 to 2.5"),
        ({"facts": {"status": "HALTED", "seconds": 1}}, "status is 'HALTED', not 'ERROR'"),
        ({"log": []}, "the kernel did not say: time-?out"),
        ({"log": ["time-out", "event 0x10"]}, "the kernel said: event 0x10"),
        ({"log": ["time-out", "WARNING: CPU: 0"]}, "the kernel said: WARNING: CPU: 0"),
        ({"events": [RECORDED]}, "there is no event SyncCompleted()"),
        (
            {"events": [SYNCED, *[RECORDED] * 3]},
            "there are 3 events EventRecorded(event=['F_TRANSLATION', 'F_ACCESS']), not 1 to 2",
        ),
        ({"events": [RECORDED, SYNCED, {"kind": "EventLost"}]}, "there are 1 events EventLost(), not 0"),
        (
            {"plan": [{"line": 3, "at": "tlb-fill", "does": "skip", "count": 0}]},
            "line 3 of the plan, skip at tlb-fill, never happened",
        ),
        ({"verdict": Verdict((), (), 2, True)}, "the ledger does not find page-reuse, but nothing"),
    ],
)  # fmt: skip
def test_what_is_not(changes: dict[str, Any], unmet: str) -> None:
    assert EXPECTED.unmet(found(**changes))[0] == unmet


def test_a_verdict_that_is_another() -> None:
    note = Finding(Severity.NOTE, "page-reuse", "…")
    assert EXPECTED.unmet(found(verdict=Verdict((note,), (), 2, True))) == [
        "the ledger says clean, not violated"
    ]


# What people see


def test_the_document_is_as_the_files() -> None:
    assert DOCUMENT.read_text("utf-8") == written(), (
        "run python -m tests.scenario_table in backend/"
    )


def test_the_scenario_of_the_document_is_one() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert parse(text).expect.log == ("CMD_SYNC timeout",)


def test_list() -> None:
    listed = CliRunner().invoke(app, ["scenario", "list"]).output
    assert all(each.name in listed for each in load_all())


def test_a_name_that_there_is_not() -> None:
    result = CliRunner().invoke(app, ["scenario", "run", "nothing"])
    assert result.exit_code == 1
    assert "there is no scenario 'nothing', but atc-timeout, " in result.output
