"""The interrupts of completion queues: a pin, whose level they are, or MSI-X (NVM Express 1.4, 7.5).

QEMU asserts the pin some time after we have sent the interrupt. The guest's next access to a BAR, whichever, lets go of
it, and then QEMU says so: `released`. A driver that finds nothing to do accesses none, so a pin that is asserted for
nothing keeps the guest looking for ever. Hence an interrupt is sent only if none is on its way or asserted, and only
when the driver is not just looking by itself: not right after it has emptied one of several queues. One that was seen
to be answered without having been asserted is still on its way, mostly; it may also have been lost.
"""

from collections.abc import Callable

from viommu.endpoints.nvme.queues import CompletionQueue, Queues

PATIENCE = 200
"""Steps after which a driver that has emptied a queue has seen the others."""
LOST = 5000
"""Steps after which an interrupt on its way would have come."""


class Interrupts:
    """Sends what the queues have to tell. `wired` says whether the pin is in use."""

    def __init__(self, queues: Queues) -> None:
        self.send: Callable[[int], bool] = lambda _vector: False
        self.wired: Callable[[], bool] = lambda: False
        self.mask = 0
        """INTMS, of which bit 0 is the pin's. With MSI-X it has no meaning."""
        self._queues = queues
        self._sent = self._late = self._looking = False
        self._countdown = 0

    @property
    def due(self) -> bool:
        """`step` has to be called."""
        return self._countdown > 0

    def posted(self, queue: CompletionQueue) -> None:
        """Entries were written to a completion queue."""
        if queue.vector is None:
            return
        if not self.wired():
            self._sent = False
            self.send(queue.vector)
        elif self._countdown:
            pass
        elif self._late:
            self._countdown = LOST
        elif not self._sent:
            self._assert()

    def accessed(self) -> None:
        """The guest has accessed a BAR."""
        self._looking = False

    def acknowledged(self, queue: CompletionQueue) -> None:
        """That access was to the head doorbell of a completion queue."""
        self._looking = not queue.unread
        if not self._wanted():
            self._countdown = 0
            self._late = self._sent  # unless `released` follows

    def released(self) -> None:
        """The pin was asserted, and that access has let go of it."""
        self._sent = self._late = False
        self._countdown = 0
        if self._wanted():
            if self._looking:
                self._countdown = PATIENCE
            else:
                self._assert()

    def unmasked(self) -> None:
        """INTMC was written."""
        if not self._sent and self._wanted():
            self._assert()

    def step(self) -> None:
        """Time passes."""
        if self._countdown:
            self._countdown -= 1
            if not self._countdown and self._wanted():
                self._assert()

    def reset(self) -> None:
        """The queues are gone."""
        self.mask, self._countdown = 0, 0
        self._sent = self._late = False

    def _assert(self) -> None:
        if not self.mask & 1:
            self._late, self._countdown = False, 0
            self._sent = self.send(0)

    def _wanted(self) -> bool:
        queues = self._queues.completion.values()
        return any(queue.vector is not None and queue.unread for queue in queues) and self.wired()
