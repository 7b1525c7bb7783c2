"""What a plan can want at a point, and the verdict that it comes to there.

An action is written as its name, `do = "skip"`, or with what it takes, `do = { action = "hold", ms = 50 }`.
"""

from dataclasses import fields
from random import Random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from viommu.faults.matching import EventPattern
from viommu.trace import (
    Again,
    BusAbort,
    Defer,
    Hold,
    Point,
    Refuse,
    Replace,
    Skip,
    Verdict,
    Wait,
)


class _Action(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: ClassVar[type[Verdict]]

    def decide(self, point: Point, memory: "RuleMemory") -> Verdict | None:
        """The verdict at `point`; None lets it be."""
        raise NotImplementedError

    def overlook(self, point: Point, memory: "RuleMemory") -> None:
        """A point that would fit passed, and it is not its turn."""


class RuleMemory:
    """What a rule remembers between two points: its dice, and what it saw."""

    def __init__(self, dice: Random) -> None:
        self.dice = dice
        self.seen: dict[int, int] = {}
        """The last content of each address, for reads that shall be torn."""
        self.holds: list[tuple[Hold, TimedHold]] = []
        """What is held and not yet in the injector's hands."""


class SkipAction(_Action):
    """It is not done: lost, dropped, ignored, kept."""

    action: Literal["skip"] = "skip"
    verdict = Skip

    def decide(self, point: Point, memory: RuleMemory) -> Verdict:
        return Skip()


class RepeatAction(_Action):
    """It is done `times` more: a duplicate, or a storm."""

    action: Literal["repeat"] = "repeat"
    times: Annotated[int, Field(ge=1, le=1 << 16)] = 1
    verdict = Again

    def decide(self, point: Point, memory: RuleMemory) -> Verdict:
        return Again(self.times)


class AbortAction(_Action):
    """It fails: with the event record, command error or ATS status `code`, or in silence."""

    action: Literal["abort"] = "abort"
    code: str | None = None
    verdict = Refuse

    def decide(self, point: Point, memory: RuleMemory) -> Verdict:
        return Refuse(None if self.code is None else int(point.codes[self.code]))


class ExternalAbortAction(_Action):
    """The access to memory ends in an external abort."""

    action: Literal["external-abort"] = "external-abort"
    verdict = BusAbort

    def decide(self, point: Point, memory: RuleMemory) -> Verdict:
        return BusAbort()


class ReplaceAction(_Action):
    """The value is another: `value`; or what it was with bits cleared (`keep`), set and toggled, and `add` added."""

    action: Literal["replace"] = "replace"
    value: Annotated[int, Field(ge=0)] | None = None
    keep: Annotated[int, Field(ge=0)] | None = None
    set: Annotated[int, Field(ge=0)] = 0
    toggle: Annotated[int, Field(ge=0)] = 0
    add: int = 0
    random_bits: Annotated[int, Field(ge=0, le=512)] = 0
    """How many bits, chosen by the plan's seed, are toggled."""
    verdict = Replace

    def decide(self, point: Point, memory: RuleMemory) -> Verdict:
        value: Any = getattr(point, "value")  # noqa: B009 - of which a Point as such knows nothing
        as_bytes = isinstance(value, bytes)
        width = 8 * len(value) if as_bytes else point.value_bits
        number = int.from_bytes(value, "little") if as_bytes else int(value)
        if self.value is not None:
            number = self.value
        if self.keep is not None:
            number &= self.keep
        number = (number | self.set) ^ self.toggle
        for _ in range(self.random_bits):
            number ^= 1 << memory.dice.randrange(width)
        number = (number + self.add) & (1 << width) - 1
        return Replace(number.to_bytes(width // 8, "little") if as_bytes else number)


class TruncateAction(_Action):
    """Only the first `size` bytes of the data are left."""

    action: Literal["truncate"] = "truncate"
    size: Annotated[int, Field(ge=0)]
    verdict = Replace

    def decide(self, point: Point, memory: RuleMemory) -> Verdict:
        return Replace(getattr(point, "value")[: self.size])  # noqa: B009


class TearAction(_Action):
    """Of a structure read, the first `words` of 64 bits are as they are now, the others as they were when last read.

    Where it is read for the first time, those are zero. With `old_first` it is the other way round.
    """

    action: Literal["tear"] = "tear"
    words: Annotated[int, Field(ge=1, le=7)] = 1
    old_first: bool = False
    verdict = Replace

    def decide(self, point: Point, memory: RuleMemory) -> Verdict:
        address, value = getattr(point, "address"), getattr(point, "value")  # noqa: B009
        old = memory.seen.get(address, 0)
        memory.seen[address] = value
        low = (1 << 64 * self.words) - 1
        if self.old_first:
            old, value = value, old
        return Replace(value & low | old & ~low)

    def overlook(self, point: Point, memory: RuleMemory) -> None:
        memory.seen[getattr(point, "address")] = getattr(point, "value")  # noqa: B009


class TimedHold(_Action):
    """How long something is held: `ms` milliseconds, `turns` of the scheduler, `until` an event; else for ever."""

    ms: Annotated[float, Field(ge=0, le=3_600_000)] | None = None
    turns: Annotated[int, Field(ge=1)] | None = None
    until: EventPattern | None = None

    def _hold(self, memory: RuleMemory) -> Hold:
        hold = Hold()
        memory.holds.append((hold, self))
        return hold


class HoldAction(TimedHold):
    """It, and what comes behind it, has to wait."""

    action: Literal["hold"] = "hold"
    verdict = Wait

    def decide(self, point: Point, memory: RuleMemory) -> Verdict:
        return Wait(self._hold(memory))


class DeferAction(TimedHold):
    """It seems to be done, and is done later."""

    action: Literal["defer"] = "defer"
    verdict = Defer

    def decide(self, point: Point, memory: RuleMemory) -> Verdict:
        return Defer(self._hold(memory))


Action = Annotated[
    SkipAction
    | RepeatAction
    | AbortAction
    | ExternalAbortAction
    | ReplaceAction
    | TruncateAction
    | TearAction
    | HoldAction
    | DeferAction,
    Field(discriminator="action"),
]

ACTIONS: tuple[type[_Action], ...] = (
    SkipAction,
    RepeatAction,
    AbortAction,
    ExternalAbortAction,
    ReplaceAction,
    TruncateAction,
    TearAction,
    HoldAction,
    DeferAction,
)


def action_name(action: type[_Action]) -> str:
    """As a plan writes it."""
    return str(action.model_fields["action"].default)


def makes_sense(action: type[_Action], point: type[Point]) -> bool:
    """Whether the point understands what the action comes to."""
    types = {field.name: field.type for field in fields(point)}
    if action is TearAction:
        return Replace in point.verdicts and {"address", "size"} <= types.keys()
    if action is TruncateAction:
        return types.get("value") is bytes
    return action.verdict in point.verdicts
