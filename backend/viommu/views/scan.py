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
        view, address = look(start)
        if address is None:
            if view.state not in ("C_BAD_STREAMID", "C_BAD_SUBSTREAMID"):
                yield start, view  # and the others of the group are as bad
            continue
        try:
            data = memory.read(address, (end - start) * _SIZE)
        except BusError:
            data = None  # the group reaches beyond its memory
        for number in range(start, end):
            offset = (number - start) * _SIZE
            if data is None or data[offset : offset + _SIZE] not in plain:
                yield number, look(number)[0]


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
