"""Submission and completion queues as rings in guest RAM (NVM Express 1.4, 4.1), and which of them there are."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from viommu.endpoints.nvme.errors import CommandFailed
from viommu.endpoints.nvme.events import NvmeQueueCreated
from viommu.endpoints.tasks import Task
from viommu.layouts.nvme_commands import (
    COMPLETION_SIZE,
    Status,
    SubmissionEntry,
    completion_entry,
)
from viommu.trace import Tracer

IO_QUEUES = 16
"""I/O submission queues, and as many completion queues."""
MAX_ENTRIES = 1024
DEPTH = 32
"""Commands of one submission queue that are carried out, or wait for a place in the completion queue."""


class Pending(NamedTuple):
    """A completion that is not in guest RAM yet."""

    sq: "SubmissionQueue"
    command_id: int
    result: int
    status: Status
    do_not_retry: bool


class CompletionQueue:
    """A ring that the controller fills. `vector` is None when it sends no interrupts."""

    def __init__(self, queue_id: int, base: int, size: int, vector: int | None) -> None:
        self.id, self.base, self.size, self.vector = queue_id, base, size, vector
        self.head = self.tail = 0
        self.post: Task | None = None
        self.pending: deque[Pending] = deque()
        self.on_its_way = 0
        """Entries that have their places, and are not all in guest RAM yet."""
        self._phase = 1

    @property
    def room(self) -> int:
        """How many entries can be written in a row. A ring with one free entry is full."""
        free = (self.head - self.tail - 1) % self.size
        return min(free, self.size - self.tail)

    @property
    def waiting(self) -> bool:
        """It is full."""
        return not self.room

    @property
    def unread(self) -> int:
        """Entries in guest RAM that software has not said to have seen."""
        return max(0, self._taken - self.on_its_way)

    @property
    def _taken(self) -> int:
        return (self.tail - self.head) % self.size

    @property
    def place(self) -> int:
        """Where the next entry goes."""
        return self.base + self.tail * COMPLETION_SIZE

    def entries(self, completions: Sequence[Pending]) -> bytes:
        """As they go to `place`."""
        return b"".join(
            completion_entry(
                result=each.result,
                sq_head=each.sq.head,
                sq_id=each.sq.id,
                command_id=each.command_id,
                phase=self._phase,
                status=each.status,
                do_not_retry=each.do_not_retry,
            )
            for each in completions
        )

    def advance(self, count: int) -> None:
        """Entries are being written. Software may see them before we know that they are there."""
        self.tail += count
        if self.tail == self.size:
            self.tail, self._phase = 0, 1 - self._phase

    def ring(self, head: int) -> bool:
        """The head doorbell. False when the value is not one of what software can have seen."""
        if head >= self.size or (head - self.head) % self.size > self._taken:
            return False
        self.head = head
        return True


class Drained:
    """Waits until what is pending of a completion queue is written, or cannot be."""

    def __init__(self, queue: CompletionQueue) -> None:
        self._queue = queue

    @property
    def waiting(self) -> bool:
        queue = self._queue
        return bool(queue.on_its_way or (queue.pending and not queue.waiting))


class SubmissionQueue:
    """A ring that software fills."""

    def __init__(self, queue_id: int, base: int, size: int, completions: CompletionQueue) -> None:
        self.id, self.base, self.size, self.completions = queue_id, base, size, completions
        self.head = self.tail = 0
        self.fetch: Task | None = None
        self.commands: dict[int, Task] = {}
        """What is being carried out, by Command Identifier."""
        self.outstanding = 0
        """Commands that have been fetched and whose completion is not in guest RAM."""

    @property
    def room(self) -> int:
        """How many entries can be fetched in a row."""
        there = (self.tail - self.head) % self.size
        return max(0, min(there, self.size - self.head, DEPTH - self.outstanding))

    @property
    def place(self) -> int:
        """Where the next entry is."""
        return self.base + self.head * SubmissionEntry.size

    def advance(self, count: int) -> None:
        """Entries have been fetched."""
        self.head = (self.head + count) % self.size

    def ring(self, tail: int) -> bool:
        """The tail doorbell. False when the value is none of the ring."""
        if tail >= self.size:
            return False
        self.tail = tail
        return True


class Queues:
    """The queues of an endpoint, by their identifiers; 0 is the admin queues'."""

    def __init__(self, name: str, vectors: int, tracer: Tracer) -> None:
        self.submission: dict[int, SubmissionQueue] = {}
        self.completion: dict[int, CompletionQueue] = {}
        self._name, self._vectors, self._tracer = name, vectors, tracer

    def clear(self) -> None:
        self.submission.clear()
        self.completion.clear()

    def create_admin(self, bases: tuple[int, int], sizes: tuple[int, int]) -> None:
        """Of the submission queue, and of the completion queue."""
        self._add_completion(CompletionQueue(0, bases[1], sizes[1], vector=0))
        self._add_submission(SubmissionQueue(0, bases[0], sizes[0], self.completion[0]))

    def create_completion(self, queue_id: int, base: int, entries: int, vector: int | None) -> None:
        """Raises `CommandFailed` as Create I/O Completion Queue fails."""
        self._check(queue_id, entries, queue_id in self.completion)
        if vector is not None and vector >= self._vectors:
            raise CommandFailed(Status.INVALID_INTERRUPT_VECTOR)
        self._add_completion(CompletionQueue(queue_id, base, entries, vector))

    def create_submission(self, queue_id: int, base: int, entries: int, completion_id: int) -> None:
        """Raises `CommandFailed` as Create I/O Submission Queue fails."""
        if not 0 < completion_id <= IO_QUEUES:
            raise CommandFailed(Status.INVALID_QUEUE_IDENTIFIER)
        completions = self.completion.get(completion_id)
        if completions is None:
            raise CommandFailed(Status.COMPLETION_QUEUE_INVALID)
        self._check(queue_id, entries, queue_id in self.submission)
        self._add_submission(SubmissionQueue(queue_id, base, entries, completions))

    def delete_completion(self, queue_id: int) -> CompletionQueue:
        """Raises `CommandFailed` as Delete I/O Completion Queue fails. What it has pending is the caller's."""
        queue = self.completion.get(queue_id) if queue_id else None
        if queue is None:
            raise CommandFailed(Status.INVALID_QUEUE_IDENTIFIER)
        if any(each.completions is queue for each in self.submission.values()):
            raise CommandFailed(Status.INVALID_QUEUE_DELETION)
        del self.completion[queue_id]
        return queue

    def delete_submission(self, queue_id: int) -> SubmissionQueue:
        """Raises `CommandFailed` as Delete I/O Submission Queue fails. What it has under way is the caller's."""
        queue = self.submission.pop(queue_id, None) if queue_id else None
        if queue is None:
            raise CommandFailed(Status.INVALID_QUEUE_IDENTIFIER)
        return queue

    def _add_completion(self, queue: CompletionQueue) -> None:
        self.completion[queue.id] = queue
        self._tell("completion", queue)

    def _add_submission(self, queue: SubmissionQueue) -> None:
        self.submission[queue.id] = queue
        self._tell("submission", queue)

    def _tell(self, kind: str, queue: CompletionQueue | SubmissionQueue) -> None:
        if self._tracer:
            self._tracer.emit(NvmeQueueCreated(self._name, kind, queue.id, queue.base, queue.size))

    def _check(self, queue_id: int, entries: int, taken: bool) -> None:
        if not 0 < queue_id <= IO_QUEUES or taken:
            raise CommandFailed(Status.INVALID_QUEUE_IDENTIFIER)
        if not 1 < entries <= MAX_ENTRIES:
            raise CommandFailed(Status.INVALID_QUEUE_SIZE)
