"""A plan: a seed and rules, from a TOML file or from Python.

seed = 7

[[fault]]
at = "command-fetched"
when = { opcode = "CMD_TLBI_NH_ASID", nth = 2 }
do = "skip"
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from viommu.faults.rule import Effect, Rule


class PlanError(Exception):
    """A plan cannot be used; the message says the place and what is allowed there."""


class Plan(BaseModel):
    """Rules in the order in which they are asked: the first that wants something decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    fault: tuple[Rule, ...] = ()
    effect: tuple[Effect, ...] = ()
    fault_lines: tuple[int, ...] = ()
    effect_lines: tuple[int, ...] = ()
    """The line of each in its file; where that is not known, its number from 1 on."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML file. Raises `PlanError`, with file and line."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise PlanError(f"{path}: cannot be read: {reason}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str = "plan") -> Self:
        """Read TOML. Raises `PlanError` with `source` and the line."""
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{source}: not TOML: {error}") from error
        fault, effect = (_lines(text, table, content) for table in ("fault", "effect"))
        return cls._validated(content, source, fault, effect)

    @classmethod
    def of(
        cls, *rules: dict[str, Any], effects: Sequence[dict[str, Any]] = (), seed: int = 0
    ) -> Self:
        """A plan of rules and effects as a TOML file would have them. Raises `PlanError`."""
        content = {"seed": seed, "fault": list(rules), "effect": list(effects)}
        return cls._validated(content, "plan", (), ())

    @classmethod
    def _validated(
        cls,
        content: dict[str, Any],
        source: str,
        fault_lines: tuple[int, ...],
        effect_lines: tuple[int, ...],
    ) -> Self:
        known = {"fault": fault_lines, "effect": effect_lines}
        try:
            plan = cls.model_validate(content)
        except ValidationError as error:
            raise PlanError(_sentence(error, source, known)) from error
        numbers = {
            "fault_lines": fault_lines or tuple(range(1, len(plan.fault) + 1)),
            "effect_lines": effect_lines or tuple(range(1, len(plan.effect) + 1)),
        }
        return plan.model_copy(update=numbers)


def _lines(text: str, table: str, content: Mapping[str, Any]) -> tuple[int, ...]:
    """Where each `[[table]]` begins; nothing if another text has such lines too, as a plan in a plan."""
    header = re.compile(rf"\s*\[\[\s*{table}\s*\]\]")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if header.match(line)]
    tables = content.get(table)
    return tuple(lines) if isinstance(tables, list) and len(lines) == len(tables) else ()


def _sentence(error: ValidationError, source: str, lines: Mapping[str, tuple[int, ...]]) -> str:
    """The first finding: where, and what is allowed there."""
    details = error.errors(include_url=False)
    first = details[0]
    place = [part for part in first["loc"] if not str(part).startswith("function-")]
    where = source
    if len(place) > 1 and place[0] in lines and isinstance(place[1], int):
        table, number = str(place[0]), place[1]
        known = lines[table]
        where += f", line {known[number]}" if number < len(known) else f", {table} {number + 1}"
        place = place[2:]
    key = ".".join(str(part) for part in place)
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}: {key + ': ' if key else ''}{message}{more}"
