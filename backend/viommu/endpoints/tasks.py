"""What an endpoint does at the same time: generators that take turns."""

from collections import deque

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

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def busy(self) -> bool:
        """One of them can go on."""
        for task in self._tasks:  # noqa: SIM110 - asked at each turn, and the first can, mostly
            if not task.waiting:
                return True
        return False

    def spawn(self, steps: Steps) -> Task:
        """Begin at the next turn."""
        task = Task(steps)
        self._tasks.append(task)
        return task

    def step(self) -> None:
        """Let the next that can go on do so. Raises what it raises; then it is over."""
        tasks, ended = self._tasks, 0
        for _ in range(len(tasks) + 1):
            if not tasks or ended == 2:
                return
            task = tasks.popleft()
            if task.waiting:
                tasks.append(task)
            elif task.step():
                tasks.append(task)
                return
            else:
                ended += 1

    def cancel(self, task: Task) -> None:
        """End one of them; it must not be the one whose turn it is."""
        if task in self._tasks:
            self._tasks.remove(task)
        task.cancel()

    def clear(self) -> None:
        """End them all."""
        while self._tasks:
            self._tasks.popleft().cancel()
