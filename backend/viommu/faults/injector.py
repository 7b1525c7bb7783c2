"""The injector: it answers the points as a plan says, and tells the stream of events what it did."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from viommu.faults.actions import TimedHold
from viommu.faults.plan import Plan
from viommu.faults.registry import POINTS
from viommu.faults.rule import ArmedEffect, ArmedRule
from viommu.trace import Event, Hold, Point, Tracer, Verdict


@dataclass(frozen=True, slots=True)
class EffectCalled(Event):
    """The effect at `line` of the plan called `method` for the `count`-th time; `outcome` is its result, or its no."""

    line: int
    rule: str
    method: str
    count: int
    outcome: str


@dataclass(frozen=True, slots=True)
class FaultInjected(Event):
    """The rule at `line` of the plan interfered for the `count`-th time: it did `action` at `point`."""

    line: int
    rule: str
    point: str
    action: str
    count: int
    where: str


def _shown(point: Point) -> str:
    """The point as Python shows it, but of the bytes of a DMA no more than how many there are and the first."""
    values = {field.name: getattr(point, field.name) for field in fields(point)}
    shown = [
        f"{name}={len(value)} bytes {value[:16]!r}"
        if isinstance(value, bytes)
        else f"{name}={value!r}"
        for name, value in values.items()
    ]
    return f"{point.kind}({', '.join(shown)})"


def _nobody(method: str, _: Mapping[str, Any]) -> object:
    return f"nobody is there to call {method}"


class Injector:
    """Carries out `plan` on what `tracer` tells, until it is closed.

    `clock` gives seconds since the guest came; `timer` those of a clock that never goes back, by which what is held
    ends, and is `clock` if not said. `call` calls a method of the control socket by name, at once, and returns what it
    has to say. Whoever has an event loop calls `turn` in it, and sleeps no longer than `patience` says,
    so that what is held is released in time.
    """

    def __init__(
        self,
        plan: Plan,
        tracer: Tracer,
        clock: Callable[[], float],
        call: Callable[[str, Mapping[str, Any]], object] = _nobody,
        timer: Callable[[], float] | None = None,
    ) -> None:
        self._tracer, self._clock, self._call = tracer, clock, call
        self._timer = clock if timer is None else timer
        dice = Random(plan.seed)  # noqa: S311 - replayed, not secret
        self.rules = [
            ArmedRule(rule, line, Random(dice.getrandbits(64)), clock)  # noqa: S311
            for rule, line in zip(plan.fault, plan.fault_lines, strict=True)
        ]
        self.effects = [
            ArmedEffect(effect, line, Random(dice.getrandbits(64)), clock)  # noqa: S311
            for effect, line in zip(plan.effect, plan.effect_lines, strict=True)
        ]
        counts = [rule.count for rule in self.rules] + [each.count for each in self.effects]
        self._watching = [count for count in counts if count.watches]
        self._at: dict[type[Point], list[ArmedRule]] = {}
        for rule in self.rules:
            self._at.setdefault(POINTS[rule.rule.at], []).append(rule)
        self._held: list[tuple[Hold, TimedHold, float, int]] = []
        self._turns = 0
        self._unsubscribe = tracer.subscribe(self._see)
        self._before = tracer.meddler
        tracer.meddler = self._decide

    def _decide(self, point: Point) -> Verdict | None:
        for rule in self._at.get(type(point), ()):
            verdict = rule.decide(point)
            if verdict is None:
                continue
            for hold, terms in rule.take_holds():
                self._held.append((hold, terms, self._timer(), self._turns))
            action = rule.rule.do.action
            self._tracer.emit(
                FaultInjected(
                    rule.line, rule.rule.name, rule.rule.at, action, rule.count.taken, _shown(point)
                )
            )
            return verdict
        return None

    def _see(self, event: Event) -> None:
        for count in self._watching:
            count.see(event)
        if not self._tracer.caused:
            self._call_effects(event)
        if self._held:
            self._release(lambda terms, *_: terms.until is not None and terms.until.fits(event))

    def turn(self) -> None:
        """One turn of the event loop: what has been held long enough goes on."""
        self._turns += 1
        self._call_effects(None)
        if self._held:
            now, turns = self._timer(), self._turns
            self._release(
                lambda terms, since, first: (
                    (terms.ms is not None and now - since >= terms.ms / 1000)
                    or (terms.turns is not None and turns - first >= terms.turns)
                )
            )

    def _call_effects(self, event: Event | None) -> None:
        """What an effect does causes no further effects: a plan cannot go round in circles."""
        for each in self.effects:
            if not each.wants(event):
                continue
            effect, taken = each.effect, each.count.taken
            with self._tracer.causing():
                outcome = str(self._call(effect.call, effect.arguments))
                self._tracer.emit(EffectCalled(each.line, effect.name, effect.call, taken, outcome))

    @property
    def patience(self) -> float | None:
        """Seconds until `turn` has something to do; None when nothing is held for a time."""
        if any(terms.turns is not None for _, terms, _, _ in self._held):
            return 0.0
        now, since_guest = self._timer(), self._clock()
        waits = [s + terms.ms / 1000 - now for _, terms, s, _ in self._held if terms.ms is not None]
        waits += [
            each.effect.when.after - since_guest
            for each in self.effects
            if each.effect.on is None and not each.count.taken
        ]
        return max(0.0, min(waits)) if waits else None

    def _release(self, due: Callable[[TimedHold, float, int], bool]) -> None:
        released = [each for each in self._held if due(*each[1:])]
        self._held = [each for each in self._held if each not in released]
        for hold, *_ in released:
            hold.release()

    def close(self) -> None:
        """Interfere no more; what is still held goes on. Idempotent."""
        if self._tracer.meddler == self._decide:
            self._tracer.meddler = self._before
            self._unsubscribe()
        self._release(lambda *_: True)
