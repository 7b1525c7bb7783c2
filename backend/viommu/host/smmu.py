"""The host SMMU: the model, its memory, its driver, and the ports that it stands behind."""

import mmap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from viommu.driver.access import Poll
from viommu.driver.arena import Arena
from viommu.driver.errors import DriverError
from viommu.driver.smmu import SmmuDriver
from viommu.driver.stream_table import bypass_entry
from viommu.endpoints.host_path import HostPath
from viommu.endpoints.port import DmaPort
from viommu.memory import GuestMemory
from viommu.smmu import Features, Smmu
from viommu.smmu.events import RegisterAccess
from viommu.trace import Event, Tracer

HOST_FEATURES = Features(
    substream_id_bits=0,
    stage_2=False,
    hyp=False,
    granules=(12,),
    msi=False,
    httu=0,
    stall_model="terminate",
    ats=False,
    pri=False,
    atos=False,
)
"""Stage 1 with 4 KiB pages and blocks. Faults terminate: a guest that knows nothing of them cannot be kept waiting."""

_MEMORY = 64 << 20
"""Bytes for tables and queues. They take up memory only once they are written."""
_BASE = 1 << 32
"""Where the host SMMU sees them: nothing of the guest's is in this address space."""
_PATIENCE = 1.0


@dataclass(frozen=True, slots=True)
class HostSmmuEvent(Event):
    """An event of the host SMMU, of a kind of its own so that no reader takes it for one of the guest's."""

    event: Event

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "event": self.event.as_dict()}


class _HostTracer(Tracer):
    """Hands on what the host SMMU emits to the readers of `tracer`.

    Not the accesses to its registers: they are calls in this process, of a driver that polls.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __bool__(self) -> bool:
        return bool(self._tracer)

    def emit(self, event: Event) -> None:
        if not isinstance(event, RegisterAccess):
            self._tracer.emit(HostSmmuEvent(event))


class ModelRegisters:
    """`Registers` of a model in this process."""

    def __init__(self, smmu: Smmu) -> None:
        self._smmu = smmu

    def read32(self, offset: int) -> int:
        return self._smmu.read(offset, 4)

    def write32(self, offset: int, value: int) -> None:
        self._smmu.write(offset, 4, value)

    def read64(self, offset: int) -> int:
        return self._smmu.read(offset, 8)

    def write64(self, offset: int, value: int) -> None:
        self._smmu.write(offset, 8, value)


class HostSmmu:
    """Every stream bypasses it, and the ports do not even ask it, until `concern`.

    `ports` are the endpoints' by name. While the driver waits, `work` lets an endpoint do a step: what is in flight
    comes to its end, and nothing of a client is taken.
    """

    def __init__(
        self,
        ports: Mapping[str, DmaPort],
        work: Callable[[], None],
        tracer: Tracer,
        *,
        timeout: float = _PATIENCE,
    ) -> None:
        """`timeout`, in seconds, bounds every wait of the driver."""
        self.ports = ports
        view = memoryview(mmap.mmap(-1, _MEMORY))
        memory = GuestMemory()
        memory.add_region(_BASE, _MEMORY, view)
        self.interrupted = False
        """An event was recorded since somebody set this to False."""
        self.smmu = Smmu(memory, HOST_FEATURES, _HostTracer(tracer), self._interrupt)
        self._work = work
        self.memory = Arena([(_BASE, view)])
        """Where the tables are; for those of an unmanaged domain too."""
        poll = Poll(timeout, self._relax)
        self.driver = SmmuDriver(ModelRegisters(self.smmu), self.memory, poll)
        streams = max((port.stream_id for port in ports.values()), default=0).bit_length()
        self.driver.reset(self.driver.linear_table(streams, bypass_entry()), interrupts=True)

    def _interrupt(self) -> None:
        self.interrupted = True

    def _relax(self) -> None:
        self.smmu.step()
        self._work()

    def concern(self, port: DmaPort) -> None:
        """From here on the port's transactions pass the host SMMU, those in flight included."""
        if port.host is None:
            port.host = HostPath(self.smmu, port.stream_id, port.transactions)

    def release(self, port: DmaPort) -> None:
        """Let the stream bypass again, and the port pass the host SMMU by."""
        if port.host is not None:
            with suppress(DriverError):  # whatever it says of the stream, nobody asks any more
                self.driver.attach_bypass(port.stream_id)
            port.host.close()
            port.host = None
