"""Buffers for the data of commands, used again and again: new ones would cost a page fault for each page."""

from types import TracebackType

SPARE = 16
"""Buffers that are kept at most."""


class Buffers:
    """Lends buffers of up to `limit` bytes. What they hold at first is left over from others."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._spare: list[memoryview] = []

    def lend(self, size: int) -> "Loan":
        """`size` bytes, until the end of a `with` statement."""
        return Loan(self._spare, self._limit, size)


class Loan:
    """Gives a buffer when it is entered, and takes it back."""

    def __init__(self, spare: list[memoryview], limit: int, size: int) -> None:
        self._spare, self._size = spare, size
        self._whole = spare.pop() if spare else memoryview(bytearray(limit))

    def __enter__(self) -> memoryview:
        return self._whole[: self._size]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if len(self._spare) < SPARE:
            self._spare.append(self._whole)
