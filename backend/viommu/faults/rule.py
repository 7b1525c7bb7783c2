"""One line of a plan: at which point, when, and what."""

from collections.abc import Callable, Mapping
from random import Random
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from viommu.faults.actions import (
    ACTIONS,
    Action,
    EventPattern,
    RuleMemory,
    TimedHold,
    action_name,
    makes_sense,
)
from viommu.faults.registry import POINTS, point_fields
from viommu.trace import Event, Hold, Point, Verdict

Wanted = bool | int | str | tuple[int, int] | tuple[str, ...] | None


class When(BaseModel):
    """When a point that has the fields asked for is meant. What is not said does not matter.

    A field of the point is a value; a range of numbers, both ends included; or a row of names, any of which will do.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    nth: Annotated[int, Field(ge=1)] | tuple[int, int] | None = None
    """Which of the points that fit otherwise, from 1 on, or from the first to the last of a range."""
    every: Annotated[int, Field(ge=1)] = 1
    """Only each so-manieth of them."""
    times: Annotated[int, Field(ge=1)] | None = None
    """At most so often."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    after: Annotated[float, Field(ge=0)] = 0.0
    before: Annotated[float, Field(gt=0)] | None = None
    """Seconds since the guest came."""
    since: EventPattern | None = None
    """Only from such an event on …"""
    until: EventPattern | None = None
    """… and only before such an event, which ends it until the next `since`."""

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
        if not makes_sense(type(self.do), point):
            possible = ", ".join(action_name(each) for each in ACTIONS if makes_sense(each, point))
            raise ValueError(f"do: {self.at} cannot {self.do.action!r}, allowed: {possible}")
        return self


class ArmedRule:
    """A rule at work: what it counted, its dice, and whether it is between `since` and `until`."""

    def __init__(self, rule: Rule, line: int, dice: Random, clock: Callable[[], float]) -> None:
        self.rule, self.line = rule, line
        self.fired = 0
        """How often it interfered."""
        self._fitted = 0
        self._open = rule.when.since is None
        self._clock = clock
        self._memory = RuleMemory(dice)
        self._watches = rule.when.since is not None or rule.when.until is not None

    def see(self, event: Event) -> None:
        """Follow the events that open and close it."""
        if not self._watches:
            return
        when = self.rule.when
        if self._open:
            self._open = when.until is None or not when.until.fits(event)
        elif when.since is not None:
            self._open = when.since.fits(event)

    def decide(self, point: Point) -> Verdict | None:
        """What it wants at `point`, whose type is its own."""
        when = self.rule.when
        fits = all(_fits(getattr(point, name), want) for name, want in when.fields.items())
        if not fits or not self._open:
            return None
        now = self._clock()
        if now < when.after or (when.before is not None and now >= when.before):
            return None
        self._fitted += 1
        if not self._is_turn() or (
            when.probability < 1 and self._memory.dice.random() >= when.probability
        ):
            self.rule.do.overlook(point, self._memory)
            return None
        self.fired += 1
        return self.rule.do.decide(point, self._memory)

    def _is_turn(self) -> bool:
        when = self.rule.when
        if when.times is not None and self.fired >= when.times:
            return False
        if isinstance(when.nth, tuple):
            return when.nth[0] <= self._fitted <= when.nth[1]
        if when.nth is not None:
            return self._fitted == when.nth
        return self._fitted % when.every == 0

    def take_holds(self) -> list[tuple[Hold, TimedHold]]:
        """What it began to hold since the last call."""
        taken, self._memory.holds = self._memory.holds, []
        return taken


def _fits(value: Any, wanted: Wanted) -> bool:
    if isinstance(wanted, tuple | list):
        first, *rest = wanted
        if isinstance(first, str):
            return value in wanted
        return value is not None and first <= value <= rest[0]
    return bool(value == wanted)
