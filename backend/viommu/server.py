"""Puts the models of one machine on vfio-user sockets, and runs them all in the one event loop.

Each function has its own socket and its own view of guest RAM. Requests of the guest come first; between them the
scheduler lets one model do one small step, so that DMA is in flight while the guest goes on. The order of steps comes
from one seed.
"""

import logging
import select
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Protocol, Self

from vfio_user import ClientLost, DeviceError, DmaRegion, PciDevice, ResetType
from viommu.endpoints.base import Bar, Endpoint, ExtendedCapability, Identity
from viommu.endpoints.pasid import PASID_CAPABILITY, PasidService
from viommu.endpoints.port import DmaPort
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.layouts.registers import REGISTER_FRAME_SIZE
from viommu.memory import GuestMemory
from viommu.smmu import Features, Smmu
from viommu.trace import Event, Tracer

_log = logging.getLogger(__name__)
_INVALIDATION_TIMEOUT = 60.0
# Seconds in which a function answers an ATS Invalidate Request (PCIe, 10.3.1: one minute).
_IDLE = 200  # milliseconds after which an idle loop looks whether it shall stop
# Requests of one client in a row, and how often to look for the next one. While a model has work, a client that sends
# without end must not keep it from its next step, and waiting for a client would.
_PATIENT, _BRIEF = (64, 8), (16, 0)

# PCI Express capability (PCI Express Base, 7.5.3).
_CAPABILITIES, _EXPRESS, _DEVICE_CAPABILITIES_2, _END_END_PREFIX = 0x34, 0x10, 0x24, 1 << 21

_NOT_SHARED = (
    "%s: no DMA goes through, for QEMU keeps guest RAM to itself: start it with "
    "-object memory-backend-memfd,id=ram,size=…,share=on -machine …,memory-backend=ram"
)

SMMU_IDENTITY = Identity(vendor_id=0x1234, device_id=0x5303, class_code=0x080600)
"""An IOMMU by its class code; the numbers are of QEMU's space for experiments."""


class FunctionSpec(Protocol):
    """What the server must know of a function: `viommu.lab.config.Device` says it."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def stream_id(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ClientAttached(Event):
    """A QEMU connected to the function's socket."""

    function: str


@dataclass(frozen=True, slots=True)
class ClientDetached(Event):
    """The QEMU of the function's socket is gone; the function was reset."""

    function: str


@dataclass(frozen=True, slots=True)
class FunctionReset(Event):
    """The guest reset the function."""

    function: str
    reset: str


@dataclass(frozen=True, slots=True)
class BusMasterChanged(Event):
    """The guest allowed DMA of the function, or forbade it."""

    function: str
    enabled: bool


@dataclass(frozen=True, slots=True)
class FunctionFailed(Event):
    """A step of the function's model raised an exception: it is dead until it is reset."""

    function: str
    error: str


@dataclass(frozen=True, slots=True)
class ServerHolds(Event):
    """What the server keeps for its guest: TLB entries, cached structures, transactions, ranges of guest RAM."""

    tlb: int
    configuration: int
    in_flight: int
    memory_regions: int


class _SmmuFunction:
    """The SMMU as the server sees a function: its registers are BAR 0."""

    identity = SMMU_IDENTITY
    bars = (Bar(0, REGISTER_FRAME_SIZE),)
    msix_vectors = 0
    capabilities = ()

    def __init__(self, smmu: Smmu) -> None:
        self._smmu = smmu
        self.interrupt: Callable[[int], bool] = lambda _: False
        smmu.interrupt = lambda: self.interrupt(0)

    @property
    def busy(self) -> bool:
        return self._smmu.busy

    def read(self, bar: int, offset: int, size: int) -> int:  # noqa: ARG002 - there is one BAR
        return self._smmu.read(offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self._smmu.write(offset, size, value)

    def step(self) -> bool:
        return self._smmu.step()

    def reset(self) -> None:
        self._smmu.reset()


class _Function:
    """A model on its socket.

    A model whose step raised an exception is dead, like a card that was pulled: it reads as all ones and takes no
    writes until the guest resets it or another client comes.
    """

    def __init__(
        self,
        name: str,
        model: Endpoint,
        memory: GuestMemory,
        port: DmaPort | None,
        socket_path: Path,
        tracer: Tracer,
        msix: bool,
    ) -> None:
        self.name, self._model = name, model
        self.memory, self._port, self._tracer = memory, port, tracer
        self._dead = self._shared = self._complained = False
        self.device = device = PciDevice(socket_path, **model.identity._asdict())
        try:
            for bar in model.bars:
                device.add_bar(
                    bar.number,
                    bar.size,
                    read=partial(self._read, bar.number),
                    write=partial(self._write, bar.number),
                    is_64bit=bar.is_64bit,
                    prefetchable=bar.prefetchable,
                )
            self._capabilities = [
                (self._add_capability(capability), capability) for capability in model.capabilities
            ]
            if any(capability.id == PASID_CAPABILITY for capability in model.capabilities):
                self._allow_prefixes()
            vectors = model.msix_vectors if msix else 0
            device.set_interrupts(intx=1, msix=vectors, msix_bar=2 if vectors else None)
            device.realize()
        except BaseException:
            device.close()
            raise
        self._vectors = max(1, vectors)
        device.on_dma_map = self._map
        device.on_dma_unmap = self._unmap
        device.on_reset = self._reset
        device.on_config_write = self._configured
        device.on_disconnect = self._disconnected
        model.interrupt = self._interrupt

    def _add_capability(self, capability: ExtendedCapability) -> int:
        """Lay it out in config space; returns where its body begins."""
        header = self.device.add_capability(
            capability.id,
            capability.body,
            writable=capability.writable,
            clearable=capability.clearable,
            extended=True,
        )
        body = header + 4

        def publish(offset: int, data: bytes) -> None:
            with suppress(DeviceError):  # it is being closed, and nobody reads it any more
                self.device.config[body + offset : body + offset + len(data)] = data

        capability.publish = publish
        return body

    def _allow_prefixes(self) -> None:
        """Device Capabilities 2: End-End TLP prefixes, which carry PASIDs; Linux enables none without it."""
        config = self.device.config
        place = config[_CAPABILITIES]
        while place and config[place] != _EXPRESS:
            place = config[place + 1]
        if place:
            config[place + _DEVICE_CAPABILITIES_2 + 2] |= _END_END_PREFIX >> 16

    # What the guest does

    def _configured(self, offset: int, data: bytes) -> None:
        self._follow_bus_master()
        for body, capability in self._capabilities:
            end = body + len(capability.body)
            if offset < end and body < offset + len(data):
                capability.written(bytes(self.device.config[body:end]))

    def _read(self, bar: int, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1 if self._dead else self._model.read(bar, offset, size)

    def _write(self, bar: int, offset: int, data: bytes) -> None:
        if self._dead:
            return
        if not self._shared and not self._complained:
            self._sees_memory()  # a driver has come
        self._model.write(bar, offset, len(data), int.from_bytes(data, "little"))

    def _map(self, region: DmaRegion) -> None:
        self.memory.add_region(
            region.iova, region.size, region.view, region.readable, region.writable
        )
        if not self._shared:
            self._follow_bus_master()

    def _unmap(self, region: DmaRegion) -> None:
        self.memory.remove_region(region.iova, region.size)

    def _sees_memory(self) -> bool:
        """Whether the client shares any memory that can be written. That it does not is said once."""
        if not self._shared:
            regions = self.device.dma_regions
            self._shared = any(region.writable and region.view is not None for region in regions)
            if regions and not self._shared and not self._complained:
                self._complained = True
                _log.error(_NOT_SHARED, self.name)
        return self._shared

    def _follow_bus_master(self) -> None:
        enabled = self.device.bus_master and self._sees_memory()
        if self._port is None or self._port.bus_master == enabled:
            return
        self._port.bus_master = enabled
        if self._tracer:
            self._tracer.emit(BusMasterChanged(self.name, enabled))

    def _reset(self, kind: ResetType) -> None:
        self._revive()
        if self._tracer:
            self._tracer.emit(FunctionReset(self.name, kind.name))

    def _disconnected(self) -> None:
        self._revive()
        self._shared = self._complained = False
        if self._tracer:
            self._tracer.emit(ClientDetached(self.name))

    def _revive(self) -> None:
        self._dead = False
        self._model.reset()
        self._follow_bus_master()

    # What the model does

    def _interrupt(self, vector: int) -> bool:
        return vector < self._vectors and self.device.trigger_interrupt(vector)

    @property
    def busy(self) -> bool:
        """`step` has work to do."""
        return self._model.busy and not self._dead

    def step(self) -> None:
        """Let the model do one small thing."""
        try:
            self._model.step()
        except Exception as error:
            _log.exception("%s: the model failed: it is dead until it is reset", self.name)
            self._dead = True
            if self._tracer:
                self._tracer.emit(FunctionFailed(self.name, repr(error)))

    def serve(self, *, patient: bool) -> None:
        """Take a client, or what the client has sent. The descriptor to poll may be another afterwards.

        `patient` is to look a little longer for the next request, when no other work waits.
        """
        if self.device.attached:
            limit, spin = _PATIENT if patient else _BRIEF
            try:
                self.device.run(limit, spin)
            except ClientLost:
                _log.info("%s: the client is gone", self.name)
        elif self.device.attach():
            _log.info("%s: a client attached", self.name)
            if self._tracer:
                self._tracer.emit(ClientAttached(self.name))


class Server:
    """Serves the functions of one machine on sockets in `directory`, named after them.

    At most one function is the SMMU; every other reaches guest RAM through it. Raises what `vfio_user.PciDevice` does
    when a socket cannot be had.
    """

    def __init__(
        self,
        functions: Sequence[FunctionSpec],
        directory: Path,
        *,
        tracer: Tracer | None = None,
        features: Features | None = None,
        msix: bool = False,
        seed: int = 0,
        invalidation_timeout: float = _INVALIDATION_TIMEOUT,
    ) -> None:
        """`invalidation_timeout`, in seconds, is how long the SMMU waits for a function's translation cache."""
        self.tracer = tracer if tracer is not None else Tracer()
        self.sockets: dict[str, Path] = {}
        self._order = Random(seed)  # noqa: S311 - replayed, not secret
        self._functions: list[_Function] = []
        self._open = ExitStack()
        self._stopped = self._asked = False
        self._patience = invalidation_timeout
        self._awaited: tuple[object | None, float] = None, 0.0
        self._smmu: Smmu | None = None
        try:
            for spec in sorted(functions, key=lambda spec: spec.model != "smmuv3"):
                memory = GuestMemory()
                port: DmaPort | None = None
                model: Endpoint
                if spec.model == "smmuv3":
                    self._smmu = Smmu(memory, features, self.tracer)
                    model = _SmmuFunction(self._smmu)
                else:
                    port = DmaPort(memory, spec.stream_id, self._smmu, self.tracer)
                    if self._smmu is not None and self._smmu.features.endpoint_pasid:
                        port.pasid = PasidService(self._smmu.features.substream_id_bits)
                    model = SmmuTestEngine(
                        port, name=spec.name, order=self._order, tracer=self.tracer
                    )
                path = directory / f"{spec.name}.sock"
                function = _Function(spec.name, model, memory, port, path, self.tracer, msix)
                self._open.callback(function.device.close)
                self._functions.append(function)
                self.sockets[spec.name] = path
            self._watch()
        except BaseException:
            self._open.close()
            raise

    def run(self) -> None:
        """Serve until `stop` is called, from a signal handler or a model's callback."""
        while not self._stopped:
            self.turn(_IDLE)
            if self._asked:
                self._asked = False
                self._report()

    def turn(self, patience: int = 0) -> bool:
        """Take what the clients have sent, then let one model that had work before do one step. True when one did.

        When none had work, wait up to `patience` milliseconds for a client.
        """
        busy = [function for function in self._functions if function.busy]
        changed = False
        for descriptor, _ in self._poller.poll(0 if busy else patience):
            function = self._polled[descriptor]
            function.serve(patient=not busy)
            changed |= function.device.fileno() != descriptor
        if changed:
            self._watch()
        if busy:
            self._order.choice(busy).step()
        if self._smmu is not None and len(self._smmu.ats_port):
            self._await_function(self._smmu)
        return bool(busy)

    def _await_function(self, smmu: Smmu) -> None:
        """The SMMU has no clock: tell it when a function took too long to answer."""
        oldest, now = smmu.ats_port.oldest, time.monotonic()
        if oldest is not self._awaited[0]:
            self._awaited = oldest, now
        elif now - self._awaited[1] > self._patience:
            self._awaited = None, 0.0
            _log.warning("%d ATS invalidations were not answered in time", smmu.give_up())

    def _watch(self) -> None:
        self._poller = select.poll()
        self._polled = {function.device.fileno(): function for function in self._functions}
        for descriptor in self._polled:
            self._poller.register(descriptor, select.POLLIN)

    def _report(self) -> None:
        if self.tracer:
            smmu = self._smmu
            self.tracer.emit(
                ServerHolds(
                    tlb=len(smmu.tlb) if smmu else 0,
                    configuration=len(smmu.configuration) if smmu else 0,
                    in_flight=len(smmu.in_flight) if smmu else 0,
                    memory_regions=sum(len(f.memory.regions) for f in self._functions),
                )
            )

    def report(self) -> None:
        """Let `run` emit what the server holds; from a signal handler, for one."""
        self._asked = True

    def stop(self) -> None:
        """Let `run` return."""
        self._stopped = True

    def close(self) -> None:
        """End all connections and remove the sockets."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
