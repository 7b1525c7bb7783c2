"""What both ends agree on: JSON-RPC 2.0, one message a line of UTF-8, parameters by name, no batches.

ControlError
├── ControlLost     there is no server, or it closed the connection
└── CallFailed      it answered with an error
    └── Refused     … that the method itself raised
"""

from enum import IntEnum
from typing import Any

LINE_LIMIT = 1 << 16
"""The longest request, bytes."""


class ErrorCode(IntEnum):
    """Error codes of JSON-RPC 2.0 (5.1); `REFUSED` is the one of a method that says no."""

    PARSE_ERROR = -32700
    INVALID_REQUEST = -32600
    METHOD_NOT_FOUND = -32601
    INVALID_PARAMS = -32602
    INTERNAL_ERROR = -32603
    REFUSED = -32000


class ControlError(Exception):
    """Root of what goes wrong on a control socket."""


class ControlLost(ControlError):
    """Nobody serves the socket (any more)."""


class CallFailed(ControlError):
    """The answer is an error: its code, a sentence, and what the method had to say."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data


class Refused(CallFailed):
    """Raised by a method that does not do what it was asked for. `data` are plain values for a program."""

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(ErrorCode.REFUSED, message, data or None)
