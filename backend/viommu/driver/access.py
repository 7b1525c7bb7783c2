"""What a driver is given: registers, physical memory, and a way to wait."""

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from viommu.driver.errors import DriverTimeout


class Registers(Protocol):
    """The register frame of a device; offsets are bytes from its base.

    Each call is one access of its width. A write is ordered after every earlier store to memory that the device reads.
    """

    def read32(self, offset: int) -> int: ...
    def write32(self, offset: int, value: int) -> None: ...
    def read64(self, offset: int) -> int: ...
    def write64(self, offset: int, value: int) -> None: ...


class MappedRegisters:
    """`Registers` behind a mapping of a BAR, one load or store of exactly the width each."""

    __slots__ = ("_dwords", "_qwords")

    def __init__(self, view: memoryview) -> None:
        self._dwords, self._qwords = view.cast("I"), view.cast("Q")

    def read32(self, offset: int) -> int:
        return self._dwords[offset >> 2]

    def write32(self, offset: int, value: int) -> None:
        self._dwords[offset >> 2] = value

    def read64(self, offset: int) -> int:
        return self._qwords[offset >> 3]

    def write64(self, offset: int, value: int) -> None:
        self._qwords[offset >> 3] = value

    def release(self) -> None:
        """Let go of the mapping, so that it can be unmapped."""
        self._dwords.release()
        self._qwords.release()


class Buffer:
    """Physically contiguous memory that the device can read and write.

    `address` is where the device sees it, `view` its bytes. An item of `words` or `dwords` is loaded and stored by one
    access of 64 or 32 bits, so the device sees all of a word or nothing of it.
    """

    __slots__ = ("address", "dwords", "view", "words")

    def __init__(self, address: int, view: memoryview) -> None:
        self.address, self.view = address, view
        self.words, self.dwords = view.cast("Q"), view.cast("I")

    def __len__(self) -> int:
        return len(self.view)


class Memory(Protocol):
    """An allocator of memory whose physical address is known."""

    def allocate(self, size: int, alignment: int) -> Buffer:
        """`size` zeroed bytes (a multiple of 8) at a multiple of `alignment` (a power of two), or `OutOfMemory`."""
        ...

    def free(self, buffer: Buffer) -> None:
        """Take `buffer` back; the device must not be able to reach it any more."""
        ...


def _spin() -> None:
    """Polling is all the waiting there is."""


class Poll:
    """How long to wait for the device, and what to do meanwhile.

    `relax` runs between two looks: nothing where the device runs by itself, a step of the model where it does not.
    """

    __slots__ = ("relax", "timeout")

    def __init__(self, timeout: float = 1.0, relax: Callable[[], None] = _spin) -> None:
        self.timeout, self.relax = timeout, relax

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Return once `done()`; raise `DriverTimeout` that names `what` when it takes too long."""
        deadline = monotonic() + self.timeout
        while not done():
            # One last look after the deadline: this process may have slept while the device worked.
            if monotonic() > deadline and not done():
                raise DriverTimeout(what, self.timeout)
            self.relax()
