"""What an endpoint is to the server: a PCI function that says what it is and works in steps."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple


class Identity(NamedTuple):
    """The IDs of a PCI function; `class_code` has 24 bits."""

    vendor_id: int
    device_id: int
    class_code: int
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0
    revision: int = 0


class Bar(NamedTuple):
    """A memory BAR of `size` bytes, a power of two. A 64-bit one takes the next index too.

    Prefetchable is one whose reads have no effect and whose writes may be merged.
    """

    number: int
    size: int
    is_64bit: bool = True
    prefetchable: bool = False


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


class Endpoint(ABC):
    """A PCI function. It has no thread, and no clock but one it is given; MMIO and `step` drive it.

    An exception that leaves it is its end: it is dead, like a card that was pulled, until the guest resets it.
    """

    interrupt: Callable[[int], bool]
    """Set by the server: sends the MSI-X vector, or INTx when that is in use. False when nobody listens."""
    pin_enabled: Callable[[], bool]
    """Set by the server: whether the guest allows INTx. It does not while it uses MSI-X."""

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Its IDs."""

    @property
    @abstractmethod
    def bars(self) -> tuple[Bar, ...]:
        """Its BARs."""

    @property
    def msix_vectors(self) -> int:
        """How many MSI-X vectors it can use; where MSI-X cannot work the server gives it INTx alone."""
        return 0

    @property
    def capabilities(self) -> tuple[ExtendedCapability, ...]:
        """Its extended capabilities."""
        return ()

    @property
    @abstractmethod
    def busy(self) -> bool:
        """`step` has work to do."""

    @abstractmethod
    def read(self, bar: int, offset: int, size: int) -> int:
        """An MMIO read of `size` bytes. What is more than that is cut off."""

    @abstractmethod
    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """An MMIO write of `size` bytes."""

    @abstractmethod
    def step(self) -> bool:
        """Do one small thing; True when there is more to do."""

    @abstractmethod
    def reset(self) -> None:
        """Function level reset: all work ends, registers return to their reset values."""

    def pin_released(self) -> None:  # noqa: B027 - most have nothing more to say
        """The pin was asserted, and the guest's access has let go of it: interrupt again if there is a reason."""

    def register_name(self, offset: int) -> str:
        """What a plan of faults and the trace call the register at `offset`."""
        return hex(offset)
