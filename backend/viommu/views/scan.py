"""Large tables in guest memory, looked at a page of rows at a time."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from viommu.memory import BusError, GuestMemory
from viommu.smmu.inspection import StreamView

_SIZE = 64  # of an STE and of a CD, bytes
_GROUP = 64
# An aligned group of STEs, or of CDs, lies side by side in every format of table, in 4 KiB (IHI 0070, 3.3.1, 5.2).
_GROUPS = 512
# How many groups one look goes through, if not said: it bounds how long others wait.

_ABSENT = ("C_BAD_STREAMID", "C_BAD_SUBSTREAMID")

Found = tuple[int, StreamView | None]


def scan(
    memory: GuestMemory,
    first: int,
    total: int,
    look: Callable[[int], tuple[StreamView, int | None]],
    plain: Collection[bytes],
) -> Iterator[Found]:
    """The entries from number `first` on whose bytes are not `plain`; before each group its first number with None.

    `look` gives what memory says of a number, and where its entry lies, None if that was not reached.
    """
    for group in range(first & -_GROUP, total, _GROUP):
        start, end = max(first, group), min(group + _GROUP, total)
        yield start, None
        _, address = look(start)
        data = None if address is None else _read(memory, address, (end - start) * _SIZE)
        for number in range(start, end):
            offset = (number - start) * _SIZE
            if data is not None and data[offset : offset + _SIZE] in plain:
                continue
            view, address = look(number)
            if address is not None:
                yield number, view
                continue
            if view.state not in _ABSENT:
                yield number, view
            break  # and those behind it are as bad


def _read(memory: GuestMemory, address: int, size: int) -> bytes | None:
    """None: the group reaches beyond its memory."""
    try:
        return memory.read(address, size)
    except BusError:
        return None


def page(
    found: Iterator[Found],
    limit: int,
    row: Callable[[int, StreamView], Any],
    *,
    groups: int = _GROUPS,
) -> tuple[list[Any], int | None]:
    """At most `limit` rows, and the number from which to go on; None when that was all."""
    rows: list[Any] = []
    for number, view in found:
        if view is None:
            if not groups:
                return rows, number
            groups -= 1
        elif len(rows) == limit:
            return rows, number
        else:
            rows.append(row(number, view))
    return rows, None
