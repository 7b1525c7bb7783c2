"""How fast a disk is past the page cache: 1 MiB after the other, and 4 KiB anywhere, one command at a time.

    python3 bench_disk.py DISK

Prints a line of JSON: MiB a second, and commands a second.
"""

import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from random import Random
from statistics import median
from time import monotonic

MIB, PAGE = 1 << 20, 4096
AREA, COUNT, ROUNDS = 64, 400, 3


def main(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    buffer = memoryview(mmap.mmap(-1, MIB))

    def read(offset: int, size: int) -> None:
        os.preadv(descriptor, [buffer[:size]], offset)

    def write(offset: int, size: int) -> None:
        os.pwrite(descriptor, buffer[:size], offset)

    def rate(transfer: Callable[[int, int], None], size: int, offsets: list[int]) -> float:
        return len(offsets) / median(seconds(transfer, size, offsets))

    pieces = [number * MIB for number in range(AREA)]
    dice = Random(1)
    pages = [dice.randrange(AREA * MIB // PAGE) * PAGE for _ in range(COUNT)]
    figures = {
        "write": rate(write, MIB, pieces),
        "read": rate(read, MIB, pieces),
        "random write": rate(write, PAGE, pages),
        "random read": rate(read, PAGE, pages),
    }
    print(json.dumps(figures))


def seconds(transfer: Callable[[int, int], None], size: int, offsets: list[int]) -> Iterator[float]:
    for _ in range(ROUNDS):
        started = monotonic()
        for offset in offsets:
            transfer(offset, size)
        yield monotonic() - started


if __name__ == "__main__":
    main(sys.argv[1])
