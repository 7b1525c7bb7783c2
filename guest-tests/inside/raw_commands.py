"""The command queue under load, and with commands that do not exist."""

from collections.abc import Callable

from board import Board, Json
from pool import HUGE, PAGE

from viommu.driver.errors import CommandQueueError
from viommu.driver.queues import Completion
from viommu.layouts.commands import Command, Opcode, SyncCommand, TlbiCommand

DATA_SIZE = HUGE
NO_COMMAND = 0xEE
NO_SIGNAL = 3 << 12
"""CMD_SYNC.CS with its reserved value."""


def many(board: Board, completion: Completion) -> dict[str, Json]:
    """Far more commands than the queue holds."""
    driver = board.fresh(completion=completion)
    domain = driver.create_domain()
    driver.attach(board.engines[0].stream_id, domain)
    entries = driver.commands.ring.entries
    command = TlbiCommand(opcode=Opcode.CMD_TLBI_NH_VA, asid=domain.asid)
    for _ in range(3):
        for page in range(entries + 1):
            command.address = page * PAGE
            driver.commands.issue(command)
        driver.commands.sync()
    driver.commands.issue(*[command] * (3 * entries + 1))
    driver.commands.sync()
    return {"works": board.copy_works(domain), "events": board.events()}


def illegal(board: Board, completion: Completion) -> dict[str, Json]:
    """A command that does not exist, and a CMD_SYNC with a signal that does not; the queue goes on after each."""
    driver = board.fresh(completion=completion)
    errors: list[Json] = []
    for command in (Command(NO_COMMAND), SyncCommand(Opcode.CMD_SYNC | NO_SIGNAL)):
        driver.commands.issue(command)
        try:
            driver.commands.sync()
        except CommandQueueError as error:
            errors.append({"code": error.code, "index": error.index, "entry": hex(error.entry)})
        driver.commands.sync()
    domain = driver.create_domain()
    driver.attach(board.engines[0].stream_id, domain)
    return {
        "errors": errors,
        "works": board.copy_works(domain),
        "events": board.events(),
        "global_errors": int(driver.global_errors()),
    }


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    f"{case.__name__}-{completion.value}": lambda board, case=case, completion=completion: case(  # type: ignore[misc]
        board, completion
    )
    for case in (many, illegal)
    for completion in Completion
}
