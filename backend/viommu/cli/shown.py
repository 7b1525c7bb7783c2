"""Results of methods as people read them: tables, addresses in hexadecimal, decoded fields as `name=value`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

_HEXADECIMAL = frozenset(
    (
        *("address", "base", "error_address", "first", "iova", "offset", "size", "stream_id"),
        *("s2ttb", "ttb0", "ttb1", "value"),
    )
)
_PROGRAMS_ONLY = frozenset({"words"})
"""What is in the JSON alone."""


def shown(result: Any) -> RenderableType:
    """A list of rows as a table; a mapping as a grid, with the lists of rows in it as tables below."""
    if _is_rows(result):
        return _table(result)
    if not isinstance(result, dict):
        return Text(_cell("", result))
    return Group(*_parts(result))


def event_line(told: Mapping[str, Any]) -> str:
    """An event of a subscription as one line."""
    rest = {key: value for key, value in told.items() if key not in ("seq", "time", "kind")}
    words = " ".join(f"{key}={_cell(key, value)}" for key, value in rest.items())
    return f"{told['time']:12.6f}  {told['kind']:<22}  {words}"


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _parts(result: dict[str, Any]) -> Iterator[RenderableType]:
    after = result.get("next")
    tables = {key: value for key, value in result.items() if _is_rows(value)}
    grid = Table.grid(padding=(0, 2))
    for key, value in result.items():
        if key not in tables and key not in ("next", "more"):
            grid.add_row(Text(key, "bold"), Text(_cell(key, value)))
    if grid.row_count:
        yield grid
    for key, rows in tables.items():
        yield _table(rows, title=key if len(result) > 2 else None)
    if after is not None:
        yield Text(f"There may be more: go on with first={after:#x}", "dim")
    elif result.get("more"):
        yield Text("There are more: ask for fewer, or raise the limit", "dim")


def _table(rows: list[dict[str, Any]], title: str | None = None) -> RenderableType:
    """The rows, each under it what it has of rows itself, where that is too much for a cell."""
    inner = {key for row in rows for key, value in row.items() if _is_deep(value)}
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in inner]
    table = Table(*(Column(key, overflow="fold") for key in keys), title=title)
    for row in rows:
        table.add_row(*(Text(_cell(key, row.get(key))) for key in keys))
    below = [
        _table(row[key], title=f"{next(iter(row.values()))}: {key}")
        for row in rows
        for key in row
        if key in inner and row[key]
    ]
    return Group(table, *below) if below else table


def _is_deep(value: Any) -> bool:
    return _is_rows(value) and any("fields" in row for row in value)


def _cell(key: str, value: Any) -> str:
    match value:
        case None | "":
            return "—"
        case bool():
            return "yes" if value else "no"
        case int():
            return hex(value) if key in _HEXADECIMAL else str(value)
        case list() | dict() if not value:
            return "—"
        case list():
            return ", ".join(_cell(key, each) for each in value)
        case {"address": int(address), "fields": dict(fields)}:
            return f"{address:#x}: {_fields(fields)}"
        case dict():
            if key == "fields":
                return _fields(value)
            return " ".join(_words(value.items()))
        case _:
            return str(value)


def _words(items: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for key, value in items:
        if key not in _PROGRAMS_ONLY and value is not None:
            yield f"{key} {_cell(key, value)}"


def _fields(fields: dict[str, Any]) -> str:
    """As `Layout` writes them."""
    return " ".join(
        key if value is True else f"{key}={hex(value) if isinstance(value, int) else value}"
        for key, value in fields.items()
    )
