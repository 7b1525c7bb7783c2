"""A driver that leaves out a command where it detaches: what DMA does then. Whether that is seen, others judge."""

from collections.abc import Callable

from board import DESTINATION, Board, Json
from engine import RAND48, page_pattern
from pool import HUGE, PAGE, Scattered

from viommu.driver.smmu import DetachMode, SmmuDriver
from viommu.layouts.commands import Command

DATA_SIZE = HUGE


def without(driver: SmmuDriver, *omitted: str) -> None:
    """Let the driver issue no command of these names from now on."""
    commands = driver.commands
    issue, sync = commands.issue, commands.sync

    def issue_others(*wanted: Command) -> None:
        issue(*(command for command in wanted if command.opcode.name not in omitted))

    commands.issue = issue_others  # type: ignore[method-assign]
    commands.sync = (lambda: None) if "CMD_SYNC" in omitted else sync  # type: ignore[method-assign]


def detach(board: Board, how: DetachMode, *omitted: str) -> dict[str, Json]:
    """DMA, a detach without the commands, DMA again."""
    driver = board.fresh()
    domain = driver.create_domain()
    driver.attach(board.engines[0].stream_id, domain)
    pages = Scattered(board.destination, 1)
    domain.map_pages(DESTINATION, pages.frames)
    status: list[Json] = [board.dma(RAND48, DESTINATION, PAGE, seed=1).status]
    without(driver, *omitted)
    driver.detach(board.engines[0].stream_id, how)
    status.append(board.dma(RAND48, DESTINATION, PAGE, seed=2).status)
    landed = pages.page(0) == page_pattern(2, DESTINATION)
    driver.close()
    return {"status": status, "landed": landed}


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    "nothing": lambda board: detach(board, DetachMode.STE_ABORT),
    "nothing-unmap": lambda board: detach(board, DetachMode.UNMAP),
    "tlbi": lambda board: detach(board, DetachMode.UNMAP, "CMD_TLBI_NH_ASID", "CMD_TLBI_NH_VA"),
    "cfgi-ste": lambda board: detach(board, DetachMode.STE_ABORT, "CMD_CFGI_STE"),
    "cfgi-cd": lambda board: detach(board, DetachMode.CD_INVALID, "CMD_CFGI_CD"),
    "sync": lambda board: detach(board, DetachMode.STE_ABORT, "CMD_SYNC"),
}
