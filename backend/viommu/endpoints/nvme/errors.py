"""How a command ends that cannot be done."""

from viommu.layouts.nvme_commands import Status

RETRIABLE = frozenset(
    {
        Status.DATA_TRANSFER_ERROR,
        Status.INTERNAL_ERROR,
        Status.COMMAND_ABORT_REQUESTED,
        Status.COMMAND_ABORTED_SQ_DELETION,
    }
)
"""The status after which the same command may succeed: Do Not Retry is clear."""


class CommandFailed(Exception):
    """A command completes with `status`. `parameter` is the byte of the command that was wrong, if it is known."""

    def __init__(self, status: Status, parameter: int | None = None) -> None:
        super().__init__(status.name)
        self.status, self.parameter = status, parameter
