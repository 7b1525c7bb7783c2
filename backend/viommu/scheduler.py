"""Whose turn it is: one model that has work does one small step, in an order that comes from one seed.

The DMA of the endpoints can be paused. What is in flight then stays in flight, and what waits for it waits; the SMMU
goes on, and so do the clients. A step at a time it is taken in the order that it would have had.
"""

from collections.abc import Sequence
from random import Random
from typing import Annotated, Any

from pydantic import Field

from viommu.control import Methods, Refused
from viommu.function import Function


class Scheduler:
    """Chooses among `functions`, which may change."""

    def __init__(self, functions: Sequence[Function], seed: int) -> None:
        self.functions = functions
        self.order = Random(seed)  # noqa: S311 - replayed, not secret
        self.paused = False
        """Endpoints do not get their turns."""

    def ready(self) -> list[Function]:
        """The functions that have work, and may do it."""
        found = [function for function in self.functions if function.busy]
        return self._awake(found) if self.paused else found

    def turn(self, ready: list[Function]) -> None:
        """Let one of those that were ready before do a step."""
        if self.paused:
            ready = self._awake(ready)
        if ready:
            self.order.choice(ready).step()

    def work(self) -> None:
        """Let one that has work do a step, paused or not: somebody waits for what is in flight."""
        ready = [function for function in self.functions if function.busy]
        if ready:
            self.order.choice(ready).step()

    @staticmethod
    def _awake(functions: list[Function]) -> list[Function]:
        return [function for function in functions if function.port is None]

    def step(self, only: Function | None = None) -> Function | None:
        """Let one endpoint that has work do a step; returns which, None when none has any."""
        wanted = self.functions if only is None else [only]
        busy = [function for function in wanted if function.port is not None and function.busy]
        if not busy:
            return None
        chosen = self.order.choice(busy)
        chosen.step()
        return chosen


class DmaCalls:
    """Registers `dma.pause`, `dma.step`, `dma.resume` and `dma.state`."""

    def __init__(self, scheduler: Scheduler, methods: Methods) -> None:
        self._scheduler = scheduler
        methods.add("dma.pause", self.pause)
        methods.add("dma.step", self.step)
        methods.add("dma.resume", self.resume)
        methods.add("dma.state", self.state)

    def pause(self) -> dict[str, Any]:
        """Let no endpoint do a step: what is in flight stays so, and what waits for it waits."""
        self._scheduler.paused = True
        return self.state()

    def step(
        self, steps: Annotated[int, Field(ge=1, le=1000)] = 1, function: str | None = None
    ) -> dict[str, Any]:
        """While paused, let endpoints do steps: the seed says which, or one function does them all."""
        if not self._scheduler.paused:
            raise Refused("DMA is not paused: call dma.pause first")
        only = None if function is None else self._find(function)
        stepped: list[str] = []
        while len(stepped) < steps and (done := self._scheduler.step(only)) is not None:
            stepped.append(done.name)
        return {"stepped": stepped, **self.state()}

    def resume(self) -> dict[str, Any]:
        """Let the endpoints go on."""
        self._scheduler.paused = False
        return self.state()

    def state(self) -> dict[str, Any]:
        """Tell whether DMA is paused, and which endpoints have work, or transactions in flight."""
        return {
            "paused": self._scheduler.paused,
            "functions": [
                {
                    "function": function.name,
                    "stream_id": function.port.stream_id,
                    "has_work": function.busy,
                    "in_flight": function.port.in_flight,
                }
                for function in self._scheduler.functions
                if function.port is not None
            ],
        }

    def _find(self, name: str) -> Function:
        endpoints = {each.name: each for each in self._scheduler.functions if each.port is not None}
        if name not in endpoints:
            raise Refused(f"there is no endpoint {name!r}, but {', '.join(endpoints)}")
        return endpoints[name]
