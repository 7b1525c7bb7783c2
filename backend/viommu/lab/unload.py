"""Unloading the driver of served functions: the server says which may leave, QEMU's monitor unplugs them."""

import time

from qemu.qmp import ExecuteError

from viommu.control import ControlClient
from viommu.lab.errors import LabError
from viommu.lab.guest import Guest

_LOOK = 0.05  # seconds between two looks


class NotUnloaded(LabError):
    """A driver was marked for unload, and something holds it."""


def unload(control: ControlClient, guest: Guest, driver: str, timeout: float = 30.0) -> None:
    """Mark `driver` for unload, unplug its functions from `guest` when their references are gone, and see it go.

    A guest's own driver lets go of a function within 5 s. Raises `NotUnloaded` after `timeout` seconds, with what holds
    it, and when QEMU cannot unplug a function: the driver stays marked. Raises `viommu.control.Refused` when the
    server refuses.
    """
    deadline = time.monotonic() + timeout
    control.call("stack.unload", driver=driver)
    asked: set[str] = set()
    while driver in [row["driver"] for row in control.call("stack.drivers")]:
        rows = [row for row in control.call("stack.list") if row["driver"] == driver]
        for name in [row["device"] for row in rows if row["state"] == "UNPLUGGING"]:
            if name not in asked:
                _unplug(guest, name)
                asked.add(name)
        if time.monotonic() > deadline:
            held = [f"{row['device']} ({row['state']}: {_holders(row)})" for row in rows]
            raise NotUnloaded(f"{driver} is not unloaded after {timeout:g} s: {'; '.join(held)}")
        time.sleep(_LOOK)


def _unplug(guest: Guest, name: str) -> None:
    try:
        guest.qmp("device_del", id=name)
    except ExecuteError as error:
        raise NotUnloaded(f"QEMU cannot unplug {name!r}: {error}") from error


def _holders(row: dict[str, object]) -> str:
    references = row["references"]
    assert isinstance(references, dict)
    return f"{row['transactions']} in flight" + "".join(f", {each}" for each in references)
