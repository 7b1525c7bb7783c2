"""Domains in the guest: the calls on the SMMU in a BAR, with the engines as their devices."""

from board import DESTINATION, UNTOUCHED, Board, Json
from engine import RAND48
from pool import PAGE, Scattered

from viommu.driver.domains import (
    DmaDevice,
    DmaDomain,
    DmaRemapping,
    DomainEvent,
    DomainType,
    IdMapping,
    as_dict,
)
from viommu.driver.page_tables import READ_WRITE
from viommu.layouts.tables import StreamTableEntry

PATIENCE = 0.3
"""Seconds that the driver waits for the SMMU where it is meant to wait in vain."""


class Bench:
    """A driver that has just reset the SMMU, the calls on it, and what they tell."""

    def __init__(self, board: Board, timeout: float = 10.0) -> None:
        self.board, self.driver = board, board.fresh(timeout=timeout)
        self.told: list[DomainEvent] = []
        self.remapping = DmaRemapping(self.driver, observer=self.told.append)
        self.streams = [engine.stream_id for engine in board.engines]

    def pair(self, *, ats: bool = False, stalls: bool = False) -> DmaDevice:
        """Both engines as one ACPI-enumerated device, by 0 and 1; by 2 and 3 two streams that nobody is."""
        mappings = [
            *(IdMapping(place, 1, stream) for place, stream in enumerate(self.streams)),
            IdMapping(2, 2, 0x40),
        ]
        return DmaDevice("pair", id_mappings=mappings, ats=ats, stalls=stalls)

    def device(self, *, ats: bool = False, stalls: bool = False) -> DmaDevice:
        """The first engine, a PCI function."""
        return DmaDevice("engine0", self.streams[0], ats=ats, stalls=stalls)

    def domain(self, kind: DomainType = DomainType.TRANSLATE, pages: int = 0) -> DmaDomain:
        """A domain that maps `pages` pages of destination memory at DESTINATION."""
        status, domain = self.remapping.create_domain(kind)
        assert domain is not None, status
        if pages:
            frames = Scattered(self.board.destination, pages).frames
            status = self.remapping.map_logical_range(domain, READ_WRITE, frames, DESTINATION)
            assert status.success, status
        return domain

    def attach(self, domain: DmaDomain, device: DmaDevice, base: int = 0, count: int = 1) -> None:
        status = self.remapping.attach_device(domain, device, base, count)
        assert status.success, status

    def write(self, address: int = DESTINATION, *, engine: int = 0, ats: bool = False) -> Json:
        """A page written by DMA: how it ended, and how many bytes of destination memory changed."""
        self.board.destination.fill(UNTOUCHED)
        outcome = self.board.dma(RAND48, address, PAGE, engine=engine, seed=3, ats=ats)
        return {"status": outcome.status, "bytes": self.board.stray_bytes()}

    def config(self, stream_id: int) -> str:
        """STE.Config, as it is in memory."""
        entry = StreamTableEntry.from_bytes(self.driver.table.entry(stream_id).tobytes())
        return entry.config.name

    @property
    def events(self) -> list[Json]:
        """What was told, for JSON."""
        return [as_dict(event) for event in self.told]
