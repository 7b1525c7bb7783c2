"""Who may import whom. The rules keep the models pure, and the driver fit for a guest with nothing but Python."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND, BINDINGS = ROOT / "backend", ROOT / "bindings"

RULES: dict[str, tuple[Path, set[str]]] = {
    # part: where it lives, the parts of the project that it may import besides itself
    "viommu.layouts": (BACKEND / "viommu/layouts", set()),
    "viommu.hot": (BACKEND / "viommu/hot.py", {"viommu._hot"}),
    "viommu.trace": (BACKEND / "viommu/trace.py", set()),
    "viommu.memory": (BACKEND / "viommu/memory.py", {"viommu.hot"}),
    "viommu.smmu": (
        BACKEND / "viommu/smmu",
        {"viommu.layouts", "viommu.memory", "viommu.trace", "viommu.hot"},
    ),
    "viommu.stack": (
        BACKEND / "viommu/stack/manager.py",
        {"viommu.layouts", "viommu.trace"},
    ),
    "viommu.ledger": (
        BACKEND / "viommu/ledger",
        {"viommu.layouts", "viommu.memory", "viommu.trace", "viommu.smmu", "viommu.endpoints.port"}
        | {"rich"},
    ),
    "viommu.endpoints.nvme": (
        BACKEND / "viommu/endpoints/nvme",
        {"viommu.layouts", "viommu.trace"}
        | {f"viommu.endpoints.{each}" for each in ("base", "port", "tasks", "transfers")},
    ),
    "viommu.driver": (BACKEND / "viommu/driver", {"viommu.layouts"}),
    "vfio_user": (BINDINGS / "vfio_user", set()),
}
"""All of them otherwise import the standard library only."""


def imports(path: Path, package: str) -> set[str]:
    """Full names of what a file imports, also by `import_module("…")`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            module = ".".join([*base, *filter(None, [node.module])])
            # `from viommu import hot` is viommu.hot.
            if module in ("viommu", ""):
                found |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                found.add(module)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return found


def files(place: Path) -> list[Path]:
    found = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert found, f"{place} is gone: its rule must go with it"
    return found


def inside(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


@pytest.mark.parametrize("part", RULES)
def test_imports(part: str) -> None:
    place, allowed = RULES[part]
    for path in files(place):
        relative = path.relative_to(BACKEND if BACKEND in path.parents else BINDINGS)
        package = ".".join(relative.parent.parts)
        wrong = {
            name
            for name in imports(path, package)
            if not inside(name, allowed | {part})
            and name.split(".")[0] not in sys.stdlib_module_names
        }
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_bindings_know_nothing_of_iommus() -> None:
    for path in files(BINDINGS / "vfio_user"):
        names = {name.split(".")[0] for name in imports(path, "vfio_user")}
        assert "viommu" not in names
        assert "smmu" not in path.read_text("utf-8").lower(), path


PURE = (
    "viommu.layouts",
    "viommu.memory",
    "viommu.trace",
    "viommu.hot",
    "viommu.smmu",
    "viommu.endpoints.nvme",
)
SIDE_EFFECTS = {"print", "open", "input", "sleep", "exec", "eval"}
OUTSIDE = {"os", "sys", "io", "time", "socket", "threading", "subprocess", "logging", "random"}


@pytest.mark.parametrize("part", PURE)
def test_a_model_never_prints_sleeps_or_opens_a_file(part: str) -> None:
    for path in files(RULES[part][0]):
        called = {
            getattr(node.func, "id", getattr(node.func, "attr", ""))
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call)
        }
        assert not called & SIDE_EFFECTS, path
        modules = {name.split(".")[0] for name in imports(path, part)}
        assert not modules & OUTSIDE, path


def test_files_can_be_read_at_one_sitting() -> None:
    for path in (*files(BACKEND / "viommu"), *files(BINDINGS / "vfio_user")):
        assert len(path.read_text("utf-8").splitlines()) <= 500, path


def test_the_rules_can_fail(tmp_path: Path) -> None:
    source = tmp_path / "wrong.py"
    source.write_text(
        "from viommu import server\nimport numpy.linalg\nfrom . import sibling\n"
        "from ..driver import queues\nimport_module('viommu._hot')\n"
    )
    assert imports(source, "viommu.smmu") == {
        "viommu.server",
        "numpy.linalg",
        "viommu.smmu",
        "viommu.driver",
        "viommu._hot",
    }
