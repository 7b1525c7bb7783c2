"""The driver on the model: what its tests have in common."""

from collections.abc import Callable
from mmap import mmap

import pytest

from viommu.driver.access import Poll
from viommu.driver.arena import Arena
from viommu.driver.smmu import SmmuDriver
from viommu.driver.stream_table import StreamTable
from viommu.layouts.records import EventRecord, EventType, FaultClass
from viommu.memory import GuestMemory
from viommu.smmu import Access as Transaction
from viommu.smmu import Features, Smmu, TransactionAborted
from viommu.smmu.events import CommandConsumed
from viommu.trace import Event

RAM = 0x4000_0000
RAM_SIZE = 32 << 20
DATA = RAM + (16 << 20)
STREAM, OTHER = 0x10, 0x18
PAGE, MEGA2 = 0x1000, 0x20_0000


class Frame:
    """The model's registers as the driver reaches them."""

    def __init__(self, smmu: Smmu) -> None:
        self.smmu = smmu

    def read32(self, offset: int) -> int:
        return self.smmu.read(offset, 4)

    def write32(self, offset: int, value: int) -> None:
        self.smmu.write(offset, 4, value)

    def read64(self, offset: int) -> int:
        return self.smmu.read(offset, 8)

    def write64(self, offset: int, value: int) -> None:
        self.smmu.write(offset, 8, value)


class Rig:
    """Memory, the model and the driver. `while_polling` runs whenever the driver waits."""

    def __init__(
        self,
        features: Features | None = None,
        timeout: float = 0.2,
        tables: int = DATA - RAM,
    ) -> None:
        self.ram = memoryview(mmap(-1, RAM_SIZE))
        self.memory = GuestMemory()
        self.memory.add_region(RAM, RAM_SIZE, self.ram)
        self.interrupts = 0
        self.smmu = Smmu(self.memory, features, interrupt=self._interrupt)
        self.arena = Arena([(RAM, self.ram[:tables])])
        self.while_polling: Callable[[], object] = self.smmu.step
        poll = Poll(timeout=timeout, relax=lambda: self._relax())
        self.driver = SmmuDriver(Frame(self.smmu), self.arena, poll)

    def _relax(self) -> None:
        self.while_polling()

    def _interrupt(self) -> None:
        self.interrupts += 1

    def dma(
        self, iova: int, size: int = 8, *, stream_id: int = STREAM, **access: int
    ) -> list[tuple[int, int]]:
        """The physical runs that a transaction reaches; raises `TransactionAborted`."""
        translation = self.smmu.translate(Transaction(stream_id, **access), iova, size)  # type: ignore[arg-type]
        self.smmu.retire(translation)
        runs = list(translation.runs)
        return list(zip(runs[::2], runs[1::2], strict=True))

    def refused(self, iova: int = 0x1_0000, **access: int) -> list[EventRecord]:
        """The events of a transaction that must be aborted."""
        assert self.driver.events() == []
        with pytest.raises(TransactionAborted):
            self.dma(iova, **access)
        return self.driver.events()

    def commands(self) -> tuple[list[str], Callable[[], None]]:
        """The names of the commands consumed from now on, and how to stop listening."""
        names: list[str] = []

        def listen(event: Event) -> None:
            if isinstance(event, CommandConsumed):
                names.append(event.opcode)

        return names, self.smmu.tracer.subscribe(listen)


def record(event: EventType, **fields: int) -> EventRecord:
    return EventRecord(event=event, stream_id=fields.pop("stream_id", STREAM), **fields)


def fault(event: EventType, address: int = 0x1_0000, **fields: int) -> EventRecord:
    fields = {"rnw": True, "fault_class": FaultClass.IN} | fields
    return record(event, address=address, **fields)


TABLES: dict[str, Callable[[SmmuDriver], StreamTable]] = {
    "linear": lambda driver: driver.linear_table(),
    "linear 2^16": lambda driver: driver.linear_table(16),
    "split 6": lambda driver: driver.two_level_table(6),
    "split 8": lambda driver: driver.two_level_table(8),
    "split 10": lambda driver: driver.two_level_table(10),
}
