"""docs/machines.md: its tables are what a machine may say, and its example is one."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from viommu.lab.config import Device, Machine, Timeouts, load_machine

TEXT = (Path(__file__).parents[2] / "docs/machines.md").read_text("utf-8")
ROWS = re.findall(r"^\| `(\w+)` \|(.*?)\|", TEXT, re.MULTILINE)


def shown(value: Any) -> str:
    """As the page has a default: nothing where there is none, or an empty one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"`{value}`" if value else ""
    return f"{value:g}" if value else ""


@pytest.mark.parametrize(
    ("model", "tables"),
    [(Machine, {"timeouts", "smmu", "devices"}), (Timeouts, set()), (Device, set())],
)
def test_each_key_is_there(model: type[BaseModel], tables: set[str]) -> None:
    """In the order of the fields, and with their defaults."""
    fields = {name: field for name, field in model.model_fields.items() if name not in tables}
    first = [name for name, _ in ROWS].index(next(iter(fields)))
    rows = dict(ROWS[first : first + len(fields)])
    assert list(rows) == list(fields)
    for name, field in fields.items():
        default = "" if field.is_required() else shown(field.default)
        assert rows[name].strip() in (default, "by its name"), name


def test_the_example(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(example, "utf-8")
    machine = load_machine(path)
    assert machine.smmu.granules == (12, 16)
    assert [device.stream_id for device in machine.devices] == [0x08, 0x100]
    assert machine.devices[1].disk == tmp_path / "disk.raw"
