"""A plan: a seed and rules, from a TOML file or from Python.

seed = 7

[[fault]]
at = "command-fetched"
when = { opcode = "CMD_TLBI_NH_ASID", nth = 2 }
do = "skip"
"""

import re
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from viommu.faults.rule import Rule


class PlanError(Exception):
    """A plan cannot be used; the message says the place and what is allowed there."""


class Plan(BaseModel):
    """Rules in the order in which they are asked: the first that wants something decides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    fault: tuple[Rule, ...] = ()
    lines: tuple[int, ...] = ()
    """The line of each rule in its file; without a file, its number from 1 on."""

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
        header = re.compile(r"\s*\[\[\s*fault\s*\]\]")
        lines = tuple(
            number for number, line in enumerate(text.splitlines(), 1) if header.match(line)
        )
        return cls._validated(content, source, lines)

    @classmethod
    def of(cls, *rules: dict[str, Any], seed: int = 0) -> Self:
        """A plan of rules as a TOML file would have them. Raises `PlanError`."""
        return cls._validated({"seed": seed, "fault": list(rules)}, "plan", ())

    @classmethod
    def _validated(cls, content: dict[str, Any], source: str, lines: tuple[int, ...]) -> Self:
        try:
            plan = cls.model_validate({**content, "lines": ()})
        except ValidationError as error:
            raise PlanError(_sentence(error, source, lines)) from error
        count = len(plan.fault)
        known = lines if len(lines) == count else tuple(range(1, count + 1))
        return plan.model_copy(update={"lines": known})


def _sentence(error: ValidationError, source: str, lines: tuple[int, ...]) -> str:
    """The first finding: where, and what is allowed there."""
    details = error.errors(include_url=False)
    first = details[0]
    place = [part for part in first["loc"] if not str(part).startswith("function-")]
    where = source
    if len(place) > 1 and place[0] == "fault" and isinstance(place[1], int):
        number = place[1]
        where += f", line {lines[number]}" if number < len(lines) else f", fault {number + 1}"
        place = place[2:]
    key = ".".join(str(part) for part in place)
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{where}: {key + ': ' if key else ''}{message}{more}"
