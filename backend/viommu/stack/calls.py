"""The methods of the control socket for stacks."""

from typing import Any

from viommu.control import Checked, Methods, Refused
from viommu.layouts.ntstatus import NtStatus
from viommu.stack.endpoint import EndpointDevice
from viommu.stack.filters import FilterDevice
from viommu.stack.library import FILTERS
from viommu.stack.manager import IoManager
from viommu.stack.objects import DeviceObject, DriverObject


class StackCalls:
    """Registers `stack.*` in `methods`. A status that is no success is a refusal, with the status as data."""

    def __init__(self, io: IoManager, methods: Methods) -> None:
        self._io = io
        methods.add("stack.list", self.devices)
        methods.add("stack.drivers", self.drivers)
        methods.add("stack.attach", self.attach)
        methods.add("stack.detach", self.detach)
        methods.add("stack.unload", self.unload)
        methods.add("stack.remove", self.remove)
        methods.add("stack.surprise_remove", self.surprise_remove)
        methods.add("stack.reference", self.reference)
        methods.add("stack.release", self.release)

    def devices(self) -> list[dict[str, Any]]:
        """List the devices, stack by stack from the bottom: who holds each, and what it waits for."""
        bottoms = [each for each in self._io.devices.values() if each.attached_to is None]
        return [_row(device) for bottom in bottoms for device in (bottom, *bottom.above)]

    def drivers(self) -> list[dict[str, Any]]:
        """List the drivers, their devices, and whether they are to be unloaded."""
        return [
            {
                "driver": driver.name,
                "devices": [device.name for device in driver.devices],
                "state": _driver_state(driver),
            }
            for driver in self._io.drivers.values()
        ]

    def attach(
        self,
        filter: str,  # noqa: A002 - what the caller reads
        target: str,
        name: str | None = None,
        options: dict[str, Any] = {},  # noqa: B006 - nobody changes it
    ) -> dict[str, Any]:
        """Attach a filter at the top of the stack of a device; returns its device."""
        what = FILTERS.get(filter)
        if what is None:
            raise Refused(f"there is no filter {filter!r}, but {', '.join(FILTERS)}")
        io, made = self._io, what(**Checked(filter, what).arguments(options))
        device = FilterDevice(name or self._free_name(filter), made)
        driver = io.drivers.get(filter) or DriverObject(filter)
        if driver.name not in io.drivers:
            _expect(io.load_driver(driver), filter)
        _expect(io.create_device(driver, device), device.name)
        made.started(device.name, io.tracer)
        status = io.attach_device(device, target)
        if status is not NtStatus.SUCCESS:
            io.delete_device(device)
        _expect(status, target)
        return _row(device)

    def detach(self, device: str) -> dict[str, str]:
        """Detach a filter and delete it; PENDING while transactions that have passed it are in flight."""
        found = self._find(device)
        if found.attached_to is None:
            _expect(NtStatus.INVALID_DEVICE_REQUEST, device)
        elif found.attached_device is not None:
            _expect(NtStatus.DEVICE_BUSY, f"{device}: {found.attached_device.name} is above it")
        else:
            _expect(self._io.detach_device(found.attached_to), device)
        return _result(self._io.delete_device(found), device)

    def unload(self, driver: str) -> dict[str, str]:
        """Mark a driver for unload; PENDING until the references to its devices are gone."""
        return _result(self._io.unload_driver(driver), driver)

    def remove(self, device: str) -> dict[str, str]:
        """Let one device leave; PENDING until its references are gone."""
        return _result(self._io.remove_device(self._find(device)), device)

    def surprise_remove(self, device: str) -> dict[str, str]:
        """Pull a device out at once; PENDING until the references to its object are gone."""
        return _result(self._io.surprise_remove(self._find(device)), device)

    def reference(self, device: str, holder: str = "ctl") -> dict[str, Any]:
        """Hold a device: what is pending waits until it is released."""
        found = self._find(device)
        _expect(self._io.reference(found, f"{holder} (held)"), device)
        return _row(found)

    def release(self, device: str, holder: str = "ctl") -> dict[str, str]:
        """Release a device that was held; what was pending may happen at once."""
        return _result(self._io.dereference(self._find(device), f"{holder} (held)"), device)

    def _find(self, name: str) -> DeviceObject:
        device = self._io.devices.get(name)
        if device is None:
            _expect(NtStatus.OBJECT_NAME_NOT_FOUND, name)
        assert device is not None
        return device

    def _free_name(self, kind: str) -> str:
        number = 0
        while f"{kind}{number}" in self._io.devices:
            number += 1
        return f"{kind}{number}"


def _row(device: DeviceObject) -> dict[str, Any]:
    return {
        "device": device.name,
        "driver": device.driver.name,
        "attached_to": device.attached_to.name if device.attached_to else None,
        "stack_size": device.stack_size,
        "alignment": device.alignment_requirement,
        "references": dict(device.references),
        "transactions": device.transactions,
        "state": _state(device),
    }


def _state(device: DeviceObject) -> str:
    if isinstance(device, EndpointDevice) and device.unplugging:
        return "UNPLUGGING"
    return f"{device.pending.name}_PENDING" if device.pending else "STARTED"


def _driver_state(driver: DriverObject) -> str:
    if driver.unload_invoked:
        return "UNLOADING"
    return "UNLOAD_PENDING" if driver.unload_pending else "LOADED"


def _result(status: NtStatus, about: str) -> dict[str, str]:
    _expect(status, about)
    return {"status": status.name}


def _expect(status: NtStatus, about: str) -> None:
    if not status.success:
        raise Refused(f"{about}: {status.name} ({status:#010x})", status=status.name)
