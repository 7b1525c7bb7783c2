"""A DMA by VFIO that somebody outside holds up: where its pages are, and how it ends.

    python3 paused_dma.py PAGES

Prints a line of JSON when the DMA is started, and another one when it is over.
"""

import json
import os
import sys

from engine import RAND48, page_pattern
from linux_vfio import DESTINATION, PAGE, Session
from vfio import Memory

PIECE, SEED = 4096, 5


def frames(memory: Memory) -> list[int]:
    """The physical address of each of the kernel's pages, from /proc/self/pagemap."""
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    found = []
    for address in range(memory.address, memory.address + len(memory), PAGE):
        entry = int.from_bytes(os.pread(descriptor, 8, address // PAGE * 8), "little")
        found.append((entry & (1 << 55) - 1) * PAGE)
    os.close(descriptor)
    return found


def main(pages: int) -> None:
    session, memory = Session(), Memory(pages * PAGE)
    session.container.map(DESTINATION, memory)
    frame = session.frame()
    frame.start(RAND48, DESTINATION, len(memory), seed=SEED, rate=PIECE // 64)
    placed = {"iova": DESTINATION, "page": PAGE, "frames": frames(memory)}
    print(json.dumps(placed), flush=True)
    outcome = frame.wait(60)
    del frame
    landed = [
        memory.copy()[at : at + PIECE] == page_pattern(SEED, DESTINATION + at)
        for at in range(0, len(memory), PIECE)
    ]
    session.close()
    print(json.dumps({"status": outcome.status, "landed": landed}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
