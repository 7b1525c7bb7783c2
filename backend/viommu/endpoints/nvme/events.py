"""What the trace has of an NVMe controller."""

from dataclasses import dataclass

from viommu.trace import Event


@dataclass(frozen=True, slots=True)
class NvmeStateChanged(Event):
    """The controller became `ready`, `disabled`, `shut down`, or `fatal` for a reason."""

    endpoint: str
    state: str
    why: str


@dataclass(frozen=True, slots=True)
class NvmeQueueCreated(Event):
    """A `submission` or `completion` queue begins at `address`, an IOVA; 0 is the identifier of the admin queues."""

    endpoint: str
    queue: str
    queue_id: int
    address: int
    entries: int


@dataclass(frozen=True, slots=True)
class NvmeCommandFetched(Event):
    """A command was fetched from submission queue `sq_id`; `data_pointer` is what describes its data, if it has any."""

    endpoint: str
    sq_id: int
    command_id: int
    opcode: str
    data_pointer: str


@dataclass(frozen=True, slots=True)
class NvmeCommandEnded(Event):
    """A command is over; its completion is on its way."""

    endpoint: str
    sq_id: int
    command_id: int
    status: str
