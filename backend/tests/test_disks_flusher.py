"""Flushes in a thread: what they cover, and what became of blocks that could not be written."""

import errno
from collections.abc import Iterator
from threading import Event

import pytest

from viommu.disks.flusher import Flusher
from viommu.endpoints.transfers import Steps


class Slow:
    """Work that lasts until it is told to end; how often it began."""

    def __init__(self) -> None:
        self.go_on = Event()
        self.begun = 0

    def __call__(self) -> None:
        self.begun += 1
        assert self.go_on.wait(30)


@pytest.fixture
def slow() -> Iterator[Slow]:
    work = Slow()
    yield work
    work.go_on.set()


def finish(flush: Steps) -> None:
    for _ in flush:
        pass


def begun(flush: Steps) -> Steps:
    """The same, after its first step."""
    awaited = next(flush)
    assert awaited is not None
    return flush


def test_flushes_that_have_not_begun_are_one(slow: Slow) -> None:
    """What was written before any of them lasts then."""
    with Flusher(slow, lambda: None) as flusher:
        flushes = [begun(flusher.flush())]
        while not slow.begun:
            pass
        flushes += [begun(flusher.flush()) for _ in range(100)]
        slow.go_on.set()
        for flush in flushes:
            finish(flush)
        assert slow.begun == 2, "the first had begun, and knew nothing of what was written since"


def test_nobody_needs_to_wait(slow: Slow) -> None:
    """A reset ends what waits, again and again; what is left over is one flush."""
    with Flusher(slow, lambda: None) as flusher:
        for _ in range(100):
            begun(flusher.flush()).close()
        slow.go_on.set()
    assert slow.begun <= 2


def test_a_failure_is_for_ever() -> None:
    """The kernel would tell of it once, and the next flush would say that all is well."""
    calls = 0

    def fail_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "full")

    with Flusher(fail_once, lambda: None) as flusher:
        finish(flusher.flush())
        for _ in range(3):
            with pytest.raises(OSError, match="full") as raised:
                finish(flusher.flush())
            assert raised.value.errno == errno.ENOSPC
    assert calls == 2
