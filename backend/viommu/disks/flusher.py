"""Makes a disk's blocks last while the server goes on: that takes as long as the disk likes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from viommu.closing import Closing
from viommu.endpoints.transfers import Steps


class _Until:
    def __init__(self, done: Future[None]) -> None:
        self._done = done

    @property
    def waiting(self) -> bool:
        return not self._done.done()


class Flusher(Closing):
    """Does `work` in a thread of its own, and calls `wake` from there when it is done.

    What failed once fails for ever: the kernel tells of blocks that it could not write, once, and forgets them. A
    flush that succeeded later would say of them that they last.
    """

    def __init__(self, work: Callable[[], None], wake: Callable[[], None]) -> None:
        self._work, self._wake = work, wake
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._next: Future[None] | None = None
        self._failure: OSError | None = None

    def flush(self) -> Steps:
        """Until what was written before lasts. Raises the `OSError` of `work`."""
        done = self._next
        if done is None or done.running() or done.done():
            done = self._next = self._thread.submit(self._run)
            done.add_done_callback(lambda _: self._wake())
        # Else one is still to begin, and will do for this one too.
        yield _Until(done)
        done.result()
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)

    def _run(self) -> None:
        if self._failure is None:
            try:
                self._work()
            except OSError as error:
                self._failure = error

    def close(self) -> None:
        """When what was asked for is done. Any number of times."""
        self._thread.shutdown()
