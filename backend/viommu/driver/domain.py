"""A domain: an address space that streams are attached to."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from viommu.driver.access import Memory
from viommu.driver.context import TableRoot, context_descriptor
from viommu.driver.errors import MappingError, StreamError
from viommu.driver.page_tables import (
    MAIR_ATTRIBUTES,
    READ_WRITE,
    Access,
    Mapping,
    PageTable,
)
from viommu.driver.queues import CommandQueue
from viommu.layouts.commands import (
    ATC_INVALIDATE_ALL,
    AtcInvalidateCommand,
    Command,
    Opcode,
    TlbiCommand,
)
from viommu.layouts.tables import ContextDescriptor

MOST_SINGLE_INVALIDATIONS = 64
"""From this many mappings on, invalidating the whole ASID is cheaper than one command for each."""


def _nothing() -> None:
    """Nobody has to be told that a domain is closed."""


class AddressSpace(ABC):
    """An ASID and its translation tables. The SMMU sees them once a stream is attached."""

    def __init__(
        self,
        commands: CommandQueue,
        *,
        asid: int,
        output_bits: int,
        closed: Callable[[], None] = _nothing,
    ) -> None:
        self.asid, self.output_bits = asid, output_bits
        self._commands, self._closed = commands, closed
        self.streams: set[tuple[int, int]] = set()
        """The (stream, substream) pairs attached now; kept by `SmmuDriver`."""
        self.ats_streams: set[int] = set()
        """Those of the streams whose functions may keep translations of their own; kept by `SmmuDriver`."""
        self._has_global = False

    @abstractmethod
    def context_descriptor(self, *, stall: bool = False) -> ContextDescriptor:
        """The CD by which a stream uses this address space; with `stall` its faults wait for an answer."""

    def flush(self) -> None:
        """Make the TLB and functions forget everything of it, and return when no transaction uses it any more."""
        self.invalidate_tlb()
        self.invalidate_atcs(self.ats_streams)

    def flush_addresses(self, addresses: Sequence[int], *, leaf: bool) -> None:
        """The same for what maps `addresses`; with `leaf` the way to them is kept (4.4.1)."""
        if len(addresses) >= MOST_SINGLE_INVALIDATIONS:
            self.flush()
            return
        opcode = Opcode.CMD_TLBI_NH_VA
        self._complete(
            *(
                TlbiCommand(opcode=opcode, asid=self.asid, leaf=leaf, address=address)
                for address in addresses
            )
        )
        self.invalidate_atcs(self.ats_streams, addresses)

    def invalidate_tlb(self) -> None:
        """Make the TLB forget everything of it, and return when no transaction uses that any more."""
        # Global entries belong to no ASID: only the command for all of them reaches them (4.4).
        opcode = Opcode.CMD_TLBI_NH_ALL if self._has_global else Opcode.CMD_TLBI_NH_ASID
        self._complete(TlbiCommand(opcode=opcode, asid=0 if self._has_global else self.asid))

    def invalidate_atcs(
        self, stream_ids: Iterable[int], addresses: Sequence[int] | None = None
    ) -> None:
        """Make the functions behind `stream_ids` forget `addresses`, or everything, after the TLB did (3.9.1.4).

        Raises `CommandQueueError` with CERROR_ATC_INV_SYNC when one does not answer.
        """
        opcode = Opcode.CMD_ATC_INV
        commands: list[Command] = []
        for stream_id in sorted(stream_ids):
            if addresses is None:
                everything = ATC_INVALIDATE_ALL
                commands.append(
                    AtcInvalidateCommand(opcode=opcode, stream_id=stream_id, span_log2=everything)
                )
            else:
                # A page is enough: what maps any byte of it goes, however large it is.
                commands += [
                    AtcInvalidateCommand(opcode=opcode, stream_id=stream_id, address=address)
                    for address in addresses
                ]
        if commands:
            self._commands.issue(*commands)
            self._commands.sync()

    def close(self) -> None:
        """Invalidate the ASID and give the tables back. `StreamError` while a stream is attached."""
        if self.streams:
            raise StreamError(f"{len(self.streams)} streams are attached to ASID {self.asid}")
        self.flush()
        self._closed()

    def _complete(self, *commands: Command) -> None:
        self._commands.issue(*commands)
        self._commands.sync()


class UnmanagedDomain(AddressSpace):
    """Tables that somebody else makes, changes and flushes. It translates nothing until it is given their roots."""

    def __init__(
        self,
        commands: CommandQueue,
        *,
        asid: int,
        output_bits: int,
        closed: Callable[[], None] = _nothing,
    ) -> None:
        super().__init__(commands, asid=asid, output_bits=output_bits, closed=closed)
        self.lower: TableRoot | None = None
        self.upper: TableRoot | None = None
        self.mair = MAIR_ATTRIBUTES
        # Who knows what the owner maps.
        self._has_global = True

    def context_descriptor(self, *, stall: bool = False) -> ContextDescriptor:
        """The CD by which a stream uses this domain."""
        return context_descriptor(
            self.asid, self.output_bits, self.lower, self.upper, mair=self.mair, stall=stall
        )


class Domain(AddressSpace):
    """Page tables under one ASID. `SmmuDriver.create_domain` makes them.

    `lower` translates addresses from 0 up, `upper` those from 2^64 down; either may be None.
    """

    def __init__(
        self,
        memory: Memory,
        commands: CommandQueue,
        *,
        asid: int,
        output_bits: int,
        lower_bits: int | None,
        upper_bits: int | None,
        closed: Callable[[], None] = _nothing,
    ) -> None:
        super().__init__(commands, asid=asid, output_bits=output_bits, closed=closed)
        self.lower = self.upper = None
        if lower_bits is not None:
            self.lower = PageTable(memory, input_bits=lower_bits, output_bits=output_bits)
        if upper_bits is not None:
            self.upper = PageTable(
                memory, input_bits=upper_bits, output_bits=output_bits, upper=True
            )

    @property
    def tables(self) -> list[PageTable]:
        """The halves that exist."""
        return [table for table in (self.lower, self.upper) if table is not None]

    def context_descriptor(self, *, stall: bool = False) -> ContextDescriptor:
        """The CD by which a stream uses this domain."""
        return context_descriptor(self.asid, self.output_bits, self.lower, self.upper, stall=stall)

    def map(
        self,
        iova: int,
        address: int,
        size: int,
        access: Access = READ_WRITE,
        *,
        pages_only: bool = False,
    ) -> None:
        """Map `size` bytes at `iova` to physical `address`; see `PageTable.map`."""
        self._has_global |= access.is_global
        self.half(iova).map(iova, address, size, access, pages_only=pages_only)

    def map_pages(self, iova: int, frames: Sequence[int], access: Access = READ_WRITE) -> None:
        """Map consecutive pages from `iova` up to the physical page addresses `frames`."""
        self._has_global |= access.is_global
        self.half(iova).map_pages(iova, frames, access)

    def unmap(self, iova: int, size: int, *, invalidate: bool = True) -> list[Mapping]:
        """Remove the mappings of a range, and return them.

        With `invalidate` no transaction uses them any more when this returns, and their memory may be used again.
        Without it the TLB may go on translating by them until `flush`.
        """
        table = self.half(iova)
        removed = table.unmap(iova, size)
        if invalidate and removed:
            leaf = not table.has_retired_tables
            self.flush_addresses([mapping.iova for mapping in removed], leaf=leaf)
        return removed

    def unmap_all(self, *, invalidate: bool = True) -> list[Mapping]:
        """Remove every mapping; see `unmap`."""
        removed = []
        for table in self.tables:
            removed += table.unmap(table.first, 1 << table.input_bits)
        if invalidate and removed:
            self.flush()
        return removed

    def close(self) -> None:
        """Invalidate the ASID and give the tables back. `StreamError` while a stream is attached."""
        super().close()
        for table in self.tables:
            table.close()
        self.lower = self.upper = None

    def half(self, iova: int) -> PageTable:
        """The table that translates `iova`, or `MappingError`."""
        half = self.upper if iova >> 63 else self.lower
        if half is None:
            raise MappingError(f"no table translates {iova:#x} in this domain")
        return half

    def _complete(self, *commands: Command) -> None:
        super()._complete(*commands)
        for table in self.tables:
            table.release()
