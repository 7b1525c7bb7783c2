"""Host domains under a guest that knows nothing of them, while its own driver works."""

import json
import time
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from conftest import INSIDE

from viommu.lab.assets import Assets
from viommu.lab.rig import Rig
from viommu.trace_file import TraceReader

STREAM = 0x10
PAGE = 4096

Event = dict[str, Any]


class Watch:
    """Reads along what becomes of the DMA of the first engine."""

    def __init__(self, trace: TraceReader) -> None:
        self._trace = trace

    def forget(self) -> None:
        """What has happened until now does not count."""
        self._trace.read()

    def until(self, holds: Callable[[list[Event]], bool]) -> list[Event]:
        """What happened since the last call, until `holds` of it."""
        seen: list[Event] = []
        deadline = time.monotonic() + 20
        while not holds(seen):
            assert time.monotonic() < deadline, seen[-20:]
            time.sleep(0.02)
            seen += [
                event
                for event in self._trace.read()
                if event["kind"] in ("DmaMoved", "DmaRefused") and event["stream_id"] == STREAM
            ]
        return seen


def moved(events: list[Event]) -> list[Event]:
    return [event for event in events if event["kind"] == "DmaMoved"]


def refused(events: list[Event]) -> list[Event]:
    return [event for event in events if event["kind"] == "DmaRefused"]


@pytest.mark.parametrize(("machine", "how"), [("x86_64-q35", "pool"), ("aarch64-virt", "vfio")])
def test_a_guest_is_watched_blocked_and_let_go(machine: str, how: str, assets: Assets) -> None:
    stock = how == "vfio"  # on aarch64 its own driver has its own SMMU in front
    with (
        Rig(machine, assets=assets, trace=True, linux_driver=stock, scripts=INSIDE) as rig,
        rig.serving.trace() as trace,
    ):
        guest, host, watch = rig.guest, rig.serving.control, Watch(trace)
        guest.python(f"/viommu/inside/host_rounds.py {how} > /tmp/rounds 2>&1 &")
        watch.until(lambda events: len(moved(events)) > 100)

        # Into a domain that maps everything, in the middle of its work: it does not notice.
        host.call("host.create", domain="all")
        host.call("host.map_identity", domain="all")
        watch.forget()
        host.call("host.attach", endpoint="engine0", domain="all")
        through = watch.until(lambda events: len(moved(events)) > 1000)
        assert refused(through) == []
        assert host.call("host.endpoints")[0]["state"] == "attached"

        # Blocked while it works: nothing lands from the moment of the answer.
        host.call("host.block", endpoint="engine0")
        watch.forget()
        blocked = watch.until(lambda events: len(refused(events)) > 5)
        assert moved(blocked) == []
        assert all(event["why"].startswith("host SMMU, ") for event in blocked)

        # A page of those that it writes to is left out.
        hole = through[-1]["first"] & -PAGE
        host.call("host.create", domain="part")
        host.call("host.map_identity", domain="part", leave_out=[[hole, PAGE]])
        host.call("host.attach", endpoint="engine0", domain="part")
        watch.forget()
        part = watch.until(lambda events: len(refused(events)) > 3)
        assert hole not in {event["first"] & -PAGE for event in moved(part)}
        faults = host.call("host.faults")
        assert {(each["fault"], each["address"]) for each in faults} == {("TRANSLATION", hole)}
        host.call("host.detach", endpoint="engine0", domain="part")

        host.call("host.unblock", endpoint="engine0")
        watch.forget()
        assert refused(watch.until(lambda events: len(moved(events)) > 1000)) == []
        guest.check("touch /tmp/end; until [ -s /tmp/rounds ]; do sleep 0.1; done")
        rounds = json.loads(guest.check("cat /tmp/rounds").splitlines()[-1])
        assert rig.serving.output() == ""
    # The guest says the same: it worked, met a wall, twice, and went on.
    statuses = [status for status, _ in groupby(rounds, lambda each: each[0])]
    assert statuses == ["HALTED", "ERROR", "HALTED"]
    errors = [changed for status, changed in rounds if status == "ERROR"]
    assert False in errors, "rounds in which nothing landed"
    assert all(changed for status, changed in rounds if status == "HALTED")
