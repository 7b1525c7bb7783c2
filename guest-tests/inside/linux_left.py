"""An engine that is left alone in the middle of its work."""

from collections.abc import Callable
from time import sleep

from engine import RAND48
from linux_vfio import DESTINATION, IN_FLIGHT, Json, Session
from vfio import Memory

STARTED = "/run/started"


def running() -> dict[str, Json]:
    """Start a long DMA by VFIO, say so in a file, and hold everything open."""
    session, memory = Session(), Memory(IN_FLIGHT)
    session.container.map(DESTINATION, memory)
    frame = session.frame()
    frame.start(RAND48, DESTINATION, IN_FLIGHT, rate=1)
    with open(STARTED, "w") as file:  # noqa: PTH123 - pathlib is slow to import
        file.write(f"{frame.running}\n")
    sleep(3600)
    return {}


CASES: dict[str, Callable[[], dict[str, Json]]] = {"running": running}
