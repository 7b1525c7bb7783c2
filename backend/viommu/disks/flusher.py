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
    """Does `work` in a thread of its own, once for each flush, and calls `wake` from there when it is done."""

    def __init__(self, work: Callable[[], None], wake: Callable[[], None]) -> None:
        self._work, self._wake = work, wake
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flush")

    def flush(self) -> Steps:
        """Until it is done. Raises what `work` raises."""
        done = self._thread.submit(self._work)
        done.add_done_callback(lambda _: self._wake())
        yield _Until(done)
        done.result()

    def close(self) -> None:
        """When what was begun is done. Any number of times."""
        self._thread.shutdown()
