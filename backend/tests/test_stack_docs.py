"""docs/stacks.md: its table is the one that is tested, its commands work, its filter is one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import Run, home, printed, start, viommu
from tests.test_stack import STATES, TABLE
from viommu.endpoints.port import DmaAttributes
from viommu.smmu import Access
from viommu.stack import Abort, Filter, Request

__all__ = ["home", "viommu"]  # fixtures

TEXT = (Path(__file__).parents[2] / "docs/stacks.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert found
    return found[1]


def test_the_table_is_the_one_that_is_tested() -> None:
    rows = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ")]
    header, *body = rows
    states = ["has a filter" if state == "filtered" else state for state in STATES]
    assert [each.strip() for each in header] == states
    assert {call: tuple(row) for call, *row in body} == {
        call: tuple(status.name for status in statuses) for call, statuses in TABLE.items()
    }


def test_the_commands_work(viommu: Run, home: Path) -> None:
    with start("serve") as process:
        printed(process)
        said = []
        for line in block("sh").splitlines():
            program, *words = line.partition("#")[0].split()
            assert program == "viommu"
            outcome = viommu(*words, "--json")
            assert (outcome.code, outcome.err) == (0, ""), line
            said.append(json.loads(outcome.out))
        assert said[3] == {"status": "PENDING"}
        assert said[4][0]["references"] == {"trace": 1, "me (held)": 1}
        assert said[-1] == []
        assert sorted(path.name for path in home.rglob("*.sock")) == ["control.sock", "smmu.sock"]


def test_the_filter_is_one() -> None:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    read_only = names["ReadOnly"]()
    assert isinstance(read_only, Filter)
    attributes = DmaAttributes()
    with pytest.raises(Abort, match="read-only"):
        read_only.before_translation(Request(Access(16, None, write=True), 0x1000, 8, attributes))
    read_only.before_translation(Request(Access(16, None, write=False), 0x1000, 8, attributes))
    read_only.before_translation(Request(Access(16, None, write=True), 1 << 20, 8, attributes))
