"""Where the blocks of a namespace are."""

from typing import Protocol

from viommu.endpoints.transfers import Steps


class BlockStore(Protocol):
    """`size` bytes that can be read and written anywhere. Each method may raise `OSError`."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what is at `offset`."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at `offset`. It need not last before `flush`."""
        ...

    def zero(self, offset: int, size: int) -> None:
        """Make `size` bytes at `offset` zeros, and let go of what holds them."""
        ...

    def flush(self, offset: int = 0, size: int | None = None) -> Steps:
        """Make what was written last, in steps. With `size` those bytes are enough."""
        ...


class RamDisk:
    """Blocks in memory, all zeros at first."""

    def __init__(self, size: int) -> None:
        self._data = memoryview(bytearray(size))

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self._data[offset : offset + len(data)] = data

    def zero(self, offset: int, size: int) -> None:
        self._data[offset : offset + size] = bytes(size)

    def flush(self, offset: int = 0, size: int | None = None) -> Steps:  # noqa: ARG002
        yield None
