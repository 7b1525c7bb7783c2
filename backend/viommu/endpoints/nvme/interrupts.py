"""The interrupts of completion queues: a pin, whose level they are, or MSI-X (NVM Express 1.4, 7.5).

QEMU asserts the pin some time after we have sent the interrupt. The guest's next access to a BAR, whichever, lets go of
it, and then QEMU says so: `released`. A driver that finds nothing to do accesses none, so a pin that is asserted for
nothing keeps the guest looking for ever. Hence an interrupt is sent only if none is on its way or asserted, and only
when the driver is not just looking by itself: not right after it has emptied one of several queues.
"""

from collections.abc import Callable

from viommu.endpoints.nvme.queues import CompletionQueue, Queues

PATIENCE = 32
"""Steps after which a driver that has emptied a queue has seen the others."""


class Interrupts:
    """Sends what the queues have to tell. `wired` says whether the pin is in use."""

    def __init__(self, queues: Queues) -> None:
        self.send: Callable[[int], bool] = lambda _vector: False
        self.wired: Callable[[], bool] = lambda: False
        self.mask = 0
        """INTMS, of which bit 0 is the pin's. With MSI-X it has no meaning."""
        self._queues = queues
        self._asserted = self._looking = False
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
            self.send(queue.vector)
        elif not self._asserted and not self._countdown:
            self._assert()

    def accessed(self) -> None:
        """The guest has accessed a BAR."""
        self._looking = False

    def acknowledged(self, queue: CompletionQueue) -> None:
        """That access was to the head doorbell of a completion queue."""
        self._looking = not queue.unread
        if not self._wanted():
            # All was seen. If the interrupt is still on its way it is one too many; if it was lost, it is forgotten.
            self._asserted, self._countdown = False, 0

    def released(self) -> None:
        """The pin was asserted, and that access has let go of it."""
        self._asserted = False
        if self._wanted():
            if self._looking:
                self._countdown = PATIENCE
            else:
                self._assert()

    def unmasked(self) -> None:
        """INTMC was written."""
        if not self._asserted and self._wanted():
            self._assert()

    def step(self) -> None:
        """Time passes."""
        if self._countdown:
            self._countdown -= 1
            if not self._countdown and not self._asserted and self._wanted():
                self._assert()

    def reset(self) -> None:
        """The queues are gone."""
        self.mask, self._asserted, self._countdown = 0, False, 0

    def _assert(self) -> None:
        if not self.mask & 1:
            self._asserted, self._countdown = True, 0
            self.send(0)

    def _wanted(self) -> bool:
        queues = self._queues.completion.values()
        return any(queue.vector is not None and queue.unread for queue in queues) and self.wired()
