"""Domains on the model: what their tests have in common."""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.driver_rig import PAGE, Rig
from viommu.driver.domains import (
    ContiguousRange,
    DetachStepped,
    DmaDevice,
    DmaDomain,
    DmaRemapping,
    DomainEvent,
    DomainType,
    IdMapping,
    NtStatus,
)
from viommu.driver.page_tables import READ_WRITE
from viommu.layouts.registers import Register
from viommu.layouts.tables import SteConfig, StreamTableEntry
from viommu.smmu import Features, TransactionAborted

IOVA = 0x1_0000
TABLES = 512 << 10
"""Bytes of memory for tables and queues."""


class DomainRig(Rig):
    """The calls, and everything that they told their observer. Time is counted in looks at the clock."""

    def __init__(self, features: Features | None = None, timeout: float = 0.02) -> None:
        super().__init__(features, timeout, TABLES)
        self.driver.reset(self.driver.linear_table(8))
        self.ticks = 0
        self.seen: list[DomainEvent] = []
        self.remapping = DmaRemapping(self.driver, observer=self._see, clock=self._tick)

    def _see(self, event: DomainEvent) -> None:
        self.seen.append(event)

    def _tick(self) -> float:
        self.ticks += 1
        return float(self.ticks)

    def domain(
        self, kind: DomainType = DomainType.TRANSLATE, *, address: int | None = None
    ) -> DmaDomain:
        """A domain; with `address`, one that maps a page there at `IOVA`."""
        status, domain = self.remapping.create_domain(kind)
        assert status is NtStatus.SUCCESS
        assert domain is not None
        if address is not None:
            self.map(domain, IOVA, address)
        return domain

    def map(self, domain: DmaDomain, iova: int, address: int, size: int = PAGE) -> None:
        status = self.remapping.map_logical_range(
            domain, READ_WRITE, ContiguousRange(address, size), iova
        )
        assert status is NtStatus.SUCCESS

    def attach(self, domain: DmaDomain, device: DmaDevice, base: int = 0, count: int = 1) -> None:
        status = self.remapping.attach_device(domain, device, base, count)
        assert status is NtStatus.SUCCESS

    def detach(self, domain: DmaDomain, device: DmaDevice, base: int = 0) -> None:
        assert self.remapping.detach_device(domain, device, base) is NtStatus.SUCCESS

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """The command queue takes no command."""
        cr0 = self.smmu.read(Register.CR0, 4)
        self.smmu.write(Register.CR0, 4, cr0 & ~8)
        yield
        self.smmu.write(Register.CR0, 4, cr0)

    def config(self, stream_id: int) -> SteConfig:
        """What a stream's STE says in memory."""
        words = self.driver.table.entry(stream_id)
        return StreamTableEntry.from_bytes(words.tobytes()).config

    def reaches(self, stream_id: int, iova: int = IOVA) -> int | None:
        """The address to which a stream's DMA goes; None when it is aborted."""
        try:
            return self.dma(iova, stream_id=stream_id)[0][0]
        except TransactionAborted:
            return None

    @property
    def steps(self) -> list[str]:
        """The steps of the detaches so far."""
        return [event.step.value for event in self.seen if isinstance(event, DetachStepped)]

    @property
    def tables(self) -> bytes:
        """All memory in which tables are."""
        return bytes(self.ram[:TABLES])


def acpi_device() -> DmaDevice:
    """Streams 0x20 to 0x23 by 0 to 3, and 0x30 by 8."""
    return DmaDevice("acpi", id_mappings=[IdMapping(0, 4, 0x20), IdMapping(8, 1, 0x30)])
