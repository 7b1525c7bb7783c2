"""A model on its vfio-user socket: what the guest does reaches the model, and what it does the guest."""

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vfio_user import ClientLost, DeviceError, DmaRegion, LibraryError, PciDevice, ResetType
from viommu.endpoints import meddle
from viommu.endpoints.base import Bar, Endpoint, ExtendedCapability, Identity
from viommu.endpoints.pasid import PASID_CAPABILITY
from viommu.endpoints.points import (
    ConfigAccess,
    FunctionInterrupts,
    FunctionResetting,
    MmioAccess,
)
from viommu.endpoints.port import DmaPort
from viommu.layouts.registers import register_name
from viommu.memory import GuestMemory
from viommu.smmu import Smmu
from viommu.trace import Event, Skip, Tracer

_log = logging.getLogger(__name__)
_FAILURES = (Exception, SystemExit)  # what a model raises, and so fails alone
# Requests of one client in a row, and how often to look for the next one. While a model has work, a client that sends
# without end must not keep it from its next step, and waiting for a client would.
_PATIENT, _BRIEF = (64, 8), (16, 0)

# PCI Express capability (PCI Express Base, 7.5.3).
_COMMAND_HIGH, _INTX_DISABLE = 0x05, 1 << 10 >> 8
_CAPABILITIES, _EXPRESS, _DEVICE_CAPABILITIES_2, _END_END_PREFIX = 0x34, 0x10, 0x24, 1 << 21

_NOT_SHARED = (
    "%s: no DMA goes through, for QEMU keeps guest RAM to itself: start it with "
    "-object memory-backend-memfd,id=ram,size=…,share=on -machine …,memory-backend=ram"
)

SMMU_IDENTITY = Identity(vendor_id=0x1234, device_id=0x5303, class_code=0x080600)
"""An IOMMU by its class code; the numbers are of QEMU's space for experiments."""


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
    """The function's model raised an exception: it is dead until it is reset."""

    function: str
    error: str


class SmmuFunction(Endpoint):
    """The SMMU as the server sees a function: its registers are BAR 0."""

    identity = SMMU_IDENTITY

    def __init__(self, smmu: Smmu) -> None:
        self._smmu = smmu
        self.interrupt = lambda _: False
        smmu.interrupt = lambda: self.interrupt(0)

    @property
    def bars(self) -> tuple[Bar, ...]:
        return (Bar(0, self._smmu.features.frame_size, prefetchable=True),)

    @property
    def busy(self) -> bool:
        return self._smmu.busy

    def register_name(self, offset: int) -> str:
        return register_name(offset)

    def read(self, bar: int, offset: int, size: int) -> int:  # noqa: ARG002 - there is one BAR
        return self._smmu.read(offset, size)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self._smmu.write(offset, size, value)

    def step(self) -> bool:
        return self._smmu.step()

    def reset(self) -> None:
        self._smmu.reset()


def _free_bar(bars: Iterable[Bar]) -> int:
    """The first BAR that a model leaves free; 6, which is none, when it leaves none."""
    taken = {bar.number + half for bar in bars for half in range(1 + bar.is_64bit)}
    return next(number for number in range(7) if number not in taken)


class Function:
    """A model on its socket.

    A model that raised an exception is dead, like a card that was pulled: it reads as all ones, takes no writes and has
    nothing in flight until the guest resets it or another client comes.
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
        self.memory, self.port, self._tracer = memory, port, tracer
        self._stepping = self._reset_due = False
        self._dead = self._shared = self._complained = self._unserved = False
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
            device.set_interrupts(
                intx=1, msix=vectors, msix_bar=_free_bar(model.bars) if vectors else None
            )
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
        device.on_pin_released = self._pin_released
        device.config_filter = self._filter_config
        model.interrupt = self._interrupt
        model.pin_enabled = self._pin_enabled

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
                try:
                    capability.written(bytes(self.device.config[body:end]))
                except _FAILURES as error:
                    self._failed(error)

    def _read(self, bar: int, offset: int, size: int) -> int:
        if self._dead:
            return (1 << 8 * size) - 1
        try:
            value = self._model.read(bar, offset, size)
            if value >> 8 * size:
                value &= (1 << 8 * size) - 1
        except _FAILURES as error:
            self._failed(error)
            return (1 << 8 * size) - 1
        if self._tracer.meddler is None:
            return value
        return meddle.read(self._tracer.meddler, self._accessed(offset, False, size, value))

    def _write(self, bar: int, offset: int, data: bytes) -> None:
        if self._dead:
            return
        if not self._shared and not self._complained:
            self._sees_memory()  # a driver has come
        value = int.from_bytes(data, "little")
        if self._tracer.meddler is not None:
            point = self._accessed(offset, True, len(data), value)
            meddled = meddle.write(self._tracer.meddler, point)
            if meddled is None:
                return
            value = meddled
        try:
            self._model.write(bar, offset, len(data), value)
        except _FAILURES as error:
            self._failed(error)

    def _accessed(self, offset: int, write: bool, size: int, value: int) -> MmioAccess:
        return MmioAccess(self.name, self._model.register_name(offset), write, size, value)

    def _filter_config(self, offset: int, data: bytes, write: bool) -> bytes | None:
        """What is read, or written, instead of `data`; None: it is not written."""
        if self._tracer.meddler is None:
            return data
        size, value = len(data), int.from_bytes(data, "little")
        point = ConfigAccess(self.name, offset, write, size, value)
        meddled = (meddle.write if write else meddle.read)(self._tracer.meddler, point)
        return None if meddled is None else meddled.to_bytes(size, "little")

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
        if self.port is None or self.port.closed or self.port.bus_master == enabled:
            return
        self.port.bus_master = enabled
        if self._tracer:
            self._tracer.emit(BusMasterChanged(self.name, enabled))

    def _reset(self, kind: ResetType) -> None:
        meddler = self._tracer.meddler
        if meddler is not None and isinstance(
            meddler(FunctionResetting(self.name, kind.name)), Skip
        ):
            self._follow_bus_master()
            return
        self._revive()
        if self._tracer:
            self._tracer.emit(FunctionReset(self.name, kind.name))

    def _disconnected(self) -> None:
        self.memory.guests += 1
        self._revive()
        self._shared = self._complained = False
        if self._tracer:
            self._tracer.emit(ClientDetached(self.name))

    def _revive(self) -> None:
        self._dead = False
        self.reset_model()
        self._follow_bus_master()

    def reset_model(self) -> None:
        """All its work ends, its registers are as at power-on. In the middle of a step it happens right after that."""
        if self._stepping:
            self._reset_due = True
            return
        try:
            self._model.reset()
        except _FAILURES as error:
            self._failed(error)

    def _pin_released(self) -> None:
        if self._dead:
            return
        try:
            self._model.pin_released()
        except _FAILURES as error:
            self._failed(error)

    # What the model does

    def _interrupt(self, vector: int) -> bool:
        if self._tracer.meddler is not None:
            guest = self.memory.guests
            return meddle.interrupt(
                self._tracer.meddler,
                FunctionInterrupts(self.name, vector),
                lambda: self.memory.guests == guest and self.trigger(vector),
            )
        return self.trigger(vector)

    def _pin_enabled(self) -> bool:
        return not self.device.config[_COMMAND_HIGH] & _INTX_DISABLE

    def trigger(self, vector: int) -> bool:
        """Send an interrupt; False when nobody listens, as when the device was pulled out."""
        if vector >= self._vectors or not self.device.attached:
            return False
        return self.device.trigger_interrupt(vector)

    @property
    def dead(self) -> bool:
        """Its model failed, and nobody has reset it since."""
        return self._dead

    @property
    def busy(self) -> bool:
        """`step` has work to do."""
        try:
            return not self._dead and self._model.busy
        except _FAILURES as error:
            self._failed(error)
            return False

    def step(self) -> None:
        """Let the model do one small thing."""
        self._stepping = True
        try:
            self._model.step()
        except _FAILURES as error:
            self._failed(error)
        finally:
            self._stepping = False
        if self._reset_due:
            self._reset_due = False
            self.reset_model()

    def _failed(self, error: BaseException) -> None:
        _log.error("%s: the model failed: it is dead until it is reset", self.name, exc_info=error)
        self._dead = True
        if self._tracer:
            self._tracer.emit(FunctionFailed(self.name, repr(error)))
        if self.port is not None:
            with suppress(*_FAILURES):  # if it still can
                self._model.reset()

    def serve(self, *, patient: bool) -> None:
        """Take a client, or what the client has sent. The descriptor to poll may be another afterwards.

        `patient` is to look a little longer for the next request, when no other work waits.
        """
        try:
            if self.device.attached:
                self.device.run(*(_PATIENT if patient else _BRIEF))
            elif self.device.attach():
                _log.info("%s: a client attached", self.name)
                if self._tracer:
                    self._tracer.emit(ClientAttached(self.name))
        except ClientLost:
            _log.info("%s: the client is gone", self.name)
        except LibraryError as error:
            if not self._unserved:
                _log.error("%s: the client cannot be served: %s", self.name, error)
            self._unserved = True
            if self.device.attached:
                self.device.hang_up()
        else:
            self._unserved = False
