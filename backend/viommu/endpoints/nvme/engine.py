"""What an enabled controller does: it fetches commands, carries them out and posts their completions.

Each of these is a task, so that several transactions are in flight. What the admin queue wants, and completions, come
before I/O commands. A submission queue is fetched from as long as it has entries and room for them; what waits for a
place in its completion queue counts. Completions go out in order.
"""

from collections import deque

from viommu.endpoints.nvme.admin import AdminCommands
from viommu.endpoints.nvme.errors import RETRIABLE, CommandFailed
from viommu.endpoints.nvme.events import NvmeCommandEnded, NvmeCommandFetched
from viommu.endpoints.nvme.interrupts import Interrupts
from viommu.endpoints.nvme.io import IoCommands
from viommu.endpoints.nvme.logs import AsyncEvent, AsyncEvents, Logs
from viommu.endpoints.nvme.queues import CompletionQueue, Pending, Queues, SubmissionQueue
from viommu.endpoints.port import DmaFault
from viommu.endpoints.tasks import Tasks
from viommu.endpoints.transfers import Steps, Transfers
from viommu.layouts.nvme_commands import AdminOpcode, DataPointer, IoOpcode, Status, SubmissionEntry
from viommu.trace import Tracer

BURST = 8
"""Entries that one transaction fetches or posts at most."""
EXECUTING = 64
"""I/O commands that are there at the same time."""
TOGETHER = 4
"""Of them, and of fetches and completions, so many take turns. With more, none would be done before all are."""
_ADMIN = {int(opcode): opcode.name for opcode in AdminOpcode}
_IO = {int(opcode): opcode.name for opcode in IoOpcode}
_POINTERS = {int(pointer): pointer.name for pointer in DataPointer}


class Fatal(Exception):
    """A queue cannot be reached: there is no way to tell software but CSTS.CFS (9.5)."""


class Engine:
    """Gone with the next reset. `step` raises `Fatal`."""

    def __init__(
        self,
        name: str,
        queues: Queues,
        transfers: Transfers,
        interrupts: Interrupts,
        logs: Logs,
        admin: AdminCommands,
        io: IoCommands,
        tracer: Tracer,
    ) -> None:
        self._name, self._queues, self._transfers = name, queues, transfers
        self._interrupts, self._logs, self._tracer = interrupts, logs, tracer
        self.events = AsyncEvents()
        interrupts.nudge, interrupts.can_nudge = self._nudge, lambda: bool(self.events.requests)
        self.tasks = Tasks(TOGETHER)
        self._executing = 0
        self._admin, self._io = admin, io

    # Doorbells

    def ring_submission(self, queue_id: int, value: int) -> None:
        """A tail doorbell was written."""
        queue = self._queues.submission.get(queue_id)
        if queue is None:
            self._happened(AsyncEvent.INVALID_DOORBELL_REGISTER)
        elif queue.ring(value):
            self._kick(queue)
        else:
            self._happened(AsyncEvent.INVALID_DOORBELL_VALUE)

    def ring_completion(self, queue_id: int, value: int) -> None:
        """A head doorbell was written."""
        queue = self._queues.completion.get(queue_id)
        if queue is None:
            self._happened(AsyncEvent.INVALID_DOORBELL_REGISTER)
        elif queue.ring(value):
            self._interrupts.acknowledged(queue)
        else:
            self._happened(AsyncEvent.INVALID_DOORBELL_VALUE)

    def _happened(self, event: AsyncEvent) -> None:
        self.events.happened(event)
        self._tell()

    def _tell(self) -> None:
        while (told := self.events.next()) is not None:
            self._complete_request(*told)

    def _nudge(self) -> None:
        if (told := self.events.nudge()) is not None:
            self._complete_request(*told)

    def _complete_request(self, command_id: int, result: int) -> None:
        queue = self._queues.submission[0]
        queue.outstanding += 1
        self._post(Pending(queue, command_id, result, Status.SUCCESS, False))

    # Fetching

    def _room(self, queue: SubmissionQueue) -> int:
        if queue.id == 0:
            return min(queue.room, BURST)
        return min(queue.room, BURST, max(0, EXECUTING - self._executing))

    def _kick(self, queue: SubmissionQueue) -> None:
        if queue.fetch is None and self._room(queue):
            queue.fetch = self.tasks.spawn(self._fetch(queue), urgent=queue.id == 0)

    def _fetch(self, queue: SubmissionQueue) -> Steps:
        while count := self._room(queue):
            size = SubmissionEntry.size
            try:
                data = yield from self._transfers.read(queue.place, count * size)
            except DmaFault as fault:
                raise Fatal(f"submission queue {queue.id}: {fault}") from None
            queue.advance(count)
            for place in range(0, count * size, size):
                self._begin(queue, SubmissionEntry.from_bytes(data[place:]))
        queue.fetch = None

    def _begin(self, queue: SubmissionQueue, entry: SubmissionEntry) -> None:
        queue.outstanding += 1
        command_id = entry.command_id
        if self._tracer:
            names = _IO if queue.id else _ADMIN
            opcode = names.get(entry.opcode) or hex(entry.opcode)
            pointer = _POINTERS.get(entry.prp_or_sgl) or hex(entry.prp_or_sgl)
            self._tracer.emit(NvmeCommandFetched(self._name, queue.id, command_id, opcode, pointer))
        if command_id in queue.commands:
            self._fail(queue, entry, CommandFailed(Status.COMMAND_ID_CONFLICT))
            return
        self._executing += queue.id != 0
        work = self._execute(queue, entry, command_id)
        queue.commands[command_id] = self.tasks.spawn(work, urgent=queue.id == 0)

    # Carrying out

    def _execute(self, queue: SubmissionQueue, entry: SubmissionEntry, command_id: int) -> Steps:
        result: int | None = 0
        failure: CommandFailed | None = None
        try:
            if entry.prp_or_sgl or entry.fused_operation:
                _check(queue, entry)
            if queue.id:
                yield from self._io.run(entry)
            else:
                result = yield from self._admin.run(entry, self)
        except CommandFailed as failed:
            failure = failed
        except DmaFault:
            failure = CommandFailed(Status.DATA_TRANSFER_ERROR)
        except OSError:
            failure = CommandFailed(Status.INTERNAL_ERROR)
        self._leave(queue, command_id)
        if failure is not None:
            self._fail(queue, entry, failure)
        elif result is not None:
            self._post(Pending(queue, command_id, result, Status.SUCCESS, False))
        else:
            queue.outstanding -= 1
            self._kick(queue)
        if queue.id == 0:
            self._tell()

    def _leave(self, queue: SubmissionQueue, command_id: int) -> None:
        """The command is not carried out any more."""
        del queue.commands[command_id]
        if queue.id == 0:
            return
        self._executing -= 1
        if self._executing == EXECUTING - 1:
            for each in self._queues.submission.values():
                self._kick(each)

    def _fail(self, queue: SubmissionQueue, entry: SubmissionEntry, failure: CommandFailed) -> None:
        status, command_id = failure.status, entry.command_id
        self._logs.failed(queue.id, command_id, status, failure.parameter, entry.namespace_id)
        self._post(Pending(queue, command_id, 0, status, status not in RETRIABLE))

    def abort(self, queue: SubmissionQueue, command_id: int) -> bool:
        """End a command where it is; False when it is not there any more."""
        if queue.id == 0 and command_id in self.events.requests:
            self.events.requests.remove(command_id)
            queue.outstanding += 1
        elif command_id in queue.commands:
            self.tasks.cancel(queue.commands[command_id])
            self._leave(queue, command_id)
        else:
            return False
        self._post(Pending(queue, command_id, 0, Status.COMMAND_ABORT_REQUESTED, False))
        return True

    def abandon(self, queue: SubmissionQueue) -> None:
        """A submission queue is being deleted: nothing of it goes on.

        If its completion queue is full, nobody hears of what is not posted yet: more and more could wait there.
        """
        completions = queue.completions
        full = completions.waiting
        if full:
            completions.pending = deque(
                each for each in completions.pending if each.sq is not queue
            )
        if queue.fetch is not None:
            self.tasks.cancel(queue.fetch)
        queue.fetch, queue.tail = None, queue.head
        for command_id in list(queue.commands):
            self.tasks.cancel(queue.commands[command_id])
            self._leave(queue, command_id)
            if not full:
                status = Status.COMMAND_ABORTED_SQ_DELETION
                self._post(Pending(queue, command_id, 0, status, False))

    def discard(self, queue: CompletionQueue) -> None:
        """A completion queue is deleted: what it has no place for is lost."""
        queue.pending.clear()
        if queue.post is not None:
            self.tasks.cancel(queue.post)

    # Completions

    def _post(self, pending: Pending) -> None:
        if self._tracer:
            self._tracer.emit(
                NvmeCommandEnded(self._name, pending.sq.id, pending.command_id, pending.status.name)
            )
        queue = pending.sq.completions
        queue.pending.append(pending)
        if queue.post is None:
            queue.post = self.tasks.spawn(self._write(queue), urgent=queue.id == 0, early=True)

    def _write(self, queue: CompletionQueue) -> Steps:
        while queue.pending:
            count = min(len(queue.pending), queue.room, BURST)
            if not count:
                yield queue
                continue
            completions = [queue.pending.popleft() for _ in range(count)]
            place, entries = queue.place, queue.entries(completions)
            queue.advance(count)
            queue.on_its_way = count
            try:
                yield from self._transfers.write(place, entries)
            except DmaFault as fault:
                raise Fatal(f"completion queue {queue.id}: {fault}") from None
            queue.on_its_way = 0
            self._interrupts.posted(queue)
            for each in completions:
                each.sq.outstanding -= 1
                self._kick(each.sq)
        queue.post = None

    def step(self) -> None:
        self.tasks.step()

    def cancel(self) -> None:
        """End everything; what is in flight ends without moving its bytes."""
        self.tasks.clear()
        self._interrupts.nudge, self._interrupts.can_nudge = lambda: None, lambda: False


def _check(queue: SubmissionQueue, entry: SubmissionEntry) -> None:
    """SGLs are for I/O alone, none of them is for metadata (SGLS has no such bit), and nothing is fused."""
    if not queue.id or entry.prp_or_sgl != DataPointer.SGL or entry.fused_operation:
        raise CommandFailed(Status.INVALID_FIELD, 1)
