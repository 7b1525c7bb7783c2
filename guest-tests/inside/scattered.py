"""Writes and reads a disk past the page cache, by one system call each, from and into pieces of memory in any order.

    python3 scattered.py DISK OFFSET PIECES SIZE SEED

Each of the pieces is in a page of its own, at a multiple of four bytes. Prints {"right": …}: whether it reads what it
has written, which is what `Random(SEED).randbytes(PIECES * SIZE)` gives.
"""

import json
import mmap
import os
import sys
from random import Random

PAGE = 4096


def pieces(count: int, size: int, seed: int) -> list[memoryview]:
    """Those that follow each other are no neighbours, but by chance."""
    buffer = mmap.mmap(-1, count * PAGE)
    buffer[:] = bytes(count * PAGE)  # or memory would be given in the order of its first use
    places = [PAGE * number + 4 * number % (PAGE - size + 4) for number in range(count)]
    Random(seed).shuffle(places)
    return [memoryview(buffer)[place : place + size] for place in places]


def main(path: str, offset: int, count: int, size: int, seed: int) -> bool:
    data = Random(seed).randbytes(count * size)
    disk = os.open(path, os.O_RDWR | os.O_DIRECT)
    source, target = pieces(count, size, seed), pieces(count, size, seed + 1)
    for number, piece in enumerate(source):
        piece[:] = data[number * size : (number + 1) * size]
    assert os.pwritev(disk, source, offset) == len(data)
    os.fsync(disk)
    assert os.preadv(disk, target, offset) == len(data)
    return b"".join(target) == data


if __name__ == "__main__":
    right = main(sys.argv[1], *map(int, sys.argv[2:]))
    print(json.dumps({"right": right}))
