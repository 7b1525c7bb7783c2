"""The base of a device of one's own: a DMA master whose work is generators (docs/devices.md)."""

from collections.abc import Generator
from typing import Any, ClassVar

from viommu.endpoints.base import Bar, Endpoint, ExtendedCapability, Identity
from viommu.endpoints.port import UNPRIVILEGED_DATA, DmaAttributes, DmaFault, DmaPort
from viommu.endpoints.tasks import Tasks
from viommu.endpoints.transfers import Steps, Transfers
from viommu.trace import Tracer

__all__ = ["Bar", "DmaAttributes", "DmaFault", "DmaMaster", "Identity", "Steps"]


class DmaMaster(Endpoint):
    """Derive a device from it: say `identity` and `bars`, and define `power_on`, `read` and `write`.

    What takes time is a generator, begun by `start`. In it `yield from self.dma.read(…)` and `self.dma.write(…)` move
    bytes; while they do the guest runs on, and may take away what is being read. It sees a refused DMA as `DmaFault`.
    """

    attributes: ClassVar[DmaAttributes] = UNPRIVILEGED_DATA
    """What the transactions of `dma` say of themselves; with `ats` they go out Translated."""

    def __init__(self, port: DmaPort, *, name: str, tracer: Tracer | None = None) -> None:
        """`name` is the device's in its machine. Its `options` come as further arguments."""
        self.name, self.port = name, port
        self.tracer = tracer if tracer is not None else Tracer()
        """`if self.tracer: self.tracer.emit(event)` tells whoever reads along."""
        self.dma = Transfers(port, attributes=self.attributes)
        self.interrupt = lambda _vector: False
        self.pin_enabled = lambda: False
        self._tasks = Tasks()

    def power_on(self) -> None:
        """Give the registers their initial values. Called before all else, and by each reset when all work is over."""

    def start(self, work: Generator[Any, None, None]) -> None:
        """Begin `work`. What was begun before goes on: they take turns."""
        if not isinstance(work, Generator):
            raise TypeError("start takes a generator: start(self.work()), where work has a yield")
        self._tasks.spawn(work)

    @property
    def capabilities(self) -> tuple[ExtendedCapability, ...]:
        """ATS, PRI and PASID, where the SMMU and the profile have them."""
        return self.port.capabilities

    @property
    def idle(self) -> bool:
        """No work is under way, nor waits for software."""
        return not len(self._tasks)

    @property
    def busy(self) -> bool:
        """Some work can go on."""
        return self._tasks.busy

    def step(self) -> bool:
        """Let one generator go on."""
        self._tasks.step()
        return self.busy

    def reset(self) -> None:
        """End all work, what is in flight without moving its bytes, and `power_on`."""
        self._tasks.clear()
        self.port.reset()
        self.power_on()
