"""What a stack is made of: driver objects, and the device objects that they create."""

from collections import Counter
from collections.abc import Iterator
from enum import Flag, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from viommu.stack.manager import IoManager


class Pending(Flag):
    """What a device object waits for, until its references are gone. With any of them it takes nothing new."""

    NOTHING = 0
    UNLOAD = auto()
    """Its driver is marked for unload."""
    REMOVE = auto()
    """It was asked to leave."""
    SURPRISE = auto()
    """It has left, and nobody was asked."""
    DELETE = auto()
    """Its driver has deleted it."""


class DriverObject:
    """A driver: the device objects that it has created, and what it does when one of them goes."""

    can_unload = True
    """Whether it has an Unload routine."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.devices: list[DeviceObject] = []
        self.unload_pending = False
        """It is marked for unload."""
        self.unload_invoked = False
        """No reference to its devices is left, and it is letting them go."""

    def remove_device(self, io: "IoManager", device: "DeviceObject") -> None:
        """Let go of what `device` stands for, and delete it: its references are gone (IRP_MN_REMOVE_DEVICE, Unload).

        A driver that has to wait for somebody returns without having deleted it, and is asked again.
        """
        if device.attached_to is not None:
            io.detach_device(device.attached_to)
        io.delete_device(device)

    def surprise_removal(self, device: "DeviceObject") -> None:
        """The device is gone already (IRP_MN_SURPRISE_REMOVAL); there are references to its object."""


class DeviceObject:
    """A device. `attached_device` is the one above it in its stack, `attached_to` the one below.

    `references` counts who holds it, by name; an attached device holds the one below it by its own name.
    """

    driver: DriverObject

    def __init__(self, name: str, alignment_requirement: int = 0) -> None:
        """`alignment_requirement` is the alignment of buffers in bytes, less one."""
        self.name = name
        self.alignment_requirement = alignment_requirement
        self.stack_size = 1
        self.attached_device: DeviceObject | None = None
        self.attached_to: DeviceObject | None = None
        self.pending = Pending.NOTHING
        self.deleted = False
        self.references: Counter[str] = Counter()
        self.in_flight = 0

    @property
    def transactions(self) -> int:
        """Transactions that are passing it now. Each holds a reference."""
        return self.in_flight

    @property
    def reference_count(self) -> int:
        """Of all references. What is pending happens when there are none."""
        return self.references.total() + self.transactions

    @property
    def above(self) -> Iterator["DeviceObject"]:
        """The devices above it, the next one first."""
        device = self.attached_device
        while device is not None:
            yield device
            device = device.attached_device

    @property
    def bottom(self) -> "DeviceObject":
        """The lowest device of its stack."""
        device = self
        while device.attached_to is not None:
            device = device.attached_to
        return device

    def stopped(self) -> None:
        """It takes no new transactions from here on: something is pending."""

    def stack_changed(self) -> None:
        """Called of the lowest device when one above it came, went, or takes no more transactions."""
