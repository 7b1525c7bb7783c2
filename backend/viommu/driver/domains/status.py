"""The statuses that the calls return: NTSTATUS values."""

from enum import IntEnum

from viommu.driver.errors import (
    CommandQueueError,
    DriverError,
    DriverTimeout,
    MappingError,
    OutOfMemory,
    StreamError,
    UnsupportedSmmu,
)
from viommu.layouts.registers import CommandError

_SEVERITY_WARNING = 0x8000_0000


class NtStatus(IntEnum):
    """NTSTATUS, with the values of Windows. What each means here stands with the calls that return it.

    INVALID_PARAMETER_n is about the n-th argument of the call.
    """

    SUCCESS = 0x0000_0000
    ALREADY_DISCONNECTED = 0x8000_0025
    UNSUCCESSFUL = 0xC000_0001
    INVALID_HANDLE = 0xC000_0008
    NO_SUCH_DEVICE = 0xC000_000E
    CONFLICTING_ADDRESSES = 0xC000_0018
    NOT_MAPPED_VIEW = 0xC000_0019
    INVALID_PARAMETER_MIX = 0xC000_0030
    DEVICE_ALREADY_ATTACHED = 0xC000_0038
    SHARING_VIOLATION = 0xC000_0043
    INSUFFICIENT_RESOURCES = 0xC000_009A
    FREE_VM_NOT_AT_BASE = 0xC000_009F
    IO_TIMEOUT = 0xC000_00B5
    NOT_SUPPORTED = 0xC000_00BB
    INVALID_PARAMETER_1 = 0xC000_00EF
    INVALID_PARAMETER_2 = 0xC000_00F0
    INVALID_PARAMETER_3 = 0xC000_00F1
    INVALID_PARAMETER_4 = 0xC000_00F2
    INVALID_DEVICE_STATE = 0xC000_0184
    IO_DEVICE_ERROR = 0xC000_0185
    VERIFIER_STOP = 0xC000_0421
    DEVICE_UNRESPONSIVE = 0xC000_050A
    RESOURCE_IN_USE = 0xC000_0708

    @property
    def success(self) -> bool:
        """NT_SUCCESS: neither a warning nor an error."""
        return self < _SEVERITY_WARNING


_OF_ERRORS: dict[type[DriverError], NtStatus] = {
    DriverTimeout: NtStatus.IO_TIMEOUT,
    CommandQueueError: NtStatus.IO_DEVICE_ERROR,
    OutOfMemory: NtStatus.INSUFFICIENT_RESOURCES,
    UnsupportedSmmu: NtStatus.NOT_SUPPORTED,
    StreamError: NtStatus.NO_SUCH_DEVICE,
    MappingError: NtStatus.CONFLICTING_ADDRESSES,
}


def status_of(error: DriverError) -> NtStatus:
    """The status that tells of `error`."""
    if isinstance(error, CommandQueueError) and error.code == CommandError.CERROR_ATC_INV_SYNC:
        return NtStatus.DEVICE_UNRESPONSIVE
    return _OF_ERRORS[type(error)]
