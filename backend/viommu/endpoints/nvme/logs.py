"""The log pages, and the events that software asked to hear of (NVM Express 1.4, 5.2 and 5.14)."""

from collections import deque
from enum import Enum

from viommu.endpoints.nvme.errors import CommandFailed
from viommu.layouts.nvme_commands import LogId, Status
from viommu.layouts.nvme_identify import ErrorEntry, FirmwareSlotLog, SmartLog, text

ERROR_ENTRIES = 64
EVENT_REQUESTS = 4
"""Async Event Requests that may be outstanding."""
FIRMWARE = "1.0"
TEMPERATURE = 300
"""Kelvin, always."""
_DATA_UNIT = 512 * 1000


NAMESPACE_ATTRIBUTE_NOTICES = 1 << 8
"""The events that OAES offers. There is never one, but a driver that wants them has a request waiting."""
VENDOR_SPECIFIC = 7
"""The type of asynchronous events that the specification leaves to us (5.2)."""


class AsyncEvent(Enum):
    """What software can hear of: the type of the event, its information, and the log page that tells more."""

    INVALID_DOORBELL_REGISTER = 0, 0, LogId.ERROR_INFORMATION
    INVALID_DOORBELL_VALUE = 0, 1, LogId.ERROR_INFORMATION
    TEMPERATURE_THRESHOLD = 1, 1, LogId.SMART


class Logs:
    """What the controller has counted and what went wrong; errors are remembered until a reset."""

    def __init__(self) -> None:
        self.bytes_read = self.bytes_written = 0
        self.reads = self.writes = self.media_errors = 0
        self._count = 0
        self._errors: deque[ErrorEntry] = deque(maxlen=ERROR_ENTRIES)

    def failed(
        self, sq_id: int, command_id: int, status: Status, parameter: int | None, namespace_id: int
    ) -> None:
        """A command completed with an error."""
        self._count += 1
        entry = ErrorEntry(
            error_count=self._count,
            sq_id=sq_id,
            command_id=command_id,
            status=status,
            parameter_location=0xFFFF if parameter is None else parameter,
            namespace_id=namespace_id,
        )
        self._errors.appendleft(entry)

    def page(self, log_id: int, critical_warning: int = 0) -> bytes:
        """A log page; raises `CommandFailed` for one that there is not."""
        match log_id:
            case LogId.ERROR_INFORMATION:
                entries = b"".join(each.to_bytes() for each in self._errors)
                return entries.ljust(ERROR_ENTRIES * ErrorEntry.size, b"\0")
            case LogId.SMART:
                return self._smart(critical_warning).to_bytes()
            case LogId.FIRMWARE_SLOT:
                return FirmwareSlotLog(
                    active_slot=1, revision_of_slot_1=text(FIRMWARE, 8)
                ).to_bytes()
            case LogId.CHANGED_NAMESPACES:
                return bytes(4096)  # none has changed: they cannot
            case _:
                raise CommandFailed(Status.INVALID_LOG_PAGE)

    def _smart(self, critical_warning: int) -> SmartLog:
        return SmartLog(
            critical_warning=critical_warning,
            composite_temperature=TEMPERATURE,
            available_spare=100,
            available_spare_threshold=10,
            data_units_read=-(-self.bytes_read // _DATA_UNIT),
            data_units_written=-(-self.bytes_written // _DATA_UNIT),
            host_reads=self.reads,
            host_writes=self.writes,
            power_cycles=1,
            media_errors=self.media_errors,
            error_log_entries=self._count,
        )


class AsyncEvents:
    """Requests that wait for an event, and events that wait for a request.

    After an event was told, further ones of its type wait until its log page was read.
    """

    def __init__(self) -> None:
        self.requests: deque[int] = deque()
        """Command Identifiers."""
        self._untold: list[AsyncEvent] = []
        self._masked: set[int] = set()
        # Log pages that have to be read first.

    def request(self, command_id: int) -> None:
        """Raises `CommandFailed` when there are too many."""
        if len(self.requests) >= EVENT_REQUESTS:
            raise CommandFailed(Status.ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED)
        self.requests.append(command_id)

    def happened(self, event: AsyncEvent) -> None:
        """Remember it, once."""
        if event not in self._untold:
            self._untold.append(event)

    def read(self, log_id: int) -> None:
        """The log page was read, and events that lead to it can be told again."""
        self._masked.discard(log_id)

    def nudge(self) -> tuple[int, int] | None:
        """A request that can be completed for no other reason than to be noticed, with its result."""
        if not self.requests:
            return None
        return self.requests.popleft(), VENDOR_SPECIFIC | LogId.ERROR_INFORMATION << 16

    def next(self) -> tuple[int, int] | None:
        """A request that can be completed, with its result."""
        for event in self._untold if self.requests else ():
            kind, information, log_id = event.value
            if log_id not in self._masked:
                self._masked.add(log_id)
                self._untold.remove(event)
                return self.requests.popleft(), kind | information << 8 | log_id << 16
        return None
