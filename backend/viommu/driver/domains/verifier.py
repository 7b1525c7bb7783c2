"""Checks what callers promise: no two of attach, detach and fault reporting at a time on one device.

It watches as a driver verifier does. The second call is refused and both are reported; the first one goes on, so that
the tables are what it alone makes of them.
"""

import sys
from collections.abc import Callable
from threading import Lock, current_thread

from viommu.driver.domains.device import DmaDevice
from viommu.driver.domains.events import Caller

_PACKAGE = __name__.rpartition(".")[0]


class Verifier:
    """Knows which call is under way on which device. `report` gets the device, the first caller and the second."""

    def __init__(self, report: Callable[[DmaDevice, Caller, Caller], None]) -> None:
        self._report = report
        self._lock = Lock()
        self._calls: dict[DmaDevice, Caller] = {}

    def enter(self, device: DmaDevice, call: str) -> bool:
        """Begin `call`; False, and a report, when another is under way."""
        caller = _caller(call)
        with self._lock:
            first = self._calls.setdefault(device, caller)
        if first is caller:
            return True
        self._report(device, first, caller)
        return False

    def leave(self, device: DmaDevice) -> None:
        """End the call that was begun."""
        with self._lock:
            del self._calls[device]


def _caller(call: str) -> Caller:
    """The nearest frame outside this package."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    code = frame.f_code
    place = f"{code.co_filename}:{frame.f_lineno} ({code.co_name})"
    return Caller(call, place, current_thread().name)
