"""The interrupts of completion queues: a pin, whose level they are, or MSI-X (NVM Express 1.4, 7.5).

QEMU asserts the pin some time after we have sent the interrupt. The guest's next access to a BAR, by whichever of its
processors, lets go of it, and then QEMU says so: `released`. A driver that finds nothing to do accesses none, so a pin
that is asserted for nothing keeps the guest looking, until its kernel disables the interrupt for good. Hence

- an interrupt is sent only if none is on its way or asserted;
- when the pin was released and there is still a reason, the driver is given time to see that by itself, if it can:
  unless it has just told us how far it has looked in that queue;
- when it has seen all and an interrupt is still out, that comes for nothing, or was lost. If it is not released soon,
  the controller makes the driver access a BAR, by an asynchronous event;
- while there is no request for such an event, the driver is given time before each interrupt. After an event Linux
  makes the next request by itself, but not while it is interrupted all the time.
"""

from collections.abc import Callable

from viommu.endpoints.nvme.queues import CompletionQueue, Queues

PATIENCE = 1e-3, 50e-3
"""Seconds in which a driver that is looking has seen all: at first, and at most."""
VAIN = 2e-3
"""Seconds after which an interrupt that has no reason any more is not released by itself."""
TRIES = 8
"""How often it is then made to be, with twice the time in between each time. A driver that polls lets go of nothing."""
LOST = 20e-3
"""Seconds after which an interrupt that was on its way would have come."""


class Interrupts:
    """Sends what the queues have to tell. `wired` says whether the pin is in use."""

    def __init__(self, queues: Queues, clock: Callable[[], float]) -> None:
        self.send: Callable[[int], bool] = lambda _vector: False
        self.wired: Callable[[], bool] = lambda: False
        self.nudge: Callable[[], None] = lambda: None
        """Makes the driver access a BAR, if it is looking, and if that is possible."""
        self.can_nudge: Callable[[], bool] = lambda: False
        """It is possible."""
        self.mask = 0
        """INTMS, of which bit 0 is the pin's. With MSI-X it has no meaning."""
        self._queues, self._clock = queues, clock
        self._sent = False
        # One is on its way, or asserted.
        self._late = False
        # And the driver has seen all that it was sent for.
        self._looked: CompletionQueue | None = None
        # The queue in which the driver has told how far it has looked, if that was its last access.
        self._patience = PATIENCE[0]
        self._tries = 0
        self._then: float | None = None
        # When to act.

    @property
    def due(self) -> bool:
        """`step` has to be called."""
        return self._then is not None

    def posted(self, queue: CompletionQueue) -> None:
        """Entries were written to a completion queue."""
        if queue.vector is None:
            return
        if not self.wired():
            self._reset_pin()
            self.send(queue.vector)
        elif not queue.unread:
            return  # it was seen already
        elif self._late:
            self._then = self._clock() + LOST
        elif not self._sent and self._then is None:
            if self.can_nudge():
                self._assert()
            else:
                self._then = self._clock() + self._patience

    def accessed(self) -> None:
        """The guest has accessed a BAR."""
        self._looked = None

    def acknowledged(self, queue: CompletionQueue) -> None:
        """That access was to the head doorbell of a completion queue."""
        self._looked = queue
        if not self._wanted():
            self._late, self._tries = self._sent, 0  # unless `released` follows
            self._then = self._clock() + VAIN if self._late else None

    def released(self) -> None:
        """The pin was asserted, and that access has let go of it."""
        self._reset_pin()
        if self._wanted():
            if self._looked is not None and self._looked.unread:
                self._assert()
            else:
                self._then = self._clock() + self._patience

    def unmasked(self) -> None:
        """INTMC was written."""
        if not self._sent and self._wanted():
            self._assert()

    def step(self) -> None:
        """Act when it is time."""
        if self._then is None or self._clock() < self._then:
            return
        self._then = None
        if self._wanted():
            self._assert()
        elif self._late:
            self._patience = min(2 * self._patience, PATIENCE[1])
            if self._tries < TRIES:
                self._then = self._clock() + VAIN * 2**self._tries
                self._tries += 1
            self.nudge()

    def reset(self) -> None:
        """The queues are gone."""
        self.mask, self._looked = 0, None
        self._reset_pin()

    def _reset_pin(self) -> None:
        """No interrupt is on its way, nor asserted."""
        self._sent = self._late = False
        self._then = None

    def _assert(self) -> None:
        if not self.mask & 1:
            self._late, self._then = False, None
            self._sent = self.send(0)

    def _wanted(self) -> bool:
        queues = self._queues.completion.values()
        return any(queue.vector is not None and queue.unread for queue in queues) and self.wired()
