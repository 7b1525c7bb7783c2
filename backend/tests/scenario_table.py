"""The table of `docs/scenarios.md`, from the files.

python -m tests.scenario_table     writes it anew     (in backend/)
"""

from pathlib import Path

from viommu.scenarios import Scenario, load_all

DOCUMENT = Path(__file__).parents[2] / "docs" / "scenarios.md"
BEGIN, END = "<!-- made by backend/tests/scenario_table.py -->\n", "<!-- end -->\n"
_FILES = "../backend/viommu/scenarios/library"


def table() -> str:
    rows = [
        "| scenario | bug class | driver | the ledger | the public met it |",
        "|---|---|---|---|---|",
        *(_row(each) for each in sorted(load_all(), key=lambda each: each.name)),
    ]
    return "\n".join(rows) + "\n"


def _row(scenario: Scenario) -> str:
    ledger = scenario.expect.ledger
    says = ", ".join([ledger.verdict, *ledger.finds])
    references = "; ".join(f"[{each.what}]({each.url})" for each in scenario.references)
    name = f"[{scenario.name}]({_FILES}/{scenario.name}.toml)"
    return f"| {name} | {scenario.bug_class} | {scenario.driver} | {says} | {references} |"


def written() -> str:
    """The document, with the table as it must be."""
    before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    DOCUMENT.write_text(written(), "utf-8")
