"""Plans: what they accept, and what they say of what they do not."""

from pathlib import Path

import pytest

from viommu.faults.matching import EventPattern
from viommu.faults.plan import Plan, PlanError
from viommu.function import ClientAttached

GOOD = """
seed = 7

[[fault]]
at = "command-fetched"
when = { opcode = "CMD_TLBI_NH_ASID", nth = 2 }
do = "skip"

[[fault]]
name = "late"
at = "sync-completing"
do = { action = "hold", ms = 50 }

[[effect]]
on = { event = "CommandConsumed", opcode = "CMD_CFGI_STE" }
call = "smmu.service_failure"
"""


def test_a_plan_knows_the_line_of_each_rule(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(GOOD)
    plan = Plan.load(path)
    assert (plan.seed, plan.fault_lines, plan.effect_lines) == (7, (4, 9), (14,))
    assert [rule.do.action for rule in plan.fault] == ["skip", "hold"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            'at = "nowhere"\ndo = "skip"',
            "line 2: at: 'nowhere' is no point, allowed: dma-requested",
        ),
        (
            'at = "tlb-fill"\nwhen = { colour = 1 }\ndo = "skip"',
            "when.colour: tlb-fill has no such",
        ),
        ('at = "tlb-lookup"\ndo = "hold"', "do: tlb-lookup cannot 'hold', allowed: skip"),
        ('at = "tlb-lookup"\ndo = "explode"', "line 2: do: "),
        (
            'at = "transaction-arrived"\ndo = { action = "abort", code = "F_NONE" }',
            "code: 'F_NONE' is unknown, allowed: F_UUT",
        ),
        ('at = "tlb-lookup"\nwhen = { nth = 0 }\ndo = "skip"', "line 2: when.nth"),
        (
            'at = "command-fetched"\ndo = { action = "abort", code = "F_TRANSLATION" }',
            "do.code: 'F_TRANSLATION' is unknown, allowed: CERROR_ILL",
        ),
        (
            'at = "transaction-arrived"\ndo = { action = "abort", code = "CERROR_ABT" }',
            "do.code: 'CERROR_ABT' is unknown, allowed: F_UUT",
        ),
        (
            'at = "dma-requested"\ndo = { action = "abort", code = "UR" }',
            "do.code: 'UR' is unknown, allowed: none here",
        ),
        ('at = "tlb-lookup"', "line 2: do: Field required"),
        ('at = "tlb-lookup"\nwhen = { after = inf }\ndo = "skip"', "line 2: when.after"),
        ('at = "tlb-lookup"\nwhen = { after = nan }\ndo = "skip"', "line 2: when.after"),
        ('at = "tlb-lookup"\nwhen = { before = 1e306 }\ndo = "skip"', "line 2: when.before"),
        (
            'at = "tlb-lookup"\nwhen = { after = 2.0, before = 1.0 }\ndo = "skip"',
            "line 2: when: before: 1.0 is not after 2.0",
        ),
        (
            'at = "tlb-lookup"\nwhen = { nth = [5, 2] }\ndo = "skip"',
            "line 2: when: nth: [5, 2] is no range",
        ),
        (
            'at = "mmio-access"\nwhen = { size = [8, 4] }\ndo = "skip"',
            "line 2: when.size: [8, 4] is no row of names, nor a range",
        ),
        (
            'at = "mmio-access"\nwhen = { register = [0, 0x20] }\ndo = "skip"',
            "line 2: when.register: it is never [0, 32]",
        ),
        (
            'at = "mmio-access"\nwhen = { size = "4" }\ndo = "skip"',
            "line 2: when.size: it is never '4'",
        ),
        ('at = "tlb-lookup"\ndo = "skip"\nwhy = 1', "line 2: why: "),
    ],
)
def test_a_mistake_is_told_with_its_place(rule: str, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.parse(f"\n[[fault]]\n{rule}\n", "plan.toml")
    assert message in str(error.value)
    assert str(error.value).startswith("plan.toml, line 2: ")
    assert "\n" not in str(error.value)


def test_what_is_no_toml_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"not TOML: .*line 1"):
        Plan.parse("[[fault]", "plan.toml")
    with pytest.raises(PlanError, match="cannot be read: No such file"):
        Plan.load(tmp_path / "none.toml")
    with pytest.raises(PlanError, match="faults: "):
        Plan.parse("faults = []", "plan.toml")


@pytest.mark.parametrize(
    "when", ["probability = 0.5", "before = 1.0", "nth = 2", 'since = { event = "EngineEnded" }']
)
def test_an_effect_at_a_time_has_no_other_terms(when: str) -> None:
    with pytest.raises(
        PlanError, match=r"line 1: when\..*: without on it can only be after a time"
    ):
        Plan.parse(f'[[effect]]\nwhen = {{ {when} }}\ncall = "dma.state"\n')


def test_a_plan_in_a_plan() -> None:
    inner = '[[fault]]\nat = "tlb-lookup"\ndo = "skip"\n'
    outer = f'[[effect]]\ncall = "faults.load"\narguments.plan = """\n{inner}"""\n'
    plan = Plan.parse(f"{inner}\n{outer}")
    assert (plan.fault_lines, plan.effect_lines) == ((1,), (5,))
    assert plan.effect[0].arguments["plan"] == inner


def test_a_field_of_another_type_does_not_fit() -> None:
    pattern = EventPattern.model_validate({"event": "ClientAttached", "function": [1, 2]})
    assert not pattern.fits(ClientAttached("engine0"))
