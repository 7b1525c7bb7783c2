"""What the commands of the I/O queues do (NVM Express 1.4, 6)."""

from collections.abc import Callable, Generator

from viommu.endpoints.nvme import prps, sgls
from viommu.endpoints.nvme.buffers import Buffers
from viommu.endpoints.nvme.errors import CommandFailed
from viommu.endpoints.nvme.features import Features
from viommu.endpoints.nvme.identify import MAX_TRANSFER, NAMESPACE
from viommu.endpoints.nvme.logs import Logs
from viommu.endpoints.nvme.store import BlockStore
from viommu.endpoints.transfers import Segment, Steps, Transfers, Waiting
from viommu.layouts.nvme_commands import (
    ALL_NAMESPACES,
    BlocksCommand,
    DatasetManagementCommand,
    DatasetRange,
    IoOpcode,
    Status,
    SubmissionEntry,
)

ZERO_PIECE = 4 << 20
"""The most that one step makes zero, bytes."""


class IoCommands:
    """Carries them out on a store. `page` is CC.MPS."""

    def __init__(
        self,
        transfers: Transfers,
        store: BlockStore,
        block_size: int,
        features: Features,
        logs: Logs,
        page: int,
    ) -> None:
        self._transfers, self._store, self._block = transfers, store, block_size
        self._blocks = store.size // block_size
        self._buffers = Buffers(MAX_TRANSFER)
        self._features, self._logs, self._page = features, logs, page
        self._works: dict[int, Callable[[SubmissionEntry], Steps]] = {
            IoOpcode.READ: self._read,
            IoOpcode.WRITE: self._write,
            IoOpcode.FLUSH: self._flush,
            IoOpcode.COMPARE: self._compare,
            IoOpcode.WRITE_ZEROES: self._write_zeroes,
            IoOpcode.DATASET_MANAGEMENT: self._manage,
        }

    def run(self, entry: SubmissionEntry) -> Steps:
        """Raises `CommandFailed`, `DmaFault`, and `OSError` of the store."""
        opcode, namespace_id = entry.opcode, entry.namespace_id
        work = self._works.get(opcode)
        if work is None:
            raise CommandFailed(Status.INVALID_OPCODE, 0)
        to_all = opcode == IoOpcode.FLUSH and namespace_id == ALL_NAMESPACES
        if namespace_id != NAMESPACE and not to_all:
            raise CommandFailed(Status.INVALID_NAMESPACE_OR_FORMAT, 4)
        return work(entry)

    def _read(self, entry: SubmissionEntry) -> Steps:
        command = BlocksCommand(entry.value)
        offset, size, segments = yield from self._locate(command)
        with self._buffers.lend(size) as buffer:
            self._load(offset, buffer)
            kept = buffer
            if command.prp_or_sgl:
                segments, kept = sgls.kept(segments, buffer)
            yield from self._transfers.move(segments, kept, write=True)
        self._logs.reads += 1
        self._logs.bytes_read += size

    def _write(self, entry: SubmissionEntry) -> Steps:
        command = BlocksCommand(entry.value)
        offset, size, segments = yield from self._locate(command)
        with self._buffers.lend(size) as buffer:
            yield from self._transfers.move(segments, buffer, write=False)
            try:
                self._store.write(offset, buffer)
                yield from self._written(command)
            except OSError:
                self._logs.media_errors += 1
                raise CommandFailed(Status.WRITE_FAULT) from None
        self._logs.writes += 1
        self._logs.bytes_written += size

    def _compare(self, entry: SubmissionEntry) -> Steps:
        offset, size, segments = yield from self._locate(BlocksCommand(entry.value))
        with self._buffers.lend(size) as buffer, self._buffers.lend(size) as ours:
            yield from self._transfers.move(segments, buffer, write=False)
            self._load(offset, ours)
            if ours != buffer:
                raise CommandFailed(Status.COMPARE_FAILURE)
        self._logs.reads += 1
        self._logs.bytes_read += size

    def _flush(self, entry: SubmissionEntry) -> Steps:  # noqa: ARG002 - it has no fields
        yield from self._store.flush()

    def _write_zeroes(self, entry: SubmissionEntry) -> Steps:
        command = BlocksCommand(entry.value)
        offset, size = self._range(command.first_block, command.blocks + 1)
        yield from self._zero(offset, size)
        yield from self._written(command)

    def _manage(self, entry: SubmissionEntry) -> Steps:
        command = DatasetManagementCommand(entry.value)
        size = (command.ranges + 1) * DatasetRange.size
        segments = yield from self._data(command, size)
        data = memoryview(bytearray(size))
        yield from self._transfers.move(segments, data, write=False)
        if not command.deallocate:  # the other attributes are hints
            return
        ranges = [
            DatasetRange.from_bytes(data[place:]) for place in range(0, size, DatasetRange.size)
        ]
        for each in [self._range(each.first_block, each.blocks) for each in ranges]:
            yield from self._zero(*each)

    def _zero(self, offset: int, size: int) -> Steps:
        end = offset + size
        while offset < end:
            piece = min(ZERO_PIECE, end - offset)
            self._store.zero(offset, piece)
            offset += piece
            yield None

    def _written(self, command: BlocksCommand) -> Steps:
        if not self._features.write_cache:
            yield from self._store.flush()
        elif command.force_unit_access:
            size = (command.blocks + 1) * self._block
            yield from self._store.flush(command.first_block * self._block, size)

    def _load(self, offset: int, buffer: memoryview) -> None:
        try:
            self._store.read(offset, buffer)
        except OSError:
            self._logs.media_errors += 1
            raise CommandFailed(Status.UNRECOVERED_READ_ERROR) from None

    def _locate(
        self, command: BlocksCommand
    ) -> Generator[Waiting | None, None, tuple[int, int, list[Segment]]]:
        """Where a command's blocks are in the store, and its data in guest RAM."""
        blocks = command.blocks + 1
        if blocks * self._block > MAX_TRANSFER:
            raise CommandFailed(Status.INVALID_FIELD, 48)
        offset, size = self._range(command.first_block, blocks)
        return offset, size, (yield from self._data(command, size))

    def _data(
        self, entry: SubmissionEntry, size: int
    ) -> Generator[Waiting | None, None, list[Segment]]:
        if entry.prp_or_sgl:
            return sgls.locate(self._transfers, entry, size)
        return prps.locate(self._transfers, entry, size, self._page)

    def _range(self, first: int, blocks: int) -> tuple[int, int]:
        if first + blocks > self._blocks:
            raise CommandFailed(Status.LBA_OUT_OF_RANGE, 40)
        return first * self._block, blocks * self._block
