"""What a guest's driver does that knows nothing of the host: DMA of one engine, round after round, until told to end.

    python3 host_rounds.py pool | vfio

`pool` has no SMMU in front of physical addresses, `vfio` maps memory by the kernel's own SMMU driver. It ends when
/tmp/end exists, with a line of JSON: of each round how the command ended, and whether memory is not as it was.
"""

import json
import os
import sys
from time import sleep

from engine import RAND48, Frame

SIZE = 2 << 20
RATE = 64
"""Transactions of 4 KiB: a round is met in the middle."""


def of_pool() -> tuple[Frame, int, memoryview]:
    import pci
    from engine import IDS, Engine
    from pool import Pool

    region = Pool(SIZE).take(SIZE)
    return Engine(pci.find(ids=IDS)[0]).frame(), region.bases[0], region.view


def of_vfio() -> tuple[Frame, int, memoryview]:
    from linux_vfio import DESTINATION, Session
    from vfio import Memory

    session, memory = Session(), Memory(SIZE)
    session.container.map(DESTINATION, memory)
    return session.frame(), DESTINATION, memory.view


def main(how: str) -> None:
    frame, begin, memory = {"pool": of_pool, "vfio": of_vfio}[how]()
    rounds: list[tuple[str, bool]] = []
    before = bytes(memory)
    while not os.access("/tmp/end", os.F_OK):
        frame.start(RAND48, begin, SIZE, seed=len(rounds) + 1, rate=RATE)
        status = frame.wait().status
        now = bytes(memory)
        rounds.append((status, now != before))
        before = now
        sleep(0.02)
    print(json.dumps(rounds))


if __name__ == "__main__":
    main(sys.argv[1])
