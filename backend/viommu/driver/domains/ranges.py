"""What is done to the logical addresses of a domain: map, unmap, flush."""

from collections.abc import Sequence
from functools import reduce
from operator import or_

from viommu.driver.domains.domain import ContiguousRange, DmaDomain
from viommu.driver.domains.status import NtStatus, status_of
from viommu.driver.errors import DriverError
from viommu.driver.page_tables import PAGE_SIZE, Access, PageTable


def map_range(
    domain: DmaDomain,
    permissions: Access,
    physical: ContiguousRange | Sequence[int],
    logical_address: int,
) -> NtStatus:
    """See `DmaRemapping.map_logical_range`."""
    if domain.deleted:
        return NtStatus.INVALID_HANDLE
    space = domain.managed
    if space is None:
        return NtStatus.INVALID_PARAMETER_1
    size = _size(physical, space.output_bits)
    if not size:
        return NtStatus.INVALID_PARAMETER_3
    table = space.half(0)
    if not _has_pages(table, logical_address, size):
        return NtStatus.INVALID_PARAMETER_4
    if table.mappings_of(logical_address, size):
        return NtStatus.CONFLICTING_ADDRESSES
    try:
        if isinstance(physical, ContiguousRange):
            space.map(logical_address, physical.base, size, permissions)
        else:
            space.map_pages(logical_address, physical, permissions)
    except DriverError as error:
        # There was no memory for a table: what has been mapped of it goes.
        space.unmap(logical_address, size, invalidate=False)
        status = flush(domain)
        return status_of(error) if status.success else status
    return NtStatus.SUCCESS


def unmap_range(domain: DmaDomain, logical_address: int, number_of_pages: int) -> NtStatus:
    """See `DmaRemapping.unmap_logical_range`."""
    if domain.deleted:
        return NtStatus.INVALID_HANDLE
    space = domain.managed
    if space is None:
        return NtStatus.INVALID_PARAMETER_1
    table, size = space.half(0), number_of_pages * PAGE_SIZE
    if not _has_pages(table, logical_address, PAGE_SIZE):
        return NtStatus.INVALID_PARAMETER_2
    if size <= 0 or not _has_pages(table, logical_address, size):
        return NtStatus.INVALID_PARAMETER_3
    end = logical_address + size
    mapped = table.mappings_of(logical_address, size)
    if sum(min(m.iova + m.size, end) - max(m.iova, logical_address) for m in mapped) < size:
        return NtStatus.NOT_MAPPED_VIEW
    if mapped[0].iova < logical_address or mapped[-1].iova + mapped[-1].size > end:
        return NtStatus.FREE_VM_NOT_AT_BASE
    try:
        space.unmap(logical_address, size)
    except DriverError as error:
        return status_of(error)
    return NtStatus.SUCCESS


def flush(
    domain: DmaDomain, addresses: Sequence[int] | None = None, *, leaf: bool = False
) -> NtStatus:
    """See `DmaRemapping.flush_domain` and `flush_domain_va_list`."""
    if domain.deleted:
        return NtStatus.INVALID_HANDLE
    if domain.space is None:
        return NtStatus.INVALID_PARAMETER_1
    try:
        if addresses is None:
            domain.space.flush()
        elif any(address % PAGE_SIZE for address in addresses):
            return NtStatus.INVALID_PARAMETER_3
        else:
            domain.space.flush_addresses(addresses, leaf=leaf)
    except DriverError as error:
        return status_of(error)
    return NtStatus.SUCCESS


def _size(physical: ContiguousRange | Sequence[int], output_bits: int) -> int:
    """The bytes of `physical`; 0 when that is not whole pages that the SMMU can reach."""
    if isinstance(physical, ContiguousRange):
        bits, size, end = physical.base | physical.size, physical.size, sum(physical)
    else:
        bits, size = reduce(or_, physical, 0), len(physical) * PAGE_SIZE
        end = max(physical, default=0) + PAGE_SIZE
    return 0 if size < 0 or bits < 0 or bits % PAGE_SIZE or end > 1 << output_bits else size


def _has_pages(table: PageTable, address: int, size: int) -> bool:
    return not address % PAGE_SIZE and table.translates(address, size)
