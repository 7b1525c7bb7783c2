"""What becomes of a physical page that was unmapped: who maps it now and did not then."""

from array import array
from collections.abc import Callable, Iterable

from viommu.smmu.context import StreamContext
from viommu.smmu.inspection import Inspection

_SHIFT = 12
_LIMIT = 1 << 16  # pages that are watched at a time: a block of a GiB is not followed page by page


class Pages:
    """Watches pages from the moment at which a stale entry for them was found."""

    def __init__(
        self, inspection: Inspection, domains: Callable[[], Iterable[StreamContext]]
    ) -> None:
        self._inspection = inspection
        self._domains = domains
        self._then: dict[int, frozenset[str]] = {}

    def watch(self, runs: "array[int]") -> None:
        """Remember who maps the pages of `runs` (address, length, …) at this moment, unless they are watched."""
        pages = {page for page in _pages(runs) if page not in self._then}
        if pages and len(self._then) < _LIMIT:
            users = self._users(pages)
            self._then |= {page: frozenset(users.get(page, ())) for page in pages}

    def reused(self, runs: "array[int]") -> str:
        """What a page of `runs` has become since it is watched; empty when nothing is known of it."""
        pages = {page for page in _pages(runs) if page in self._then}
        if pages:
            for page, users in sorted(self._users(pages).items()):
                for user in sorted(users - self._then[page]):
                    return f"{page << _SHIFT:#x} {user}"
        return ""

    def forget(self) -> None:
        """Nothing is watched any more."""
        self._then.clear()

    def _users(self, pages: set[int]) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for context in self._domains():
            name = f"ASID {context.tag.asid}" if context.stage_1 else f"VMID {context.tag.vmid}"
            for iova, address, size in self._inspection.mapped(context):
                first = address >> _SHIFT
                if size <= 1 << _SHIFT:
                    inside = [first] if first in pages else []
                else:
                    last = address + size - 1 >> _SHIFT
                    inside = [page for page in pages if first <= page <= last]
                for page in inside:
                    at = 0 if iova is None else iova + ((page - first) << _SHIFT)
                    use = f"is a table of {name}" if iova is None else f"is {at:#x} of {name}"
                    found.setdefault(page, set()).add(use)
        return found


def _pages(runs: "array[int]") -> set[int]:
    pages: set[int] = set()
    for address, length in zip(runs[::2], runs[1::2], strict=True):
        pages.update(range(address >> _SHIFT, (address + length - 1 >> _SHIFT) + 1))
        if len(pages) > _LIMIT:
            break
    return pages
