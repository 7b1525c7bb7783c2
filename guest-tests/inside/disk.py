"""Reads and writes a disk, past the page cache, and knows what must be there.

    python3 disk.py fill DISK MIB           # write it from the beginning, and flush
    python3 disk.py check DISK MIB          # is it there?
    python3 disk.py forget DISK MIB         # write zeros, and flush nothing
    python3 disk.py random DISK MIB COUNT   # 4 KiB blocks of the last MIB, written and read in any order
    python3 disk.py load DISK MIB FILE      # the same until FILE is gone, one round after the other
    python3 disk.py meet DISK ASK ANSWER    # by two FIFOs: `read SIZE` or `write SIZE`, to which something happens

Each prints one line of JSON; `meet` answers with one, each time, and never ends: Python takes long to start.
"""

import json
import mmap
import os
import sys
from contextlib import suppress
from random import Random
from typing import Any

MIB, PAGE = 1 << 20, 4096

Result = dict[str, Any]


def pattern(number: int, size: int) -> bytes:
    """What belongs into piece `number`."""
    return Random(number).randbytes(PAGE) * (size // PAGE)


class Disk:
    """Opened for direct access: each transfer is a command of its own, or several if it is large."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.size = os.lseek(self._descriptor, 0, os.SEEK_END)
        self._buffer = mmap.mmap(-1, MIB)  # direct access wants whole pages

    def write(self, offset: int, data: bytes) -> None:
        self._buffer[: len(data)] = data
        done = os.pwrite(self._descriptor, memoryview(self._buffer)[: len(data)], offset)
        assert done == len(data)

    def read(self, offset: int, size: int) -> bytes:
        self._buffer[:size] = bytes(size)  # what does not come is not there
        done = os.preadv(self._descriptor, [memoryview(self._buffer)[:size]], offset)
        assert done == size
        return self._buffer[:size]

    def flush(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def fill(disk: Disk, mib: str) -> Result:
    for number in range(int(mib)):
        disk.write(number * MIB, pattern(number, MIB))
    disk.flush()
    return {"written": int(mib)}


def check(disk: Disk, mib: str) -> Result:
    pieces = range(int(mib))
    wrong = [number for number in pieces if disk.read(number * MIB, MIB) != pattern(number, MIB)]
    return {"wrong": wrong}


def forget(disk: Disk, mib: str) -> Result:
    for number in range(int(mib)):
        disk.write(number * MIB, bytes(MIB))
    return {"written": int(mib)}


def random(disk: Disk, mib: str, count: str) -> Result:
    return one_round(disk, int(mib), int(count), Random(0))


def one_round(disk: Disk, mib: int, count: int, dice: Random) -> Result:
    start = disk.size - mib * MIB
    written: dict[int, int] = {}
    wrong = list[int]()
    for number in range(count):
        block = dice.randrange(mib * MIB // PAGE)
        disk.write(start + block * PAGE, pattern(number, PAGE))
        written[block] = number
        block = dice.choice(list(written))
        if disk.read(start + block * PAGE, PAGE) != pattern(written[block], PAGE):
            wrong.append(block)
    for block, number in written.items():
        if disk.read(start + block * PAGE, PAGE) != pattern(number, PAGE):
            wrong.append(block)
    return {"wrong": wrong}


def load(disk: Disk, mib: str, flag: str) -> Result:
    rounds, wrong = 0, list[int]()
    dice = Random(1)
    while os.path.exists(flag):  # noqa: PTH110 - pathlib is slow to import
        result = one_round(disk, int(mib), 16, dice)
        wrong += result["wrong"]
        rounds += 1
    disk.flush()
    return {"rounds": rounds, "wrong": wrong}


def meet(disk: Disk, direction: str, size: str) -> Result:
    """Tells what came of it, and whether it was right when it was done again.

    A read comes after a write of the same size: what happens is to the second command.
    """
    data = pattern(0, int(size))
    met = Result(done=False, right=False, again=False)
    with suppress(OSError):
        disk.write(0, data)
        met["right"] = disk.read(0, len(data)) == data
        met["done"] = True
    if direction == "write":
        disk.write(0, data)
    met["again"] = disk.read(0, len(data)) == data
    return met


def meet_all(path: str, ask: str, answer: str) -> None:
    """Whenever one asks. In between, the disk is not open: others unbind it."""
    while True:
        with open(ask) as asked:  # noqa: PTH123 - pathlib is slow to import
            direction, size = asked.read().split()
        disk = Disk(path)
        met = meet(disk, direction, size)
        disk.close()
        with open(answer, "w") as answered:  # noqa: PTH123
            answered.write(f"{json.dumps(met)}\n")


if __name__ == "__main__":
    command, path, *rest = sys.argv[1:]
    if command == "meet":
        meet_all(path, *rest)
    commands: dict[str, Any] = {
        "fill": fill, "check": check, "forget": forget,
        "random": random, "load": load,
    }  # fmt: skip
    print(json.dumps(commands[command](Disk(path), *rest)))
