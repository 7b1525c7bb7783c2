"""Writes and reads a disk past the page cache, by one system call each, from and into pages in any order.

    python3 scattered.py DISK OFFSET SIZE SEED

Prints {"right": …}: whether it reads what it has written, which is what `Random(SEED).randbytes(SIZE)` gives.
"""

import json
import mmap
import os
import sys
from random import Random

PAGE = 4096


def pages(size: int, seed: int) -> list[memoryview]:
    """`size` bytes of memory, of which no two pages that follow each other are neighbours by more than chance."""
    buffer = mmap.mmap(-1, size)
    buffer[:] = bytes(size)  # or memory would be given in the order of their first use
    found = [memoryview(buffer)[place : place + PAGE] for place in range(0, size, PAGE)]
    Random(seed).shuffle(found)
    return found


def main(path: str, offset: int, size: int, seed: int) -> bool:
    data = Random(seed).randbytes(size)
    disk = os.open(path, os.O_RDWR | os.O_DIRECT)
    source, target = pages(size, seed), pages(size, seed + 1)
    for number, page in enumerate(source):
        page[:] = data[number * PAGE : (number + 1) * PAGE]
    assert os.pwritev(disk, source, offset) == size
    os.fsync(disk)
    assert os.preadv(disk, target, offset) == size
    return b"".join(target) == data


if __name__ == "__main__":
    right = main(sys.argv[1], *map(int, sys.argv[2:]))
    print(json.dumps({"right": right}))
