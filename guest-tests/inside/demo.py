"""The guest's part of the demonstration: plays one act for each line it reads, and answers with one line of JSON.

    python3 demo.py REQUESTS ANSWERS      (two FIFOs)

It keeps what one act has made for the next; the demonstration on the host shows and judges it.
"""

import json
import sys
from collections.abc import Callable

from board import DESTINATION, LARGEST, SOURCE, Board, Json
from engine import RAND48
from pool import PAGE, Scattered
from raw_flight import in_flight

from viommu.driver.domain import Domain
from viommu.driver.smmu import DetachMode

COPY_PAGES = 512
REFUSALS = (DetachMode.STE_ABORT, DetachMode.STE_INVALID, DetachMode.CD_INVALID, DetachMode.UNMAP)


class Demo:
    """The acts, in the order in which they are played."""

    def __init__(self) -> None:
        self._board = Board()
        self._board.prepare(LARGEST)
        self._stream_id = self._board.engines[0].stream_id
        self._domain: Domain

    def attach(self) -> dict[str, Json]:
        """Bring the SMMU up, make a domain and attach the first engine to it."""
        driver = self._board.fresh()
        self._domain = driver.create_domain()
        driver.attach(self._stream_id, self._domain)
        return {"stream_id": self._stream_id, "asid": self._domain.asid}

    def copy(self) -> dict[str, Json]:
        """Copy 2 MiB over scattered pages by DMA, and compare every byte."""
        board = self._board
        source = Scattered(board.source, COPY_PAGES, seed=3)
        destination = Scattered(board.destination, COPY_PAGES, seed=5)
        self._domain.map_pages(SOURCE, source.frames)
        self._domain.map_pages(DESTINATION, destination.frames)
        result = board.copy(source, destination, SOURCE, DESTINATION)
        pages: list[Json] = [
            {
                "from_iova": SOURCE + number * PAGE,
                "from_address": source.frames[number],
                "to_iova": DESTINATION + number * PAGE,
                "to_address": destination.frames[number],
                "sent": bytes(source.page(number)[:4]).hex(),
                "arrived": bytes(destination.page(number)[:4]).hex(),
            }
            for number in range(3)
        ]
        result["verified"] = board.right_pages(destination) * PAGE
        result["pages"] = pages
        result["events"] = board.events()
        self._domain.unmap_all()
        return result

    def detach(self) -> dict[str, Json]:
        """Detach the engine in the middle of a copy of 64 MiB, and count what lands afterwards."""
        result = in_flight(self._board, DetachMode.STE_ABORT)
        self._domain = self._board.driver.create_domain()
        return result

    def refuse(self) -> dict[str, Json]:
        """Try a DMA after each form of detach."""
        board = self._board
        answers: dict[str, Json] = {}
        page = Scattered(board.destination, 1, seed=5)
        for how in REFUSALS:
            self._domain.map_pages(DESTINATION, page.frames)
            board.driver.attach(self._stream_id, self._domain)
            works = board.dma(RAND48, DESTINATION, PAGE).status == "HALTED"
            board.driver.detach(self._stream_id, how)
            answers[how.value] = {"worked_before": works, **board.refused(RAND48, DESTINATION)}
            self._domain.unmap_all()
        board.driver.disable()
        return {"refusals": answers}


def main(requests: str, answers: str) -> None:
    demo = Demo()
    acts: dict[str, Callable[[], dict[str, Json]]] = {
        "attach": demo.attach,
        "copy": demo.copy,
        "detach": demo.detach,
        "refuse": demo.refuse,
    }
    while True:
        with open(requests) as file:  # noqa: PTH123 - pathlib is slow to import
            name = file.readline().strip()
        if name not in acts:
            return
        try:
            answer = acts[name]()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with open(answers, "w") as file:  # noqa: PTH123
            file.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
