"""The statuses that the calls return, and which of them tells of an error of the driver."""

from viommu.driver.errors import (
    CommandQueueError,
    DriverError,
    DriverTimeout,
    MappingError,
    OutOfMemory,
    StreamError,
    UnsupportedSmmu,
)
from viommu.layouts.ntstatus import NtStatus
from viommu.layouts.registers import CommandError

__all__ = ["NtStatus", "status_of"]

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
