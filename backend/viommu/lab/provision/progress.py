"""What the person who waits for a setup sees."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

Say = Callable[[str], None]


@contextmanager
def watch(purpose: str, total: int, done: Callable[[], int]) -> Iterator[None]:
    """Shows a bar of `done()` out of `total` bytes while the block runs, on a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    finished = Event()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(purpose, total=total)

        def follow() -> None:
            while not finished.wait(0.2):
                progress.update(task, completed=done())

        follower = Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            finished.set()
            follower.join()
