"""The caller's end of a control socket."""

import json
import os
import socket
from collections import deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from viommu.closing import Closing
from viommu.control.protocol import CallFailed, ControlLost, ErrorCode, Refused


class ControlClient(Closing):
    """A connection to the control socket at `path`. Raises `ControlLost` when nobody serves it."""

    def __init__(self, path: Path, *, timeout: float = 10.0) -> None:
        """`timeout`, in seconds, is how long an answer may take."""
        self._numbers = count(1)
        self._notifications: deque[dict[str, Any]] = deque()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            raise ControlLost(f"nobody serves {path}: {error.strerror or error}") from error
        self._lines = self._socket.makefile("rb")

    def call(self, method: str, /, **parameters: Any) -> Any:
        """Call a method; returns its result. Raises `Refused`, another `CallFailed`, or `ControlLost`."""
        number = next(self._numbers)
        request = {"jsonrpc": "2.0", "id": number, "method": method, "params": parameters}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._lost(error) from error
        while "method" in (answer := self._read()):
            self._notifications.append(answer)
        if "error" not in answer:
            return answer["result"]
        code, message, data = (answer["error"].get(key) for key in ("code", "message", "data"))
        if code == ErrorCode.REFUSED:
            raise Refused(message, **data or {})
        raise CallFailed(code, message, data)

    def notifications(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events that `events.subscribe` asked for, as they come, however long that takes.

        Each is `events.event` with the event, or `events.lost` with the `count` of those that came too fast. From here
        on an answer to a call may take any time too. Raises `ControlLost` when the server ends.
        """
        self._socket.settimeout(None)
        while True:
            message = self._notifications.popleft() if self._notifications else self._read()
            yield message["method"], message["params"]

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise self._lost(error) from error
        if not line.endswith(b"\n"):
            raise ControlLost("the server closed the control socket")
        message: dict[str, Any] = json.loads(line)
        return message

    def _lost(self, error: OSError) -> ControlLost:
        self.close()  # a late answer would be taken for that of the next call
        return ControlLost(f"the control socket fails: {error}")

    def close(self) -> None:
        """Disconnect. Idempotent."""
        self._lines.close()
        self._socket.close()
