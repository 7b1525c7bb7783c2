"""What stacks tell the trace."""

from dataclasses import dataclass

from viommu.trace import Event


@dataclass(frozen=True, slots=True)
class DeviceAttached(Event):
    """`device` is above `lower` from here on."""

    device: str
    lower: str
    stack_size: int


@dataclass(frozen=True, slots=True)
class DeviceDetached(Event):
    """`device` is no longer above `lower`."""

    device: str
    lower: str


@dataclass(frozen=True, slots=True)
class DeviceStopped(Event):
    """`device` takes no new transactions, and waits for its references (with those of transactions in flight)."""

    device: str
    pending: str
    references: int


@dataclass(frozen=True, slots=True)
class DeviceDeleted(Event):
    """No reference was left, and the device object is gone."""

    device: str


@dataclass(frozen=True, slots=True)
class DriverUnloading(Event):
    """The driver was marked for unload, and no reference to its devices is left."""

    driver: str


@dataclass(frozen=True, slots=True)
class DriverUnloaded(Event):
    """The driver's last device object is gone, and so is the driver."""

    driver: str


@dataclass(frozen=True, slots=True)
class UnplugWanted(Event):
    """The function is to leave the guest, which nobody but who has QEMU's monitor can do (`device_del`)."""

    function: str
