"""What the commands of the admin queue do (NVM Express 1.4, 5)."""

from collections.abc import Callable, Generator
from typing import Protocol

from viommu.endpoints.nvme import prps
from viommu.endpoints.nvme.errors import CommandFailed
from viommu.endpoints.nvme.features import Features
from viommu.endpoints.nvme.identify import Identification
from viommu.endpoints.nvme.logs import AsyncEvent, AsyncEvents, Logs
from viommu.endpoints.nvme.queues import CompletionQueue, Drained, Queues, SubmissionQueue
from viommu.endpoints.transfers import Steps, Transfers, Waiting
from viommu.layouts.nvme_commands import (
    AbortCommand,
    AdminOpcode,
    CreateCompletionQueueCommand,
    CreateSubmissionQueueCommand,
    DeleteQueueCommand,
    FeaturesCommand,
    GetLogPageCommand,
    IdentifyCommand,
    Status,
    SubmissionEntry,
)

_LOG_LIMIT = 64 << 10
# The most that one Get Log Page gives, bytes.
_NOT_ABORTED = 1

Result = Generator[Waiting | None, None, int | None]
"""The result of a command; None when it stays outstanding."""


class Work(Protocol):
    """What is under way in the controller."""

    events: AsyncEvents

    def abort(self, queue: SubmissionQueue, command_id: int) -> bool:
        """End a command where it is; False when it is not there any more."""
        ...

    def abandon(self, queue: SubmissionQueue) -> None:
        """End all commands of a queue that is deleted."""
        ...

    def discard(self, queue: CompletionQueue) -> None:
        """Forget the completions of a queue that is deleted."""
        ...


class AdminCommands:
    """Carries them out."""

    def __init__(
        self,
        transfers: Transfers,
        queues: Queues,
        identification: Identification,
        features: Features,
        logs: Logs,
        page: int,
        *,
        entry_sizes: Callable[[], bool],
        flush: Callable[[], Steps],
    ) -> None:
        """`page` is CC.MPS; `entry_sizes` says whether CC gives those of the I/O queues' entries now.

        `flush` makes what was written last.
        """
        self._transfers, self._queues, self._identification = transfers, queues, identification
        self._features, self._logs = features, logs
        self._page, self._entry_sizes, self._flush = page, entry_sizes, flush

    def run(self, entry: SubmissionEntry, work: Work) -> Result:
        """Raises `CommandFailed` and `DmaFault`."""
        match entry.opcode:
            case AdminOpcode.IDENTIFY:
                identify = IdentifyCommand(entry.value)
                data = self._identification.data(identify.kind, identify.namespace_id)
                yield from self._give(entry, data)
            case AdminOpcode.GET_LOG_PAGE:
                yield from self._log(GetLogPageCommand(entry.value), work.events)
            case AdminOpcode.GET_FEATURES:
                return self._features.get(FeaturesCommand(entry.value))
            case AdminOpcode.SET_FEATURES:
                return (yield from self._set_features(FeaturesCommand(entry.value), work.events))
            case AdminOpcode.CREATE_IO_CQ:
                self._create_completion(CreateCompletionQueueCommand(entry.value))
            case AdminOpcode.CREATE_IO_SQ:
                self._create_submission(CreateSubmissionQueueCommand(entry.value))
            case AdminOpcode.DELETE_IO_CQ:
                work.discard(
                    self._queues.delete_completion(DeleteQueueCommand(entry.value).queue_id)
                )
            case AdminOpcode.DELETE_IO_SQ:
                queue = self._queues.delete_submission(DeleteQueueCommand(entry.value).queue_id)
                work.abandon(queue)
                yield Drained(queue.completions)
            case AdminOpcode.ABORT:
                return self._abort(AbortCommand(entry.value), work)
            case AdminOpcode.ASYNC_EVENT_REQUEST:
                work.events.request(entry.command_id)
                return None
            case _:
                raise CommandFailed(Status.INVALID_OPCODE, 0)
        return 0

    def _give(self, entry: SubmissionEntry, data: bytes) -> Steps:
        segments = yield from prps.locate(self._transfers, entry, len(data), self._page)
        yield from self._transfers.move(segments, memoryview(data), write=True)

    def _set_features(self, command: FeaturesCommand, events: AsyncEvents) -> Result:
        features = self._features
        cached, warned = features.write_cache, features.warns
        exist = len(self._queues.submission) > 1 or len(self._queues.completion) > 1
        result = features.set(command, queues_exist=exist)
        if cached and not features.write_cache:
            yield from self._flush()  # nothing is volatile any more
        if features.warns and not warned:
            events.happened(AsyncEvent.TEMPERATURE_THRESHOLD)
        return result

    def _log(self, command: GetLogPageCommand, events: AsyncEvents) -> Steps:
        size = 4 * (command.dwords + 1)
        page = self._logs.page(command.log_id, self._features.critical_warning)
        if command.offset % 4 or command.offset > len(page):
            raise CommandFailed(Status.INVALID_FIELD, 48)
        if size > _LOG_LIMIT:
            raise CommandFailed(Status.INVALID_FIELD, 42)
        data = page[command.offset : command.offset + size].ljust(size, b"\0")
        yield from self._give(command, data)
        if not command.retain_async_event:
            events.read(command.log_id)

    def _create_completion(self, command: CreateCompletionQueueCommand) -> None:
        base = self._base(command, command.physically_contiguous)
        vector = command.interrupt_vector if command.interrupts_enabled else None
        self._queues.create_completion(command.queue_id, base, command.queue_size + 1, vector)

    def _create_submission(self, command: CreateSubmissionQueueCommand) -> None:
        base = self._base(command, command.physically_contiguous)
        entries, completions = command.queue_size + 1, command.completion_queue_id
        self._queues.create_submission(command.queue_id, base, entries, completions)

    def _base(self, command: SubmissionEntry, contiguous: bool) -> int:
        if not contiguous or not self._entry_sizes():
            raise CommandFailed(Status.INVALID_FIELD, 44)
        if command.prp1 % self._page:
            raise CommandFailed(Status.PRP_OFFSET_INVALID, 24)
        return command.prp1

    def _abort(self, command: AbortCommand, work: Work) -> int:
        queue = self._queues.submission.get(command.sq_id)
        itself = (command.sq_id, command.aborted_id) == (0, command.command_id)
        if queue is None or itself or not work.abort(queue, command.aborted_id):
            return _NOT_ABORTED
        return 0
