"""A served function as a device object, at the bottom of its stack."""

import re
from collections.abc import Callable
from pathlib import Path

from viommu.endpoints.port import DmaPort
from viommu.stack.events import UnplugWanted
from viommu.stack.filters import FilterDevice
from viommu.stack.manager import IoManager
from viommu.stack.objects import DeviceObject, DriverObject
from viommu.stack.path import FilteredPath
from viommu.trace import Tracer

_LONGEST = 126  # and a `_` before it


class EndpointDevice(DeviceObject):
    """The device object of a function. Its references are those of others and its transactions in flight."""

    def __init__(
        self,
        name: str,
        port: DmaPort,
        tracer: Tracer,
        *,
        plugged: Callable[[], bool],
        withdraw: Callable[[], None],
    ) -> None:
        """`plugged` says whether a QEMU has the function; `withdraw` closes its socket, also if it is closed."""
        super().__init__(name)
        self.plugged, self.withdraw = plugged, withdraw
        self.unplugging = False
        """Its references are gone, and it waits to be unplugged."""
        self._port, self._tracer = port, tracer

    @property
    def transactions(self) -> int:
        """Transactions in flight at its port."""
        return self._port.in_flight

    def stopped(self) -> None:
        """The port takes no more transactions: they abort, as if Bus Master was off."""
        self._port.close("the device is being removed")

    def stack_changed(self) -> None:
        """Lead the port's transactions through the filters that are above now."""
        filters = [each for each in self.above if isinstance(each, FilterDevice)]
        filters = [each for each in reversed(filters) if not each.pending]
        port = self._port
        port.path = FilteredPath(port, filters, self._tracer) if filters else None


def driver_name(model: str) -> str:
    """Of the driver of the functions of `model`: the end of its path, where `_` stands for what no name has."""
    name = re.sub(r"[^\w.:-]", "_", Path(model).name, flags=re.ASCII)[-_LONGEST:]
    return name if re.match(r"[A-Za-z_]", name) else f"_{name}"


class EndpointDriver(DriverObject):
    """The driver object of the functions of one model."""

    def remove_device(self, io: IoManager, device: DeviceObject) -> None:
        """Wait until no QEMU has the function any more, then close its socket and delete the device."""
        assert isinstance(device, EndpointDevice)
        if device.plugged():
            if not device.unplugging:
                device.unplugging = True
                if io.tracer:
                    io.tracer.emit(UnplugWanted(device.name))
            return
        device.withdraw()
        io.delete_device(device)

    def surprise_removal(self, device: DeviceObject) -> None:
        """Close the socket: QEMU reads all ones from here on."""
        assert isinstance(device, EndpointDevice)
        device.withdraw()
