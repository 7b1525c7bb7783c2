"""docs/control.md: its table is what can be called, and its commands work."""

import re
from pathlib import Path

from tests.server_rig import FUNCTIONS
from tests.test_cli import Run, home, printed, start, viommu
from tests.test_server import directory
from viommu.server import Server

__all__ = ["directory", "home", "viommu"]  # fixtures

TEXT = (Path(__file__).parents[2] / "docs/control.md").read_text("utf-8")


def test_the_table_is_what_can_be_called(directory: Path) -> None:
    with Server(FUNCTIONS, directory, control=directory / "control.sock") as server:
        described = server.methods.describe()
    wanted = []
    for method in described:
        parameters = " ".join(f"`{each}`" for each in method["parameters"])
        wanted.append(f"| `{method['name']}` | {parameters} | {method['does']} |")
    assert [line for line in TEXT.splitlines() if line.startswith("| `")] == wanted


def test_the_commands_work(viommu: Run, home: Path) -> None:
    *calls, follow = re.findall(r"^viommu (.*?) *(?:\||#|$)", TEXT, re.MULTILINE)
    assert len(calls) == 3
    assert follow.startswith("ctl events")
    with start("serve") as process:
        printed(process)
        for words in calls:
            outcome = viommu(*words.split())
            assert (outcome.code, outcome.err) == (0, ""), words
            assert outcome.out
