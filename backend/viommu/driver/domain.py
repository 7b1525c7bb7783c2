"""A domain: an address space that streams are attached to."""

from collections.abc import Sequence

from viommu.driver.access import Memory
from viommu.driver.context import context_descriptor
from viommu.driver.errors import MappingError, StreamError
from viommu.driver.page_tables import READ_WRITE, Access, Mapping, PageTable
from viommu.driver.queues import CommandQueue
from viommu.layouts.commands import Command, Opcode, TlbiCommand
from viommu.layouts.tables import ContextDescriptor

MOST_SINGLE_INVALIDATIONS = 64
"""From this many mappings on, invalidating the whole ASID is cheaper than one command for each."""


class Domain:
    """Page tables under one ASID. `SmmuDriver.create_domain` makes them; the SMMU sees one once a stream is attached.

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
    ) -> None:
        self.asid, self.output_bits = asid, output_bits
        self._commands = commands
        self.lower = self.upper = None
        if lower_bits is not None:
            self.lower = PageTable(memory, input_bits=lower_bits, output_bits=output_bits)
        if upper_bits is not None:
            self.upper = PageTable(
                memory, input_bits=upper_bits, output_bits=output_bits, upper=True
            )
        self.streams: set[tuple[int, int]] = set()
        """The (stream, substream) pairs attached now; kept by `SmmuDriver`."""
        self._has_global = False

    @property
    def tables(self) -> list[PageTable]:
        """The halves that exist."""
        return [table for table in (self.lower, self.upper) if table is not None]

    def context_descriptor(self) -> ContextDescriptor:
        """The CD by which a stream uses this domain."""
        return context_descriptor(self.asid, self.output_bits, self.lower, self.upper)

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
        self._half(iova).map(iova, address, size, access, pages_only=pages_only)

    def map_pages(self, iova: int, frames: Sequence[int], access: Access = READ_WRITE) -> None:
        """Map consecutive pages from `iova` up to the physical page addresses `frames`."""
        self._has_global |= access.is_global
        self._half(iova).map_pages(iova, frames, access)

    def unmap(self, iova: int, size: int, *, invalidate: bool = True) -> list[Mapping]:
        """Remove the mappings of a range, and return them.

        With `invalidate` no transaction uses them any more when this returns, and their memory may be used again.
        Without it the TLB may go on translating by them until `flush`.
        """
        table = self._half(iova)
        removed = table.unmap(iova, size)
        if invalidate and removed:
            self._invalidate(removed, leaf=not table.has_retired_tables)
        return removed

    def unmap_all(self, *, invalidate: bool = True) -> list[Mapping]:
        """Remove every mapping; see `unmap`."""
        removed = []
        for table in self.tables:
            removed += table.unmap(table.first, 1 << table.input_bits)
        if invalidate and removed:
            self.flush()
        return removed

    def flush(self) -> None:
        """Make the TLB forget everything of this domain, and return when no transaction uses it any more."""
        # Global entries belong to no ASID: only the command for all of them reaches them (4.4).
        opcode = Opcode.CMD_TLBI_NH_ALL if self._has_global else Opcode.CMD_TLBI_NH_ASID
        self._complete(TlbiCommand(opcode=opcode, asid=0 if self._has_global else self.asid))

    def close(self) -> None:
        """Invalidate the ASID and give the tables back. `StreamError` while a stream is attached."""
        if self.streams:
            raise StreamError(f"{len(self.streams)} streams are attached to ASID {self.asid}")
        self.flush()
        for table in self.tables:
            table.close()
        self.lower = self.upper = None

    def _half(self, iova: int) -> PageTable:
        half = self.upper if iova >> 63 else self.lower
        if half is None:
            raise MappingError(f"no table translates {iova:#x} in this domain")
        return half

    def _invalidate(self, removed: list[Mapping], *, leaf: bool) -> None:
        if len(removed) >= MOST_SINGLE_INVALIDATIONS:
            self.flush()
            return
        opcode = Opcode.CMD_TLBI_NH_VA
        self._complete(
            *(
                TlbiCommand(opcode=opcode, asid=self.asid, leaf=leaf, address=mapping.iova)
                for mapping in removed
            )
        )

    def _complete(self, *commands: Command) -> None:
        self._commands.issue(*commands)
        self._commands.sync()
        for table in self.tables:
            table.release()
