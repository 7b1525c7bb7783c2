"""`viommu ctl`: one call of a method of a running server, its result as a table or as JSON."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from vfio_user.socket_path import is_live
from viommu.control import ControlClient
from viommu.lab.errors import LabError
from viommu.lab.rundir import run_base
from viommu.lab.serving import CONTROL_NAME


def call(console: Console, words: list[str], path: Path | None, *, as_json: bool) -> None:
    """Call the method of `words`, or list the methods when there is none, and print the result."""
    method, *pairs = words or ["methods"]
    parameters = dict(_parameter(pair) for pair in pairs)
    with ControlClient(path or find()) as client:
        result = client.call(method, **parameters)
    if as_json:
        console.print(json.dumps(result), soft_wrap=True, highlight=False, markup=False)
    elif result is not None:
        console.print(_shown(result), highlight=False)


def find() -> Path:
    """The control socket of the one server that runs in a directory of its own. Raises `LabError`."""
    found = sorted(path for path in run_base().glob(f"run-*/{CONTROL_NAME}") if is_live(path))
    if len(found) == 1:
        return found[0]
    if not found:
        raise LabError("no server is running: start `viommu serve`, or name its --control")
    raise LabError(f"several servers are running: choose --control {' or '.join(map(str, found))}")


def _parameter(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals:
        raise LabError(f"{word!r} is no parameter: write key=value")
    return key, _value(text)


def _value(text: str) -> Any:
    """A JSON value, a number in any base, or else the text itself."""
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shown(result: Any) -> RenderableType:
    if isinstance(result, list) and result and all(isinstance(row, dict) for row in result):
        table = Table(*(Column(str(key), overflow="fold") for key in result[0]))
        for row in result:
            table.add_row(*(Text(_cell(row.get(key))) for key in result[0]))
        return table
    if isinstance(result, dict):
        grid = Table.grid(padding=(0, 2))
        for key, value in result.items():
            grid.add_row(Text(str(key), "bold"), Text(_cell(value)))
        return grid
    return Text(_cell(result))


def _cell(value: Any) -> str:
    match value:
        case None | "":
            return "—"
        case list() | dict() if not value:
            return "—"
        case list():
            return ", ".join(map(_cell, value))
        case dict():
            return ", ".join(f"{key} {_cell(each)}" for key, each in value.items())
        case _:
            return str(value)
