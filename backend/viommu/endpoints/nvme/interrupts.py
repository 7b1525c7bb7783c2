"""The interrupts of completion queues: a pin, whose level they are, or MSI-X (NVM Express 1.4, 7.5).

The pin is let go of whenever the guest accesses a BAR: `accessed` asserts it again as long as there is a reason.
"""

from collections.abc import Callable

from viommu.endpoints.nvme.queues import CompletionQueue, Queues


class Interrupts:
    """Sends what the queues have to tell. `wired` says whether the pin is in use."""

    def __init__(self, queues: Queues) -> None:
        self.send: Callable[[int], bool] = lambda _vector: False
        self.wired: Callable[[], bool] = lambda: False
        self.mask = 0
        """INTMS, of which bit 0 is the pin's. With MSI-X it has no meaning."""
        self._queues = queues

    def posted(self, queue: CompletionQueue) -> None:
        """Entries were written to a completion queue."""
        if queue.vector is None:
            return
        if not self.wired():
            self.send(queue.vector)
        elif not self.mask & 1:
            self.send(0)

    def accessed(self) -> None:
        """The guest has accessed a BAR."""
        if not self.mask & 1 and self.wired() and self._wanted():
            self.send(0)

    def _wanted(self) -> bool:
        return any(
            queue.vector is not None and queue.unread for queue in self._queues.completion.values()
        )
