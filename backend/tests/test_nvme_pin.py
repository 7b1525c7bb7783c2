"""The interrupt pin of an NVMe controller, behind a QEMU that lets go of it at any access, and a driver in a hurry."""

from typing import Any

import pytest

from tests.nvme_rig import ASYNC_EVENT, CFS, CSTS, DATA, FLUSH, IDENTIFY, NvmeRig, Queue, command
from viommu.endpoints.nvme.interrupts import LOST, PATIENCE, TRIES, VAIN
from viommu.endpoints.port import Transfer


class Wired:
    """A controller whose pin is in use, with one queue for I/O, a clock, and `requests` for asynchronous events."""

    def __init__(self, requests: int = 1) -> None:
        self.now = 0.0
        self.rig = NvmeRig(clock=lambda: self.now)
        self.queue = self.rig.io(3)
        for _ in range(requests):
            self.put(self.rig.admin, command(ASYNC_EVENT))
        self.rig.nvme.pin_enabled = lambda: True
        self.rig.interrupts.clear()

    def flush(self) -> None:
        """A command, carried out."""
        self.put(self.queue, command(FLUSH, nsid=1))

    def put(self, queue: Queue, entry: bytes) -> None:
        queue.put(entry)
        queue.ring()
        self.steps()

    def steps(self) -> None:
        for _ in range(20):
            self.rig.nvme.step()

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.steps()

    def released(self) -> None:
        """QEMU says so, after the access that did it."""
        self.rig.nvme.pin_released()
        self.steps()

    def came_for_nothing(self) -> None:
        """The interrupt for what was seen already; it was ended by an event, and there is another request."""
        self.flush()
        assert len(self.queue.completions()) == 1
        self.wait(VAIN)
        assert len(self.rig.admin.completions()) == 1
        self.released()
        self.put(self.rig.admin, command(ASYNC_EVENT))

    @property
    def sent(self) -> int:
        """How often the interrupt was sent."""
        assert set(self.rig.interrupts) <= {0}
        return len(self.rig.interrupts)


@pytest.fixture
def wired() -> Wired:
    return Wired()


def test_it_is_sent_once_for_all_that_comes_meanwhile(wired: Wired) -> None:
    wired.flush()
    wired.flush()
    assert wired.sent == 1
    assert len(wired.queue.completions()) == 2
    wired.released()
    wired.wait(1.0)
    assert wired.sent == 1
    wired.flush()
    assert wired.sent == 2


def test_what_the_driver_has_not_seen_when_it_looked_is_sent_at_once(wired: Wired) -> None:
    wired.flush()
    wired.flush()
    wired.rig.doorbell(7, 1)
    wired.released()
    assert wired.sent == 2


def test_another_processor_lets_go_of_it(wired: Wired) -> None:
    """One rings a doorbell, while the other may be in the handler, or not."""
    wired.flush()
    wired.queue.ring()
    wired.released()
    assert wired.sent == 1
    wired.wait(PATIENCE[0])
    assert wired.sent == 2, "it was not"


def test_another_processor_lets_go_of_it_and_the_handler_goes_on(wired: Wired) -> None:
    wired.flush()
    wired.queue.ring()
    wired.released()
    wired.wait(PATIENCE[0] / 2)
    assert len(wired.queue.completions()) == 1
    wired.wait(1.0)
    assert wired.sent == 1


def test_a_driver_that_looks_at_several_queues(wired: Wired) -> None:
    wired.flush()
    wired.put(wired.rig.admin, command(IDENTIFY, 1, prp1=DATA))
    assert len(wired.queue.completions()) == 1
    wired.released()
    assert wired.sent == 1, "it may be about to look at the other"
    wired.wait(PATIENCE[0])
    assert wired.sent == 2, "it was not"


def test_one_that_is_late_is_not_sent_twice(wired: Wired) -> None:
    wired.flush()
    assert len(wired.queue.completions()) == 1  # before the pin was asserted
    wired.flush()
    wired.wait(LOST / 2)
    assert len(wired.queue.completions()) == 1
    wired.released()  # there it was
    wired.wait(1.0)
    assert wired.sent == 1
    wired.flush()
    assert wired.sent == 2


def test_one_that_is_lost_is_not_waited_for_for_ever(wired: Wired) -> None:
    wired.flush()
    assert len(wired.queue.completions()) == 1
    wired.flush()
    assert wired.sent == 1
    wired.wait(LOST)
    assert wired.sent == 2


def test_one_that_comes_for_nothing_is_made_to_be_let_go_of(wired: Wired) -> None:
    """A handler that finds nothing accesses nothing. So there is something for it to find."""
    wired.flush()
    assert len(wired.queue.completions()) == 1
    wired.wait(VAIN)
    (event,) = wired.rig.admin.completions()
    assert event.result & 7 == 7, "of the vendor's own type"
    wired.released()
    wired.wait(1.0)
    assert wired.sent == 1


def test_that_needs_a_request_which_may_come_later() -> None:
    wired = Wired(requests=0)
    wired.flush()
    wired.wait(PATIENCE[0])
    assert wired.sent == 1
    assert len(wired.queue.completions()) == 1
    wired.wait(VAIN)
    wired.put(wired.rig.admin, command(ASYNC_EVENT))
    wired.wait(VAIN)
    assert len(wired.rig.admin.completions()) == 1


def test_without_a_request_it_is_given_time_before() -> None:
    """One that came for nothing then would keep Linux from ever making one."""
    wired = Wired(requests=0)
    wired.flush()
    wired.wait(PATIENCE[0] / 2)
    wired.flush()
    assert wired.sent == 0
    assert len(wired.queue.completions()) == 2
    wired.wait(1.0)
    assert wired.sent == 0, "it looked by itself"
    wired.flush()
    wired.wait(PATIENCE[0])
    assert wired.sent == 1


def test_it_is_tried_again_however_often_it_was_needed_before(wired: Wired) -> None:
    for _ in range(20):
        wired.came_for_nothing()
    wired.flush()
    assert len(wired.queue.completions()) == 1
    wired.wait(VAIN)
    assert len(wired.rig.admin.completions()) == 1, "and it has not been let go of"
    wired.queue.ring()
    wired.wait(VAIN)
    wired.put(wired.rig.admin, command(ASYNC_EVENT))
    wired.wait(2 * VAIN)
    assert len(wired.rig.admin.completions()) == 1


def test_it_ends_though_nobody_lets_go_of_it() -> None:
    """A driver that polls, and then has nothing to do: nor has the server."""
    wired = Wired(requests=0)
    wired.flush()
    wired.wait(PATIENCE[0])
    assert len(wired.queue.completions()) == 1
    for _ in range(TRIES + 1):
        assert wired.rig.nvme.busy
        wired.wait(1.0)
    assert not wired.rig.nvme.busy


def test_a_controller_that_has_failed_tells_nothing_more(wired: Wired) -> None:
    wired.put(wired.rig.admin, command(ASYNC_EVENT))
    wired.flush()
    assert len(wired.queue.completions()) == 1
    wired.rig.port.bus_master = False
    wired.flush()
    assert wired.rig.get(CSTS) & CFS
    wired.rig.port.bus_master = True
    wired.wait(VAIN)
    assert wired.rig.admin.completions() == []


def test_patience_grows_when_it_came_for_nothing(wired: Wired) -> None:
    for _ in range(10):
        wired.came_for_nothing()
    sent = wired.sent
    wired.flush()
    wired.queue.ring()
    wired.released()
    wired.wait(PATIENCE[1] * 0.9)
    assert wired.sent == sent + 1
    wired.wait(PATIENCE[1] * 0.2)
    assert wired.sent == sent + 2


def test_a_reset_forgets_it(wired: Wired) -> None:
    wired.flush()
    wired.rig.set(0x14, 0)
    wired.rig.enable()
    wired.put(wired.rig.admin, command(IDENTIFY, 1, prp1=DATA))
    wired.wait(PATIENCE[0])
    assert wired.sent == 2


def test_messages_take_over(wired: Wired) -> None:
    """MSI-X is switched on while an interrupt of the pin is out, and off again."""
    wired.flush()
    wired.rig.nvme.pin_enabled = lambda: False
    wired.flush()
    assert wired.rig.interrupts == [0, 3]
    assert len(wired.queue.completions()) == 2
    wired.rig.interrupts.clear()
    wired.rig.nvme.pin_enabled = lambda: True
    wired.flush()
    assert wired.sent == 1


def test_a_completion_that_is_seen_before_we_know_that_it_is_there(wired: Wired) -> None:
    """The DMA that wrote it is held up. The driver may say that it has seen it, and hears no more of it."""
    held = True

    class Held(Transfer):
        @property
        def waiting(self) -> bool:
            return held and wired.rig.read(self.iova, 16) != bytes(16)

    begin = wired.rig.port.begin

    def hold(iova: int, size: int, **access: Any) -> Transfer:
        transfer = begin(iova, size, **access)
        if iova != wired.queue.cq:
            return transfer
        return Held(wired.rig.port, transfer.translation)

    wired.rig.port.begin = hold  # type: ignore[method-assign]
    wired.flush()
    assert wired.sent == 0
    assert len(wired.queue.completions()) == 1, "and the doorbell rings"
    held = False
    wired.wait(0)
    wired.wait(1.0)
    assert wired.sent == 0
    assert wired.rig.nvme.tasks == 0
    wired.flush()
    assert wired.sent == 1
    assert len(wired.queue.completions()) == 1
