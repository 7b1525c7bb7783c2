"""Statuses of the calls that have the semantics of Windows' driver interfaces: NTSTATUS values."""

from enum import IntEnum

_SEVERITY_WARNING = 0x8000_0000


class NtStatus(IntEnum):
    """NTSTATUS, with the values of Windows. What each means here stands with the calls that return it."""

    SUCCESS = 0x0000_0000
    PENDING = 0x0000_0103
    DEVICE_BUSY = 0x8000_0011
    INVALID_PARAMETER = 0xC000_000D
    NO_SUCH_DEVICE = 0xC000_000E
    INVALID_DEVICE_REQUEST = 0xC000_0010
    OBJECT_NAME_INVALID = 0xC000_0033
    OBJECT_NAME_NOT_FOUND = 0xC000_0034
    OBJECT_NAME_COLLISION = 0xC000_0035
    DELETE_PENDING = 0xC000_0056

    @property
    def success(self) -> bool:
        """NT_SUCCESS: neither a warning nor an error."""
        return self < _SEVERITY_WARNING

    def __str__(self) -> str:
        return f"STATUS_{self.name}"
