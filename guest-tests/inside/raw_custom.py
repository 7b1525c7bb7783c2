"""The copy engine of examples/custom-device, driven by scripts alone."""

import struct
import zlib
from collections.abc import Callable
from time import monotonic, sleep

import pci
from board import DESTINATION, SOURCE, Board, Json
from pool import HUGE, PAGE, Scattered

DATA_SIZE = HUGE
IDS = (0x1234, 0x5305)
RING = 0x3000_0000
_TAIL, _HEAD, _STATUS = 2, 3, 4  # words


def copy(board: Board) -> dict[str, Json]:
    """A page, and once more when the destination is not mapped any more: status, result, and whether all is right."""
    (function,) = pci.find(ids=IDS)
    function.enable()
    function.write("reset", "1")
    function.set_bus_master(True)
    registers = function.map_bar()
    words = registers.cast("I")
    domain = board.fresh().create_domain()
    board.destination.fill(0)
    pages = Scattered(board.destination, 3)
    for number, iova in enumerate((RING, SOURCE, DESTINATION)):
        domain.map(iova, pages.frames[number], PAGE)
    board.driver.attach(function.stream_id, domain)
    ring, source, destination = (pages.page(number) for number in range(3))
    source[:] = board.random_page(0)
    registers.cast("Q")[0] = RING

    def run(number: int) -> list[Json]:
        struct.pack_into("<QQI", ring, 32 * number, SOURCE, DESTINATION, PAGE)
        words[_TAIL] = number + 1
        deadline = monotonic() + 5
        while words[_HEAD] <= number and not words[_STATUS] and monotonic() < deadline:
            sleep(0.001)
        crc, result = struct.unpack_from("<II", ring, 32 * number + 20)
        return [words[_STATUS], result, crc == zlib.crc32(source) and source == destination]

    mapped = run(0)
    domain.unmap(DESTINATION, PAGE)
    return {"mapped": mapped, "unmapped": run(1), "events": board.events()}


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {"copy": copy}
