"""A scenario as its file says it: a plan, what the guest does, and what shall come of it.

title = "A CMD_SYNC that never completes"
shows = "The driver waits a second, says so, and goes on."
bug_class = "…"
driver = "linux"                   # who drives the SMMU; "raw": the script, by viommu.driver, and `why_raw`
references = [{ what = "…", url = "https://…" }]
script = '''…'''                   # Python that imports from /viommu/inside; between several the machine is reset

[smmu]                             # of the machine, where it matters
caching = "hostile"

[[fault]]                          # and [[effect]], as in any plan
…
[expect]
…
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from viommu.faults.plan import Plan, PlanError
from viommu.scenarios.expectation import Expectation

LIBRARY = Path(__file__).with_name("library")
_HEADER = re.compile(r"\s*\[")
_PLAN_HEADER = re.compile(r"\s*\[+\s*(fault|effect)\b")


class ScenarioError(Exception):
    """A scenario cannot be used; the message says the file, the place and what is wrong there."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reference(_Strict):
    """Where the public has met such a bug."""

    what: Annotated[str, Field(min_length=1)]
    url: Annotated[str, Field(pattern=r"^https?://[^ ]+$")]


class Scenario(_Strict):
    """One file."""

    name: str
    title: Annotated[str, Field(min_length=1)]
    shows: Annotated[str, Field(min_length=1)]
    bug_class: Annotated[str, Field(min_length=1)]
    references: Annotated[tuple[Reference, ...], Field(min_length=1)]
    driver: Literal["linux", "raw"] = "linux"
    why_raw: str = ""
    """Why the guest's own driver cannot be brought there."""
    machine: str = "aarch64-virt"
    smmu: Mapping[str, Any] = {}
    kernel_ats: bool = False
    """The guest's kernel may use ATS."""
    seed: int = 0
    script: Annotated[tuple[str, ...], Field(min_length=1)]
    spoils: bool = False
    """Guest and server are of no use afterwards."""
    expect: Expectation
    plan_text: str
    """The plan, on the lines that it has in the file."""

    @model_validator(mode="after")
    def _check_driver(self) -> Self:
        if (self.driver == "raw") != bool(self.why_raw):
            raise ValueError("why_raw: a scenario whose driver is raw says why, and no other")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file. Raises `ScenarioError`."""
        try:
            return cls.parse(path.read_text(encoding="utf-8"), path)
        except OSError as error:
            raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from error

    @classmethod
    def parse(cls, text: str, path: Path) -> Self:
        """Read TOML. Raises `ScenarioError` with `path` and the place."""
        try:
            content = tomllib.loads(text)
            plan_text = _plan_of(text)
            Plan.parse(plan_text, str(path))
        except tomllib.TOMLDecodeError as error:
            raise ScenarioError(f"{path}: not TOML: {error}") from error
        except PlanError as error:
            raise ScenarioError(str(error)) from error
        for part in ("fault", "effect"):
            content.pop(part, None)
        if isinstance(content.get("script"), str):
            content["script"] = [content["script"]]
        try:
            return cls.model_validate({**content, "name": path.stem, "plan_text": plan_text})
        except ValidationError as error:
            raise ScenarioError(_sentence(error, path)) from error

    def plan(self, seed: int) -> str:
        """The plan as TOML, with `seed` for its dice, each rule on the line where it is in the file."""
        return f"seed = {seed}" + self.plan_text


def load_all(directory: Path = LIBRARY) -> list[Scenario]:
    """The scenarios of a directory, those together that can share a guest. Raises `ScenarioError`."""
    found = [Scenario.load(path) for path in sorted(directory.glob("*.toml"))]
    return sorted(found, key=lambda each: (each.driver, repr(each.smmu), each.spoils, each.name))


def _plan_of(text: str) -> str:
    """`text` with nothing but the tables of the plan left; the other lines are empty."""
    lines = []
    within = False
    for line in text.splitlines():
        if _HEADER.match(line):
            within = bool(_PLAN_HEADER.match(line))
        lines.append(line if within else "")
    if lines[:1] != [""]:
        raise ScenarioError("a plan cannot begin on the first line")
    return "\n".join(lines) + "\n"


def _sentence(error: ValidationError, path: Path) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{path}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}"
