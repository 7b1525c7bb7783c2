"""PCI devices in Python over vfio-user: `PciDevice`, on ctypes bindings to libvfio-user.

Knows nothing of any particular device. The C functions are in `Library.call`, their types in
`vfio_user.abi`.
"""

from vfio_user.abi import ResetType
from vfio_user.device import PciDevice
from vfio_user.dma import DmaRegion
from vfio_user.errors import (
    ClientLost,
    DeviceError,
    LibraryError,
    LibraryNotFound,
    SocketBusy,
    SocketError,
    VfioUserError,
)
from vfio_user.library import Library

__all__ = [
    "ClientLost",
    "DeviceError",
    "DmaRegion",
    "Library",
    "LibraryError",
    "LibraryNotFound",
    "PciDevice",
    "ResetType",
    "SocketBusy",
    "SocketError",
    "VfioUserError",
]
