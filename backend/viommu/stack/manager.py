"""The part of an I/O manager that attaches, detaches, counts references, deletes and unloads.

What it decides is what Windows' documentation says of IoAttachDevice, IoAttachDeviceToDeviceStack(Safe),
IoDetachDevice, IoDeleteDevice and the environment of Unload routines. It differs in this: what would be a driver's bug
has a status, the whole stack is looked at where the kernel looks at its top alone, and a call whose effect is deferred
returns PENDING where the kernel returns success.
"""

import re

from viommu.layouts.ntstatus import NtStatus
from viommu.stack.events import (
    DeviceAttached,
    DeviceDeleted,
    DeviceDetached,
    DeviceStopped,
    DriverUnloaded,
    DriverUnloading,
)
from viommu.stack.objects import DeviceObject, DriverObject, Pending
from viommu.trace import Tracer

_NAME = re.compile(r"[A-Za-z_][\w.:-]{0,126}", re.ASCII)


class IoManager:
    """The drivers that are loaded and the devices that there are, by name.

    Whoever ends transactions calls `settle` afterwards, at a place where a device may go, while there is something
    `pending`.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.drivers: dict[str, DriverObject] = {}
        self.devices: dict[str, DeviceObject] = {}
        self.tracer = tracer if tracer is not None else Tracer()
        self.pending: list[DeviceObject] = []
        """The devices that wait for their references."""

    # Coming

    def load_driver(self, driver: DriverObject) -> NtStatus:
        """Make `driver` known."""
        if not _NAME.fullmatch(driver.name):
            return NtStatus.OBJECT_NAME_INVALID
        if driver.name in self.drivers:
            return NtStatus.OBJECT_NAME_COLLISION
        self.drivers[driver.name] = driver
        return NtStatus.SUCCESS

    def create_device(self, driver: DriverObject, device: DeviceObject) -> NtStatus:
        """Make `device` one of `driver`'s. DELETE_PENDING: the driver is going, or gone."""
        if not _NAME.fullmatch(device.name):
            return NtStatus.OBJECT_NAME_INVALID
        if device.name in self.devices:
            return NtStatus.OBJECT_NAME_COLLISION
        if driver.unload_pending:
            return NtStatus.DELETE_PENDING
        if self.drivers.get(driver.name) is not driver:
            return NtStatus.INVALID_PARAMETER
        self.devices[device.name] = device
        device.driver = driver
        driver.devices.append(device)
        return NtStatus.SUCCESS

    def attach_device(self, source: DeviceObject, name: str) -> NtStatus:
        """Attach `source` at the top of the stack of the device called `name`."""
        if not _NAME.fullmatch(name):
            return NtStatus.OBJECT_NAME_INVALID
        target = self.devices.get(name)
        if target is None:
            return NtStatus.OBJECT_NAME_NOT_FOUND
        return self.attach_device_to_device_stack_safe(source, target)

    def attach_device_to_device_stack(
        self, source: DeviceObject, target: DeviceObject
    ) -> DeviceObject | None:
        """Attach `source` at the top of `target`'s stack; returns the device that is below it now, or None."""
        status = self.attach_device_to_device_stack_safe(source, target)
        return source.attached_to if status is NtStatus.SUCCESS else None

    def attach_device_to_device_stack_safe(
        self, source: DeviceObject, target: DeviceObject
    ) -> NtStatus:
        """The same, with a status: NO_SUCH_DEVICE when anything of the stack, or `source`, is gone or going."""
        stack = [target.bottom, *target.bottom.above]
        if any(device.deleted or device.pending for device in (*stack, source)):
            return NtStatus.NO_SUCH_DEVICE
        if source.attached_to is not None or source.attached_device is not None or source in stack:
            return NtStatus.INVALID_PARAMETER
        top = stack[-1]
        top.attached_device, source.attached_to = source, top
        top.references[source.name] += 1
        source.stack_size = top.stack_size + 1
        source.alignment_requirement = top.alignment_requirement
        stack[0].stack_changed()
        if self.tracer:
            self.tracer.emit(DeviceAttached(source.name, top.name, source.stack_size))
        return NtStatus.SUCCESS

    # References

    def reference(self, device: DeviceObject, holder: str) -> NtStatus:
        """Let `holder` hold `device`, once more: nothing that is pending happens until it lets go."""
        if device.deleted or device.pending:
            return NtStatus.NO_SUCH_DEVICE
        device.references[holder] += 1
        return NtStatus.SUCCESS

    def dereference(self, device: DeviceObject, holder: str) -> NtStatus:
        """Let `holder` let go, once. INVALID_PARAMETER: it holds nothing."""
        if device.deleted:
            return NtStatus.NO_SUCH_DEVICE
        if not device.references[holder]:
            return NtStatus.INVALID_PARAMETER
        self._drop(device, holder)
        self._settle(device)
        return NtStatus.SUCCESS

    @staticmethod
    def _drop(device: DeviceObject, holder: str) -> None:
        device.references[holder] -= 1
        if not device.references[holder]:
            del device.references[holder]

    # Going

    def detach_device(self, lower: DeviceObject) -> NtStatus:
        """Detach what is attached to `lower`, and drop its reference. What is above that one stays attached to it.

        Theirs is a stack of its own from here on, and its sizes are counted anew.

        When that was the last reference to `lower`, what is pending there happens: its driver is unloaded if it is
        marked for that. INVALID_DEVICE_REQUEST: nothing is attached, which the kernel does not check.
        """
        if lower.deleted:
            return NtStatus.NO_SUCH_DEVICE
        upper = lower.attached_device
        if upper is None:
            return NtStatus.INVALID_DEVICE_REQUEST
        lower.attached_device = upper.attached_to = None
        self._drop(lower, upper.name)
        for size, device in enumerate((upper, *upper.above), start=1):
            device.stack_size = size
        lower.bottom.stack_changed()
        if self.tracer:
            self.tracer.emit(DeviceDetached(upper.name, lower.name))
        self._settle(lower)
        return NtStatus.SUCCESS

    def delete_device(self, device: DeviceObject) -> NtStatus:
        """Delete `device` when its references are gone. PENDING: there are some.

        INVALID_DEVICE_REQUEST: it is attached to a lower device, and has to be detached first.
        """
        if device.deleted:
            return NtStatus.NO_SUCH_DEVICE
        if Pending.DELETE in device.pending:
            return NtStatus.DELETE_PENDING
        if device.attached_to is not None:
            return NtStatus.INVALID_DEVICE_REQUEST
        return self._go(device, Pending.DELETE)

    def remove_device(self, device: DeviceObject) -> NtStatus:
        """Let `device` leave when its references are gone. PENDING: there are some, or its driver takes its time."""
        if device.deleted:
            return NtStatus.NO_SUCH_DEVICE
        if device.pending & (Pending.REMOVE | Pending.SURPRISE | Pending.DELETE):
            return NtStatus.DELETE_PENDING
        return self._go(device, Pending.REMOVE)

    def surprise_remove(self, device: DeviceObject) -> NtStatus:
        """The device is gone, now; its object follows when its references are gone. PENDING: there are some."""
        if device.deleted:
            return NtStatus.NO_SUCH_DEVICE
        if Pending.SURPRISE in device.pending:
            return NtStatus.DELETE_PENDING
        self._stop(device, Pending.SURPRISE)
        device.driver.surprise_removal(device)
        return self._go(device, Pending.SURPRISE)

    def unload_driver(self, name: str) -> NtStatus:
        """Mark the driver for unload. PENDING: it is unloaded when no reference to any of its devices is left.

        No device attaches to its devices from here on, and they take no new transactions or references.
        INVALID_DEVICE_REQUEST: it cannot be unloaded.
        """
        driver = self.drivers.get(name)
        if driver is None:
            return NtStatus.OBJECT_NAME_NOT_FOUND
        if not driver.can_unload:
            return NtStatus.INVALID_DEVICE_REQUEST
        if not driver.unload_pending:
            driver.unload_pending = True
            for device in driver.devices:
                self._stop(device, Pending.UNLOAD)
            self._unload(driver)
        return NtStatus.SUCCESS if self.drivers.get(name) is not driver else NtStatus.PENDING

    def settle(self) -> None:
        """Let happen what is pending where no reference is left."""
        for device in tuple(self.pending):
            self._settle(device)

    def _go(self, device: DeviceObject, pending: Pending) -> NtStatus:
        self._stop(device, pending)
        self._settle(device)
        return NtStatus.SUCCESS if device.deleted else NtStatus.PENDING

    def _stop(self, device: DeviceObject, pending: Pending) -> None:
        first = not device.pending
        device.pending |= pending
        if not first:
            return
        self.pending.append(device)
        device.stopped()
        device.bottom.stack_changed()
        if self.tracer:
            name = str(pending.name)
            self.tracer.emit(DeviceStopped(device.name, name, device.reference_count))

    def _settle(self, device: DeviceObject) -> None:
        """Take the next step of a device without references, and of its driver."""
        driver = device.driver
        if device.pending and not device.deleted and not device.reference_count:
            if Pending.DELETE in device.pending:
                self._delete(device)
            elif device.pending & (Pending.REMOVE | Pending.SURPRISE) or driver.unload_invoked:
                driver.remove_device(self, device)
        if driver.unload_pending:
            self._unload(driver)

    def _unload(self, driver: DriverObject) -> None:
        if not driver.unload_invoked:
            if any(device.reference_count for device in driver.devices):
                return
            driver.unload_invoked = True
            if self.tracer:
                self.tracer.emit(DriverUnloading(driver.name))
            for device in tuple(driver.devices):
                self._settle(device)
        if not driver.devices and self.drivers.get(driver.name) is driver:
            del self.drivers[driver.name]
            if self.tracer:
                self.tracer.emit(DriverUnloaded(driver.name))

    def _delete(self, device: DeviceObject) -> None:
        device.deleted = True
        device.driver.devices.remove(device)
        self.pending.remove(device)
        del self.devices[device.name]
        if self.tracer:
            self.tracer.emit(DeviceDeleted(device.name))
