"""One line of a plan: at which point, when, and what; or, on which event, what is called."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from random import Random
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from viommu.faults.actions import (
    ACTIONS,
    Action,
    RuleMemory,
    TimedHold,
    action_name,
    makes_sense,
)
from viommu.faults.matching import Count, EventPattern, Occasion, Wanted, check_wanted, fits
from viommu.faults.registry import POINTS, point_fields
from viommu.trace import Event, Hold, Point, Verdict


class When(Occasion):
    """An occasion, and the fields that the point shall have.

    A field is a value; a range of numbers, both ends included; or a row of names, any of which will do.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def fields(self) -> Mapping[str, Wanted]:
        """The fields of the point, and what they shall be."""
        return self.model_extra or {}


class Rule(BaseModel):
    """`at` names the point, `do` the action."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: str
    when: When = When()
    do: Action
    name: str = ""

    @field_validator("do", mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"action": value} if isinstance(value, str) else value

    @field_validator("at")
    @classmethod
    def _check_point(cls, value: str) -> str:
        if value not in POINTS:
            raise ValueError(f"{value!r} is no point, allowed: {', '.join(POINTS)}")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "Rule":
        point = POINTS[self.at]
        unknown = self.when.fields.keys() - set(point_fields(point))
        if unknown:
            known = [*point_fields(point), *When.model_fields]
            raise ValueError(
                f"when.{min(unknown)}: {self.at} has no such thing, allowed: {', '.join(known)}"
            )
        types = {f"when.{field.name}": field.type for field in fields(point)}
        check_wanted({f"when.{name}": want for name, want in self.when.fields.items()}, types)
        if not makes_sense(type(self.do), point):
            possible = ", ".join(action_name(each) for each in ACTIONS if makes_sense(each, point))
            raise ValueError(f"do: {self.at} cannot {self.do.action!r}, allowed: {possible}")
        code = getattr(self.do, "code", None)
        if code is not None and code not in point.codes:
            codes = ", ".join(point.codes) or "none here"
            raise ValueError(f"do.code: {code!r} is unknown, allowed: {codes}")
        return self


class Effect(BaseModel):
    """On an event of the stream, `on`, the method `call` of the control socket is called.

    Without `on` it is called once, at the time `when.after`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    on: EventPattern | None = None
    when: Occasion = Occasion()
    call: str
    arguments: dict[str, Any] = {}
    name: str = ""

    @model_validator(mode="after")
    def _check_when(self) -> "Effect":
        others = self.when.model_fields_set - {"after"}
        if self.on is None and others:
            raise ValueError(f"when.{min(others)}: without on it can only be after a time")
        return self


class ArmedRule:
    """A rule at work."""

    def __init__(self, rule: Rule, line: int, dice: Random, clock: Callable[[], float]) -> None:
        self.rule, self.line = rule, line
        self.count = Count(rule.when, dice, clock)
        self._memory = RuleMemory(dice)

    def decide(self, point: Point) -> Verdict | None:
        """What it wants at `point`, whose type is its own."""
        when = self.rule.when
        if not all(fits(getattr(point, name), want) for name, want in when.fields.items()):
            return None
        if not self.count.open:
            return None
        if not self.count.take():
            self.rule.do.overlook(point, self._memory)
            return None
        return self.rule.do.decide(point, self._memory)

    def take_holds(self) -> list[tuple[Hold, TimedHold]]:
        """What it began to hold since the last call."""
        taken, self._memory.holds = self._memory.holds, []
        return taken


class ArmedEffect:
    """An effect at work."""

    def __init__(self, effect: Effect, line: int, dice: Random, clock: Callable[[], float]) -> None:
        self.effect, self.line = effect, line
        self.count = Count(effect.when, dice, clock)

    def wants(self, event: Event | None) -> bool:
        """Whether it is time to call: because of `event`, or without one, by the clock."""
        on = self.effect.on
        if on is None:
            due = event is None and self.count.open and not self.count.taken
        else:
            due = event is not None and on.fits(event) and self.count.open
        return due and self.count.take()
