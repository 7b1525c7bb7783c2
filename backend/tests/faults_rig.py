"""What the tests of fault injection have in common, and how they say which point and action they show."""

from typing import Any

import pytest

from tests.driver_rig import DATA, PAGE, STREAM, Rig
from viommu.faults.injector import FaultInjected, Injector
from viommu.faults.plan import Plan
from viommu.smmu import Features, TransactionAborted
from viommu.trace import Event

IOVA = 0x10_0000


def shows(point: str, action: str) -> pytest.MarkDecorator:
    """The test shows what the action does at the point: `docs/faults.md` links to it."""
    return pytest.mark.shows(point, action)


class Lab:
    """A driver and its SMMU, a stream that is attached to 16 pages, a plan, and a clock that stands still."""

    def __init__(self, *rules: dict[str, object], seed: int = 0, **features: Any) -> None:
        self.rig = Rig(Features(**features))
        self.now = 0.0
        driver = self.rig.driver
        driver.reset()
        self.domain = driver.create_domain()
        self.domain.map(IOVA, DATA, 16 * PAGE)
        driver.attach(STREAM, self.domain)
        self.events: list[Event] = []
        self.rig.smmu.tracer.subscribe(self.events.append)
        self.injector = Injector(Plan.of(*rules, seed=seed), self.rig.smmu.tracer, lambda: self.now)
        self.rig.while_polling = self.step

    def step(self) -> None:
        self.injector.turn()
        self.rig.smmu.step()

    def goes_through(self, page: int, *, write: bool = False) -> bool:
        try:
            self.rig.dma(IOVA + page * PAGE, write=write)
        except TransactionAborted:
            return False
        return True

    @property
    def injected(self) -> list[int]:
        return [event.count for event in self.events if isinstance(event, FaultInjected)]
