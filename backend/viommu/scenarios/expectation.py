"""What shall come of a scenario, and what did not."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from viommu.faults.matching import fits
from viommu.ledger import Verdict

NEVER = re.compile(
    r"WARNING: |BUG: |Oops|Internal error: |Unable to handle |Call trace:|blocked for more than"
    r"|self-detected stall|soft lockup"
)
"""What a healthy kernel does not say, whatever happens to it."""

Facts = Mapping[str, Any]
Event = Mapping[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EventExpected(BaseModel):
    """Events of the type `kind` with the fields that are given: `times` of them, or at least one."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str
    times: int | tuple[int, int] | None = None

    def unmet(self, events: Sequence[Event]) -> Iterator[str]:
        """What is wrong, if something is."""
        wanted = self.model_extra or {}
        count = sum(
            event["kind"] == self.kind
            and all(fits(event.get(name), want) for name, want in wanted.items())
            for event in events
        )
        fields = ", ".join(f"{name}={value}" for name, value in wanted.items())
        what = f"{self.kind}({fields})"
        match self.times:
            case None if not count:
                yield f"there is no event {what}"
            case int(times) if count != times:
                yield f"there are {count} events {what}, not {times}"
            case (first, last) if not first <= count <= last:
                yield f"there are {count} events {what}, not {first} to {last}"


class LedgerExpected(_Strict):
    """Its verdict, rules that it finds broken, and rules that it must not find broken."""

    verdict: Literal["clean", "exposed", "violated"]
    finds: tuple[str, ...] = ()

    def unmet(self, verdict: Verdict) -> Iterator[str]:
        """What is wrong, if something is."""
        rules = {finding.rule for finding in verdict.findings}
        for rule in self.finds:
            if rule not in rules:
                yield f"the ledger does not find {rule}, but {', '.join(sorted(rules)) or 'nothing'}"
        if verdict.word != self.verdict:
            yield f"the ledger says {verdict.word}, not {self.verdict}"


class Expectation(_Strict):
    """All of it. `within` and `settle` are seconds: for the scripts, and for what comes after the last of them."""

    within: Annotated[float, Field(gt=0, le=120)] = 30.0
    settle: Annotated[float, Field(gt=0, le=30)] = 3.0
    facts: Mapping[str, Any] = {}
    """What the scripts said: a value, or the first and the last of a range of numbers."""
    log: tuple[str, ...] = ()
    """Regular expressions of which each is in a line of the kernel's log."""
    log_not: tuple[str, ...] = ()
    event: tuple[EventExpected, ...] = ()
    ledger: LedgerExpected

    @field_validator("log", "log_not")
    @classmethod
    def _check_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value

    def unmet(self, found: "Found") -> list[str]:
        """What is not as it shall be, the plainest first."""
        return [
            *self._facts(found.facts),
            *self._log(found.log),
            *found.plan_unmet(),
            *(line for event in self.event for line in event.unmet(found.events)),
            *self.ledger.unmet(found.verdict),
        ]

    def _facts(self, facts: Facts) -> Iterator[str]:
        for name, wanted in self.facts.items():
            if name not in facts:
                yield f"the guest did not say {name}"
            elif not _is(facts[name], wanted):
                yield f"{name} is {facts[name]!r}, not {_words(wanted)}"

    def _log(self, log: Sequence[str]) -> Iterator[str]:
        for line in log:
            if NEVER.search(line) or any(re.search(pattern, line) for pattern in self.log_not):
                yield f"the kernel said: {line}"
        for pattern in self.log:
            if not any(re.search(pattern, line) for line in log):
                yield f"the kernel did not say: {pattern}"


@dataclass(frozen=True)
class Found:
    """What came of it: facts of the guest, lines of its kernel, events, the plan as it was carried out, the verdict."""

    facts: Facts
    log: Sequence[str]
    events: Sequence[Event]
    plan: Sequence[Mapping[str, Any]]
    verdict: Verdict

    def plan_unmet(self) -> Iterator[str]:
        """Rules and effects that nothing came of: the scenario was another one."""
        for rule in self.plan:
            if not rule["count"]:
                yield f"line {rule['line']} of the plan, {rule['does']} at {rule['at']}, never happened"


def _is(value: Any, wanted: Any) -> bool:
    return value == wanted or (
        _is_range(wanted) and isinstance(value, int | float) and wanted[0] <= value <= wanted[1]
    )


def _is_range(wanted: Any) -> bool:
    return (
        isinstance(wanted, list)
        and len(wanted) == 2
        and all(isinstance(end, int | float) for end in wanted)
    )


def _words(wanted: Any) -> str:
    return f"{wanted[0]} to {wanted[1]}" if _is_range(wanted) else repr(wanted)
