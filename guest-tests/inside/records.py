"""Writes numbered files, each made to last before its number is told, and knows what must be in them.

    python3 records.py write DIR         # one number a line, until a write fails
    python3 records.py check DIR LAST    # those up to LAST that are not as they were

`check` prints a line of JSON.
"""

import json
import os
import sys
from itertools import count
from random import Random

Result = dict[str, object]


def content(number: int) -> bytes:
    """What belongs into file `number`: up to 64 KiB."""
    dice = Random(number)
    return dice.randbytes(dice.randint(1, 64 << 10))


def write(directory: str) -> None:
    folder = os.open(directory, os.O_RDONLY)
    for number in count(1):
        file = os.open(str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=folder)
        data = content(number)
        assert os.write(file, data) == len(data)
        os.fsync(file)
        os.close(file)
        os.fsync(folder)
        print(number, flush=True)


def check(directory: str, last: str) -> Result:
    numbers = range(1, int(last) + 1)
    wrong = [number for number in numbers if found(f"{directory}/{number}") != content(number)]
    return {"wrong": wrong}


def found(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib is slow to import
            return file.read()
    except OSError:
        return None


if __name__ == "__main__":
    command, directory, *rest = sys.argv[1:]
    if command == "write":
        write(directory)
    else:
        print(json.dumps(check(directory, *rest)))
