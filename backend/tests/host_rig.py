"""A port behind a guest's SMMU, in front of the host SMMU: what tests of the host SMMU have in common."""

from collections.abc import Callable

from tests.driver_rig import DATA, PAGE, RAM, STREAM
from tests.driver_rig import Rig as GuestRig
from viommu.driver.domain import Domain
from viommu.endpoints.port import DmaPort
from viommu.host.smmu import HostSmmu, HostSmmuEvent
from viommu.trace import Event, Tracer

IOVA = 0x1_0000
LIMIT = 1 << 31
"""The end of what identity domains map; guest RAM is below."""


class HostRig:
    """The guest maps pages at `IOVA`, in descending order, to guest RAM from `DATA` on.

    With `behind` False it has no SMMU. `work` runs while the host's driver waits.
    """

    pages = tuple(DATA + PAGE * place for place in (3, 2, 1, 0))

    def __init__(self, *, behind: bool = True) -> None:
        self.events: list[Event] = []
        tracer = Tracer()
        self.guest = GuestRig()
        self.guest.driver.reset()
        domain = self.guest.driver.create_domain()
        domain.map_pages(IOVA, self.pages)
        self.guest.driver.attach(STREAM, domain, ats=True)
        smmu = self.guest.smmu if behind else None
        self.port = DmaPort(self.guest.memory, STREAM, smmu, tracer)
        self.port.bus_master = True
        self.work: Callable[[], object] = lambda: None
        self.host = HostSmmu({"engine0": self.port}, lambda: self._work(), tracer, timeout=0.2)
        tracer.subscribe(self.events.append)

    def _work(self) -> None:
        self.work()

    def attach(self, *holes: int) -> Domain:
        """Put the stream under a host domain that maps everything 1:1 but the pages `holes`."""
        domain = self.host.driver.create_domain()
        start = 0
        for hole in sorted(holes):
            domain.map(start, start, hole - start)
            start = hole + PAGE
        domain.map(start, start, LIMIT - start)
        self.host.concern(self.port)
        self.host.driver.attach(STREAM, domain)
        return domain

    def write(self, iova: int, data: bytes, **access: int) -> int:
        """Write by DMA; the size of the one transaction that it began. Raises `DmaFault`."""
        with self.port.begin(iova, len(data), write=True, **access) as transfer:  # type: ignore[arg-type]
            transfer.write_from(data)
            return transfer.size

    def ram(self, address: int, size: int = PAGE) -> bytes:
        return bytes(self.guest.ram[address - RAM : address - RAM + size])

    def in_flight(self) -> tuple[int, int]:
        """Transactions in flight in the guest's SMMU and in the host's."""
        return len(self.guest.smmu.in_flight), len(self.host.smmu.in_flight)

    def of_host(self) -> list[str]:
        """The kinds of the host SMMU's events."""
        return [each.event.kind for each in self.events if isinstance(each, HostSmmuEvent)]
