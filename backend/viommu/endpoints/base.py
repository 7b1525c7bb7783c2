"""What an endpoint is to the server: a PCI function that says what it is and works in steps."""

from collections.abc import Callable
from typing import NamedTuple, Protocol


class Identity(NamedTuple):
    """The IDs of a PCI function; `class_code` has 24 bits."""

    vendor_id: int
    device_id: int
    class_code: int
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0
    revision: int = 0


class Bar(NamedTuple):
    """A memory BAR of `size` bytes, a power of two. A 64-bit one takes the next index too."""

    number: int
    size: int
    is_64bit: bool = True
    prefetchable: bool = True


class ExtendedCapability:
    """An extended capability of PCI config space, whose control bits the function obeys.

    `body` is what follows the header of 4 bytes, at reset; `writable` and `clearable` have a 1 for each bit that
    software may write, and clear by writing 1. Whoever holds the config space calls `written` with the present body
    after a write to it, and sets `publish`, by which the function changes a part of it: offset in the body, data.
    """

    def __init__(
        self,
        capability_id: int,
        body: bytes,
        writable: bytes,
        clearable: bytes = b"",
        *,
        written: Callable[[bytes], None],
    ) -> None:
        self.id, self.body, self.writable, self.clearable = capability_id, body, writable, clearable
        self.written = written
        self.publish: Callable[[int, bytes], None] = lambda _offset, _data: None


class Endpoint(Protocol):
    """A PCI function. It has no thread and no clock; MMIO and `step` drive it."""

    interrupt: Callable[[int], bool]
    """Set by the server: sends the MSI-X vector, or INTx when that is in use. False when nobody listens."""

    @property
    def identity(self) -> Identity:
        """Its IDs."""
        ...

    @property
    def bars(self) -> tuple[Bar, ...]:
        """Its BARs."""
        ...

    @property
    def msix_vectors(self) -> int:
        """How many MSI-X vectors it can use; where MSI-X cannot work the server gives it INTx alone."""
        ...

    @property
    def capabilities(self) -> tuple[ExtendedCapability, ...]:
        """Its extended capabilities."""
        ...

    @property
    def busy(self) -> bool:
        """`step` has work to do."""
        ...

    def read(self, bar: int, offset: int, size: int) -> int:
        """An MMIO read of `size` bytes."""
        ...

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """An MMIO write of `size` bytes."""
        ...

    def step(self) -> bool:
        """Do one small thing; True when there is more to do."""
        ...

    def reset(self) -> None:
        """Function level reset: all work ends, registers return to their reset values."""
        ...
