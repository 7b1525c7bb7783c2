"""The matrix of `docs/faults.md`: what can be done at which point, and the test that shows it.

python -m tests.faults_matrix     writes it anew     (in backend/)
"""

import ast
import inspect
import re
from pathlib import Path

from viommu.faults.actions import ACTIONS, action_name, makes_sense
from viommu.faults.registry import POINTS, point_fields
from viommu.trace import Point

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parents[1] / "docs" / "faults.md"
_WORDS = {
    "Skip": "`skip`:",
    "Replace": "`replace`:",
    "Again": "`repeat`:",
    "Refuse": "`abort`:",
    "BusAbort": "`external-abort`:",
    "Wait": "`hold`:",
    "Defer": "`defer`:",
}
BEGIN, END = "<!-- made by backend/tests/faults_matrix.py -->\n", "<!-- end -->\n"


def sensible_pairs() -> set[tuple[str, str]]:
    """Every point with every action that it understands."""
    return {
        (name, action_name(action))
        for name, point in POINTS.items()
        for action in ACTIONS
        if makes_sense(action, point)
    }


def shown_pairs() -> dict[tuple[str, str], str]:
    """The pairs that tests say that they show, each with one of these tests: its file, line and name."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted(TESTS.glob("test_faults_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for pair in _pairs(node):
                    link = f"[{node.name}](../backend/tests/{path.name}#L{node.lineno})"
                    found.setdefault(pair, link)
    return found


def _pairs(function: ast.FunctionDef) -> list[tuple[str, str]]:
    calls = [node for each in function.decorator_list for node in ast.walk(each)]
    return [
        (str(ast.literal_eval(call.args[0])), str(ast.literal_eval(call.args[1])))
        for call in calls
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "shows"
    ]


def matrix() -> str:
    """The table, in Markdown."""
    shown = shown_pairs()
    lines = []
    for name, point in POINTS.items():
        fields = ", ".join(f"`{field}`" for field in point_fields(point))
        lines += [f"### `{name}`", "", _about(point), "", f"Fields: {fields}.", ""]
        lines += ["| do | shown by |", "|---|---|"]
        for action in sorted(action for at, action in sensible_pairs() if at == name):
            lines.append(f"| `{action}` | {shown.get((name, action), 'nothing')} |")
        lines.append("")
    return "\n".join(lines)


def _about(point: type[Point]) -> str:
    """What its class says, in the words of a plan."""
    text = " ".join((inspect.getdoc(point) or "").split())
    return re.sub(r"\b([A-Z][A-Za-z]+):", lambda found: _WORDS.get(found[1], found[0]), text)


def written() -> str:
    """The document with the matrix as it has to be now."""
    text = DOCUMENT.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{matrix()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(), "utf-8")
