"""A long DMA in small transactions, through the SMMU; and how it ends, also when the engine goes away meanwhile.

    python3 long_dma.py ADDRESS TRANSACTIONS

Prints `started`, and at the end a line of JSON. Only one at a time: it resets the SMMU.
"""

import json
import sys
from time import monotonic, sleep

from board import DESTINATION, Board
from engine import RAND48, page_pattern
from pool import HUGE, PAGE, Scattered

from viommu.layouts.test_engine import EngineCommand

RATE, SEED = 2, 9
ALL_ONES = 0xFFFF_FFFF


def main(address: str, transactions: int) -> None:
    board = Board()
    board.prepare(HUGE)
    driver = board.fresh()
    (engine,) = (each for each in board.engines if each.function.address == address)
    domain = driver.create_domain()
    driver.attach(engine.stream_id, domain)
    destination = Scattered(board.destination, HUGE // PAGE)
    domain.map_pages(DESTINATION, destination.frames)
    board.destination.fill(0)
    frame = engine.frame()
    frame.start(RAND48, DESTINATION, transactions * RATE * 64, seed=SEED, rate=RATE)
    print("started", flush=True)
    deadline = monotonic() + 60
    while frame.running and frame.returned != ALL_ONES and monotonic() < deadline:
        sleep(0.01)
    gone = frame.returned == ALL_ONES
    before = bytes(board.destination.view)
    sleep(0.3)
    first = destination.page(0)
    print(
        json.dumps(
            {
                "gone": gone,
                "status": "" if gone else EngineCommand(frame.status).name,
                "returned": frame.returned,
                "first_page": bytes(first) == page_pattern(SEED, DESTINATION),
                "pages": sum(any(page) for page in destination.pages()),
                "late": bytes(board.destination.view) != before,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
