"""What becomes of a physical page that was unmapped: who maps it now and did not when it was still mapped.

At each completed CMD_SYNC the tables of all domains are copied. A page of which a stale entry is found was mapped in
the last copy; who maps it now and did not then has been given it since.
"""

from array import array
from collections.abc import Callable, Iterable

from viommu.memory import BusError, GuestMemory
from viommu.smmu.context import StreamContext
from viommu.smmu.mappings import Reader, mapped, tables

_SHIFT = 12
_LIMIT = 1 << 16  # pages that are watched: a block of a GiB is not followed page by page


class _Copy:
    """Tables as they were, and the domains that had them."""

    def __init__(self, domains: list[StreamContext], contents: dict[int, bytes]) -> None:
        self.domains, self.contents = domains, contents

    def read(self, address: int, size: int) -> bytes:
        """What the table at `address` had."""
        content = self.contents.get(address)
        if content is None or len(content) != size:
            raise BusError(address, size)
        return content


class Pages:
    """The pages of stale entries, each with its users before."""

    def __init__(self, memory: GuestMemory, domains: Callable[[], Iterable[StreamContext]]) -> None:
        self._memory, self._domains = memory, domains
        self._before: dict[int, _Copy] = {}
        self._copy = _Copy([], {})

    def copy(self) -> None:
        """Copy the tables as they are."""
        domains = list(self._domains())
        contents = {
            address: content
            for context in domains
            for address, content in tables(self._memory, context)
        }
        self._copy = _Copy(domains, contents)

    def watch(self, runs: "array[int]") -> None:
        """The pages of `runs` (address, length, …) are those of stale entries."""
        if len(self._before) < _LIMIT:
            for page in _pages(runs):
                self._before.setdefault(page, self._copy)

    def reused(self, runs: "array[int]") -> str:
        """What a watched page of `runs` has become; empty when it is known of none."""
        pages = {page for page in _pages(runs) if page in self._before}
        if not pages:
            return ""
        now = _users(self._memory, self._domains(), pages)
        for page, names in sorted(now.items()):
            copy = self._before[page]
            before = _users(copy, copy.domains, {page}).get(page)
            # Of a page that was not mapped in the copy nobody knows who else had it.
            if before and names - before:
                return f"{page << _SHIFT:#x} {min(names - before)}"
        return ""

    def settle(self) -> None:
        """Nothing is stale any more."""
        self._before.clear()

    def forget(self) -> None:
        """Nothing is known any more."""
        self._before.clear()
        self._copy = _Copy([], {})


def _users(
    memory: Reader, domains: Iterable[StreamContext], pages: set[int]
) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for context in domains:
        name = f"ASID {context.tag.asid}" if context.stage_1 else f"VMID {context.tag.vmid}"
        for iova, address, size in mapped(memory, context):
            first, last = address >> _SHIFT, address + size - 1 >> _SHIFT
            # Of garbage for tables a block can be of any size.
            for page in (
                {first} & pages
                if first == last
                else filter(range(first, last + 1).__contains__, pages)
            ):
                place = None if iova is None else iova + (page - first << _SHIFT)
                use = f"is a table of {name}" if place is None else f"is {place:#x} of {name}"
                found.setdefault(page, set()).add(use)
    return found


def _pages(runs: "array[int]") -> set[int]:
    pages: set[int] = set()
    for address, length in zip(runs[::2], runs[1::2], strict=True):
        pages.update(range(address >> _SHIFT, (address + length - 1 >> _SHIFT) + 1))
        if len(pages) > _LIMIT:
            break
    return pages
