"""What a case has to work with: the SMMU, its driver, the engines, and memory."""

import os

import pci
from engine import IDS, Engine, Frame, Outcome
from pool import HUGE, PAGE, Pool, Region, Scattered

from viommu.driver.access import MappedRegisters, Poll
from viommu.driver.arena import Arena
from viommu.driver.domain import Domain
from viommu.driver.queues import Completion
from viommu.driver.smmu import SmmuDriver
from viommu.driver.stream_table import StreamTable
from viommu.layouts.test_engine import EngineCommand

SMMU_CLASS = 0x080600
TABLES_SIZE = 4 * HUGE
LARGEST = 64 << 20
UNTOUCHED = 0xA5
"""What destination memory holds before a DMA."""
SOURCE, DESTINATION = 0x1000_0000, 0x2_2000_0000
"""The IOVAs that most cases use."""

Json = int | float | str | bool | list["Json"] | dict[str, "Json"] | None


class Board:
    """The devices and the memory. `fresh` makes a driver of an SMMU in its state after reset."""

    def __init__(self) -> None:
        (smmu,) = pci.find(class_code=SMMU_CLASS)
        smmu.enable()
        # A message of CMD_SYNC is a write to memory by the SMMU.
        smmu.set_bus_master(True)
        self.smmu = smmu
        self.registers = MappedRegisters(smmu.map_bar())
        self.engines = [Engine(function) for function in pci.find(ids=IDS)]
        self._pool: Pool | None = None
        self._tables: Region | None = None
        self._source: Region | None = None
        self._destination: Region | None = None
        self._random = b""
        self.driver: SmmuDriver

    # Memory, taken when first asked for: small groups of cases need little.

    def prepare(self, data: int = HUGE) -> None:
        """Have `data` bytes of source and of destination memory."""
        self._pool = Pool(TABLES_SIZE + 2 * data)
        self._tables = self._pool.take(TABLES_SIZE)
        self._source, self._destination = self._pool.take(data), self._pool.take(data)
        # Every page begins at a place of its own in one run of random bytes, so no two pages are alike.
        self._random = os.urandom(PAGE + 61 * (data // PAGE))

    @property
    def source(self) -> Region:
        assert self._source is not None
        return self._source

    @property
    def destination(self) -> Region:
        assert self._destination is not None
        return self._destination

    def random_page(self, number: int) -> bytes:
        """The random content of page `number`."""
        return self._random[61 * number : 61 * number + PAGE]

    def fill(self, pages: Scattered) -> None:
        """Give each of `pages` its random content."""
        for number in range(len(pages)):
            pages.page(number)[:] = self.random_page(number)

    def fresh(
        self,
        *,
        split: int | None = 8,
        log2size: int | None = None,
        completion: Completion | None = None,
        event_queue_log2: int = 8,
        interrupts: bool = False,
        timeout: float = 10.0,
    ) -> SmmuDriver:
        """A driver that has just reset the SMMU, with a 2-level stream table, or a linear one when `split` is None."""
        assert self._tables is not None
        driver = SmmuDriver(self.registers, Arena(self._tables.ranges()), Poll(timeout))
        table: StreamTable = (
            driver.linear_table(log2size)
            if split is None
            else driver.two_level_table(split, log2size)
        )
        driver.reset(
            table,
            completion=completion,
            event_queue_log2=event_queue_log2,
            interrupts=interrupts,
        )
        self.driver = driver
        return driver

    def poke(self, address: int, value: int) -> None:
        """Store a 64-bit word at a physical address among the tables, behind the driver's back."""
        assert self._tables is not None
        for base, view in self._tables.ranges():
            if base <= address < base + len(view):
                view.cast("Q")[(address - base) // 8] = value
                return
        raise ValueError(f"{address:#x} is not among the tables")

    # DMA

    def dma(
        self, command: EngineCommand, begin: int, size: int, *, engine: int = 0, **options: int
    ) -> Outcome:
        """Run one command of an engine to its end."""
        frame = self.frame(engine)
        frame.start(command, begin, size, **options)  # type: ignore[arg-type]
        return frame.wait()

    def frame(self, engine: int = 0) -> Frame:
        """The first frame of an engine."""
        return self.engines[engine].frame()

    def copy_works(self, domain: Domain, pages: int = 1, *, engine: int = 0) -> dict[str, Json]:
        """Map fresh pages at SOURCE and DESTINATION, copy by DMA, and look at every byte."""
        source = Scattered(self.source, pages, seed=engine + 3)
        destination = Scattered(self.destination, pages, seed=engine + 5)
        domain.map_pages(SOURCE, source.frames)
        domain.map_pages(DESTINATION, destination.frames)
        return self.copy(source, destination, SOURCE, DESTINATION, engine=engine)

    def copy(
        self, source: Scattered, destination: Scattered, begin: int, to: int, **options: int
    ) -> dict[str, Json]:
        """Copy by DMA between IOVAs that map to `source` and `destination`, and look at every byte."""
        self.fill(source)
        self.destination.fill(UNTOUCHED)
        size = len(source) * PAGE
        outcome = self.dma(EngineCommand.MEMCPY, begin, size, destination=to, **options)
        return {
            "status": outcome.status,
            "error_address": outcome.error_address,
            "bytes": size,
            "right_pages": self.right_pages(destination),
            "stray_bytes": self.stray_bytes(destination),
        }

    def right_pages(self, pages: Scattered) -> int:
        """How many of `pages` hold exactly the random content of their number."""
        return sum(
            content == self.random_page(number) for number, content in enumerate(pages.pages())
        )

    def stray_bytes(self, expected: Scattered | None = None) -> int:
        """How many bytes of destination memory outside `expected` are not as they were."""
        own = set(expected.order) if expected else set()
        blank = bytes([UNTOUCHED]) * PAGE
        view = self.destination.view
        stray = 0
        for number in range(len(view) // PAGE):
            if number in own:
                continue
            content = bytes(view[number * PAGE : (number + 1) * PAGE])
            if content != blank:
                stray += sum(byte != UNTOUCHED for byte in content)
        return stray

    def events(self) -> list[Json]:
        """The records in the event queue, as the 256-bit numbers that they are in memory."""
        return [hex(record.value) for record in self.driver.events()]

    def refused(self, command: EngineCommand, begin: int, **options: int) -> dict[str, Json]:
        """A DMA of one page that should be refused: what the engine saw, and the records it left."""
        self.destination.fill(UNTOUCHED)
        outcome = self.dma(command, begin, PAGE, **options)
        return {
            "status": outcome.status,
            "error_address": outcome.error_address,
            "stray_bytes": self.stray_bytes(),
            "events": self.events(),
        }
