"""The knobs of a stock kernel that attach and detach, on an engine that does DMA meanwhile.

The engine is driven through sysfs, in the identity domain at physical addresses.
"""

from collections.abc import Callable
from time import monotonic, sleep

import pci
from engine import IDS, RAND48, Engine, Frame
from kernel_log import KernelLog
from pci import Function
from pool import HUGE, Pool, Region

FRAMES = 4
SETTLED = 0.3
"""Seconds in which whatever is late lands."""

Json = int | float | str | bool | list["Json"] | dict[str, "Json"] | None


class Running:
    """The first engine without a driver, in the identity domain, in the middle of filling 2 MiB in small steps.

    Several frames do that at the same time, which keeps the engine busy for long.
    """

    def __init__(self) -> None:
        self.function = pci.find(ids=IDS)[0]
        write("/sys/bus/pci/drivers/vfio-pci/unbind", self.function.address)
        self.set_type("identity")
        self.memory: Region = Pool(HUGE).take(HUGE)
        self.memory.fill(0)
        engine = Engine(self.function)
        self.frames: list[Frame] = [engine.frame(index) for index in range(FRAMES)]
        first = self.frames[0]
        start = first.returned
        for frame in self.frames:
            frame.start(RAND48, self.memory.address(0), HUGE, rate=1)
        deadline = monotonic() + 10
        while first.returned - start < 100 and monotonic() < deadline:
            pass
        self.running = all(frame.running for frame in self.frames)

    def set_type(self, kind: str) -> None:
        """Give the group a default domain of another kind."""
        write(f"{self.function.path}/iommu_group/type", kind)

    def outcome(self) -> dict[str, Json]:
        """What has landed, and what lands from now on."""
        after = bytes(self.memory.view)
        sleep(SETTLED)
        now = bytes(self.memory.view)
        landed = len(after.rstrip(b"\0"))
        return {"running": self.running, "landed": landed, "size": HUGE, "late": now != after}


def write(path: str, value: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123 - pathlib is slow to import
        file.write(value)


def flip() -> dict[str, Json]:
    """Give the group another domain while the engine does DMA."""
    running = Running()
    log = KernelLog()
    running.set_type("DMA")
    result = running.outcome()
    status: list[Json] = [frame.wait().status for frame in running.frames]
    lines: list[Json] = [*log.wait("event")]
    log.close()
    give_back(running.function)
    return {**result, "status": status, "log": lines}


def remove() -> dict[str, Json]:
    """Remove the function while it does DMA."""
    running = Running()
    write(f"{running.function.path}/remove", "1")
    result = running.outcome()
    write("/sys/bus/pci/rescan", "1")
    give_back(running.function)
    return result


def give_back(function: Function) -> None:
    """To vfio-pci, as it was."""
    function.disable()
    function.write("driver_override", "vfio-pci")
    write("/sys/bus/pci/drivers_probe", function.address)


CASES: dict[str, Callable[[], dict[str, Json]]] = {"flip": flip, "remove": remove}
