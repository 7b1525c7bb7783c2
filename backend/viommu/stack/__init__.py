"""Driver objects, device objects and the stacks they form, as in Windows' I/O manager, and the filters that see a DMA
on its way down. `manager` knows no PCI, no socket and no DMA; `endpoint` binds a stack to the function that it is of.
"""

from viommu.stack.filters import Abort, Filter, FilterDevice, Outcome, Request
from viommu.stack.manager import IoManager
from viommu.stack.objects import DeviceObject, DriverObject, Pending

__all__ = [
    "Abort",
    "DeviceObject",
    "DriverObject",
    "Filter",
    "FilterDevice",
    "IoManager",
    "Outcome",
    "Pending",
    "Request",
]
