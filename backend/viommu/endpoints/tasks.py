"""What an endpoint does at the same time: generators that take turns."""

import sys
from collections import deque
from contextlib import ExitStack

from viommu.endpoints.transfers import Steps, Waiting


class Task:
    """A generator and what it waits for."""

    __slots__ = ("_awaited", "_steps")

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._awaited: Waiting | None = None

    @property
    def waiting(self) -> bool:
        """There is nothing to do before what it waits for has come."""
        return self._awaited is not None and self._awaited.waiting

    def step(self) -> bool:
        """Do one small thing; False when it was the last."""
        try:
            self._awaited = next(self._steps)
        except StopIteration:
            return False
        return True

    def cancel(self) -> None:
        """End it where it is; what it has in flight ends without moving its bytes."""
        self._steps.close()


class Tasks:
    """Take turns, one step each. Those that wait are passed over; one whose last step it was lets the next go on."""

    def __init__(self, width: int = sys.maxsize) -> None:
        """Only the oldest `width` take turns, and the others come after them."""
        self._width = width
        self._urgent: deque[Task] = deque()
        self._tasks: deque[Task] = deque()
        self._queues = self._urgent, self._tasks

    def __len__(self) -> int:
        return len(self._urgent) + len(self._tasks)

    @property
    def busy(self) -> bool:
        """One of them can go on."""
        for queue in self._queues:
            for task in queue:
                if not task.waiting:
                    return True
        return False

    def spawn(self, steps: Steps, *, urgent: bool = False, early: bool = False) -> Task:
        """Begin when its turn comes: before all that is not urgent; early is among those that take turns already."""
        task = Task(steps)
        queue = self._urgent if urgent else self._tasks
        queue.insert(self._width - 1 if early else len(queue), task)
        return task

    def step(self) -> None:
        """Let the next that can go on do so. Raises what it raises; then it is over."""
        for _ in range(2):
            queue = self._next()
            if queue is None:
                return
            task = queue.popleft()
            if task.step():
                queue.insert(self._width - 1, task)
                return

    def _next(self) -> deque[Task] | None:
        """The queue whose first can go on; those before it that wait went to its end."""
        for queue in self._queues:
            for _ in range(len(queue)):
                if not queue[0].waiting:
                    return queue
                queue.rotate(-1)
        return None

    def cancel(self, task: Task) -> None:
        """End one of them; it must not be the one whose turn it is."""
        for queue in self._queues:
            if task in queue:
                queue.remove(task)
        task.cancel()

    def clear(self) -> None:
        """End them all, though the end of one fails."""
        with ExitStack() as over:
            for queue in reversed(self._queues):
                while queue:
                    over.callback(queue.pop().cancel)
