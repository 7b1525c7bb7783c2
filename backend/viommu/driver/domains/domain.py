"""Domains as callers hold them, and what is said of them: their type, their tables, the memory that they map."""

from enum import Enum
from typing import NamedTuple

from viommu.driver.context import TableRoot
from viommu.driver.domain import AddressSpace, Domain, UnmanagedDomain
from viommu.driver.page_tables import (
    MAIR_ATTRIBUTES,
    MAX_INPUT_BITS,
    MIN_INPUT_BITS,
    SMALLEST_TABLE,
)


class DomainType(Enum):
    """IOMMU_DMA_DOMAIN_TYPE."""

    TRANSLATE = "translate"
    """The interface manages the page tables; nothing is mapped at first."""
    UNMANAGED = "unmanaged"
    """The owner makes the page tables, gives their roots to `configure_domain`, and flushes."""
    PASS_THROUGH = "pass-through"  # noqa: S105 - not a secret
    """Addresses are physical."""


class DomainConfiguration(NamedTuple):
    """DOMAIN_CONFIGURATION_ARM64: what CDs say of tables of the 4 KiB granule.

    An input size, in bits, of None leaves its half of the address space out: every access to it faults.
    """

    ttbr0: int = 0
    ttbr1: int = 0
    mair0: int = MAIR_ATTRIBUTES
    mair1: int = 0
    input_size0: int | None = None
    input_size1: int | None = None

    @property
    def lower(self) -> TableRoot | None:
        """What TTB0 points at."""
        return None if self.input_size0 is None else TableRoot(self.ttbr0, self.input_size0)

    @property
    def upper(self) -> TableRoot | None:
        """What TTB1 points at."""
        return None if self.input_size1 is None else TableRoot(self.ttbr1, self.input_size1)

    def fits(self, output_bits: int) -> bool:
        """Whether an SMMU with `output_bits` of physical address can use it."""
        roots = [root for root in (self.lower, self.upper) if root is not None]
        return bool(roots) and all(
            MIN_INPUT_BITS <= root.input_bits <= MAX_INPUT_BITS
            and not root.root % SMALLEST_TABLE
            and not root.root >> output_bits
            for root in roots
        )


class ContiguousRange(NamedTuple):
    """`size` bytes of physical memory from `base`, whole pages."""

    base: int
    size: int


class DmaDomain:
    """A domain, as `DmaRemapping.create_domain` gives it out; a handle, with nothing to be done to it directly."""

    def __init__(self, number: int, domain_type: DomainType, space: AddressSpace | None) -> None:
        self.number, self.type = number, domain_type
        self.space = space
        """The ASID and the tables; None for pass-through."""
        self.configured = not isinstance(space, UnmanagedDomain)
        """Until then it blocks all DMA."""
        self.deleted = False

    @property
    def managed(self) -> Domain | None:
        """The page tables, where the interface manages them."""
        return self.space if isinstance(self.space, Domain) else None

    def __repr__(self) -> str:
        return f"DmaDomain({self.number}, {self.type.value})"
