"""Times how the guest's kernel attaches and detaches one function, whatever SMMU is in front of it.

    python3 bench_attach.py VENDOR:DEVICE ROUNDS      (hexadecimal IDs)

Prints one line of JSON: milliseconds a round of each kind, their median.
"""

import json
import sys
from collections.abc import Callable
from time import perf_counter

import pci
from vfio import Container, Device, Group


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def timed(rounds: int, work: Callable[[], None]) -> float:
    times = []
    for _ in range(rounds):
        start = perf_counter()
        work()
        times.append((perf_counter() - start) * 1000)
    return median(times)


def write(path: str, value: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123 - pathlib is slow to import
        file.write(value)


def main(ids: str, rounds: int) -> None:
    vendor, device = (int(part, 16) for part in ids.split(":"))
    (function,) = pci.find(ids=(vendor, device))
    function.write("driver_override", "vfio-pci")
    write("/sys/bus/pci/drivers_probe", function.address)

    def open_close() -> None:
        container = Container()
        group = Group(function.address)
        group.set_container(container)
        container.set_iommu()
        opened = Device(group, function.address)
        opened.close()
        group.close()
        container.close()

    def flip() -> None:
        write(f"{function.path}/iommu_group/type", "identity")
        write(f"{function.path}/iommu_group/type", "DMA")

    open_close()
    vfio = timed(rounds, open_close)
    write("/sys/bus/pci/drivers/vfio-pci/unbind", function.address)
    flip()
    print(json.dumps({"vfio": vfio, "flip": timed(rounds, flip)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
