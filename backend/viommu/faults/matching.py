"""Which points and events are meant: their fields, how many of them, and when."""

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from viommu.trace import Event

Wanted = bool | int | str | list[int] | list[str] | None
Number = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


def fits(value: Any, wanted: Wanted) -> bool:
    """Whether a field is what was asked for: a value, one of some names, or in a range with both ends."""
    if not isinstance(wanted, list):
        return bool(value == wanted)
    if isinstance(wanted[0], int):
        return isinstance(value, int) and wanted[0] <= value <= wanted[-1]
    return value in wanted


def check_wanted(
    fields: Mapping[str, Any], types: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Raises `ValueError` for what no field can be, as far as the `types` of the fields are known."""
    for name, wanted in fields.items():
        if isinstance(wanted, list) and not (_is_row(wanted) or _is_range(wanted)):
            raise ValueError(f"{name}: {wanted} is no row of names, nor a range [first, last]")
        each = wanted[0] if isinstance(wanted, list) else wanted
        if name in types and not _can_be(types[name], each):
            raise ValueError(f"{name}: it is never {wanted!r}")


def _is_row(wanted: list[Any]) -> bool:
    return bool(wanted) and all(isinstance(each, str) for each in wanted)


def _is_range(wanted: list[Any]) -> bool:
    numbers = len(wanted) == 2 and all(isinstance(each, int) for each in wanted)
    return numbers and bool(wanted[0] <= wanted[1])


def _can_be(kind: Any, wanted: object) -> bool:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return any(isinstance(wanted, each) or issubclass(each, type(wanted)) for each in kinds)


class EventPattern(BaseModel):
    """An event of the stream: its `event`, a type by name, and fields that it must have."""

    model_config = ConfigDict(extra="allow", frozen=True)

    event: str

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        check_wanted(self.model_extra or {})
        return self

    def fits(self, event: object) -> bool:
        """Whether it is such an event."""
        if type(event).__name__ != self.event:
            return False
        wanted: Mapping[str, Wanted] = self.model_extra or {}
        return all(fits(getattr(event, name, None), want) for name, want in wanted.items())


class Occasion(BaseModel):
    """Which of those that fit otherwise are meant. What is not said does not matter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nth: Number | tuple[Number, Number] | None = None
    """Which of them, from 1 on, or from the first to the last of a range."""
    every: Number = 1
    """Only each so-manieth of them."""
    times: Number | None = None
    """At most so often."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    after: Seconds = 0.0
    before: Annotated[Seconds, Field(gt=0)] | None = None
    """Seconds since the guest came."""
    since: EventPattern | None = None
    """Only from such an event on …"""
    until: EventPattern | None = None
    """… and only before such an event, which ends it until the next `since`."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if isinstance(self.nth, tuple) and self.nth[0] > self.nth[1]:
            raise ValueError(f"nth: {list(self.nth)} is no range [first, last]")
        if self.before is not None and self.before <= self.after:
            raise ValueError(f"before: {self.before} is not after {self.after}")
        return self


class Count:
    """An occasion at work: how many have fitted, the dice, and whether it is between `since` and `until`."""

    def __init__(self, occasion: Occasion, dice: Random, clock: Callable[[], float]) -> None:
        self.taken = 0
        """How often it was the occasion."""
        self.watches = occasion.since is not None or occasion.until is not None
        """`see` has something to do."""
        self._occasion, self._dice, self._clock = occasion, dice, clock
        self._fitted = 0
        self._open = occasion.since is None

    def see(self, event: Event) -> None:
        """Follow the events that open and close it."""
        since, until = self._occasion.since, self._occasion.until
        if self._open:
            self._open = until is None or not until.fits(event)
        elif since is not None:
            self._open = since.fits(event)

    @property
    def open(self) -> bool:
        """The time is right."""
        occasion = self._occasion
        if not self._open:
            return False
        now = self._clock()
        return now >= occasion.after and (occasion.before is None or now < occasion.before)

    def take(self) -> bool:
        """One more fits, while it is open: whether this is one of those that are meant."""
        occasion = self._occasion
        self._fitted += 1
        if occasion.times is not None and self.taken >= occasion.times:
            return False
        if isinstance(occasion.nth, tuple):
            turn = occasion.nth[0] <= self._fitted <= occasion.nth[1]
        elif occasion.nth is not None:
            turn = self._fitted == occasion.nth
        else:
            turn = self._fitted % occasion.every == 0
        if not turn or (occasion.probability < 1 and self._dice.random() >= occasion.probability):
            return False
        self.taken += 1
        return True
