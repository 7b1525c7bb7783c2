"""What can go wrong while driving an SMMU."""

from viommu.layouts.registers import CommandError


class DriverError(Exception):
    """The root of what this package raises.

    DriverError
    ├── DriverTimeout       the SMMU did not answer in time
    ├── UnsupportedSmmu     the SMMU lacks what was asked of it
    ├── CommandQueueError   the SMMU refused a command
    ├── MappingError        a page table cannot hold, or does not hold, a mapping
    ├── StreamError         a stream or a domain is not in the state that the call needs
    └── OutOfMemory         the allocator has no such memory left
    """


class DriverTimeout(DriverError):
    """The SMMU did not do `what` within `seconds`."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"{what}: nothing after {seconds:g} s")
        self.what, self.seconds = what, seconds


class UnsupportedSmmu(DriverError):
    """The identification registers say that the SMMU cannot do what was asked."""


class CommandQueueError(DriverError):
    """Command queue consumption stopped at entry `index` with CMDQ_CONS.ERR `code` (IHI 0070, 7.1).

    `entry` is the command as it lay in the queue, 128 bits.
    """

    def __init__(self, code: int, index: int, entry: int) -> None:
        names = {int(error): error.name for error in CommandError}
        super().__init__(f"{names.get(code, hex(code))} at command {index}: {entry:#034x}")
        self.code, self.index, self.entry = code, index, entry


class MappingError(DriverError):
    """A page table cannot hold the mapping, or an unmapping would split a block."""


class StreamError(DriverError):
    """A stream or a domain is not in the state that the call needs."""


class OutOfMemory(DriverError):
    """The allocator has no memory of that size and alignment left."""
