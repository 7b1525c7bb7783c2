"""Device stacks as a guest lives through them: filters while its DMA runs, unload with references held, surprise removal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from viommu.lab.assets import Assets
from viommu.lab.config import machine_directory
from viommu.lab.guest import Guest
from viommu.lab.rig import Rig
from viommu.lab.unload import NotUnloaded

INSIDE = Path(__file__).with_name("inside")
PAGES = 512
ALL = PAGES * 4096 // 64
"""The transactions of a DMA that fills them."""
FUNCTION = "0000:01:00.0"
HELD = "a test (held)"


@pytest.fixture
def pluggable(assets: Assets, tmp_path: Path) -> Iterator[Rig]:
    """A guest with the SMMU and one engine, which can be unplugged."""
    base = (machine_directory() / "aarch64-virt.toml").read_text("utf-8")
    smmu, _, engine = base.rpartition("[[devices]]")[0].rpartition("[[devices]]")
    path = tmp_path / "pluggable.toml"
    path.write_text(f"{smmu}[[devices]]{engine}bus = 1\n", "utf-8")
    with Rig(path, assets=assets, trace=True, scripts=INSIDE) as rig:
        yield rig


def start(guest: Guest, address: str, transactions: int) -> None:
    """Let a long DMA run in the guest's background."""
    guest.check(
        "PYTHONPATH=/viommu python3 /viommu/inside/long_dma.py "
        f"{address} {transactions} > /run/long 2>&1 &"
    )
    assert guest.check("until grep . /run/long; do sleep 0.1; done") == "started\n"


def end(guest: Guest) -> dict[str, Any]:
    """What the guest says of it when it is over."""
    waiting = "while pgrep -f long_dma > /dev/null; do sleep 0.1; done; tail -n 1 /run/long"
    found: dict[str, Any] = json.loads(guest.check(waiting, timeout=90))
    return found


def row(rig: Rig, device: str) -> dict[str, Any]:
    rows = {row["device"]: row for row in rig.serving.control.call("stack.list")}
    found: dict[str, Any] = rows[device]
    return found


def test_a_filter_comes_and_goes_while_dma_runs(rig: Rig) -> None:
    control, guest = rig.serving.control, rig.guest
    with rig.serving.trace() as trace:
        trace.read()
        start(guest, "0000:00:02.0", ALL)
        attached = control.call("stack.attach", filter="tracing", target="engine0", name="trace")
        assert (attached["attached_to"], attached["stack_size"]) == ("engine0", 2)
        guest.check("sleep 0.2")
        control.call("stack.detach", device="trace")
        result = end(guest)
        assert result == {
            "gone": False, "status": "HALTED", "returned": result["returned"],
            "first_page": True, "pages": PAGES, "late": False,
        }  # fmt: skip
        events = trace.read()
    kinds = [event["kind"] for event in events]
    first, last = kinds.index("DeviceAttached"), kinds.index("DeviceDetached")
    moved = [place for place, kind in enumerate(kinds) if kind == "DmaMoved"]
    traced = [event for event in events if event["kind"] == "TransactionTraced"]
    assert moved[0] < first < last < moved[-1], "all in the middle of the DMA"
    assert len(moved) == ALL
    assert abs(len(traced) - sum(first < place < last for place in moved)) <= 1
    assert len(traced) > 10
    assert {(event["outcome"], event["size"]) for event in traced} == {("MOVED", 64)}
    assert kinds.count("DeviceDeleted") == 1


def test_an_unload_waits_for_references_and_unplugs(pluggable: Rig) -> None:
    rig, control, guest = pluggable, pluggable.serving.control, pluggable.guest
    socket = rig.serving.sockets["engine0"]
    with rig.serving.trace() as trace:
        start(guest, FUNCTION, ALL)
        control.call("stack.attach", filter="tracing", target="engine0", name="trace")
        control.call("stack.reference", device="engine0", holder="a test")
        with pytest.raises(NotUnloaded, match=r"after 0.5 s: engine0 \(UNLOAD_PENDING: ") as held:
            rig.unload("test-engine", timeout=0.5)
        assert held.match(r"in flight, trace, a test \(held\)\)")
        result = end(guest)
        assert (result["status"], result["late"]) == ("ERROR", False), "it takes no new ones"
        assert 0 < result["pages"] < PAGES
        assert guest.check(f"ls -d /sys/bus/pci/devices/{FUNCTION}")
        assert row(rig, "engine0")["references"] == {"trace": 1, HELD: 1}

        control.call("stack.detach", device="trace")
        assert row(rig, "engine0")["state"] == "UNLOAD_PENDING"
        control.call("stack.release", device="engine0", holder="a test")
        assert row(rig, "engine0")["state"] == "UNPLUGGING"
        assert socket.exists()
        rig.unload("test-engine")
        assert guest.check(f"ls -d /sys/bus/pci/devices/{FUNCTION} || echo gone").endswith("gone\n")
        assert not socket.exists()
        assert control.call("stack.list") == []
        kinds = [event["kind"] for event in trace.read()]
    wanted = ["DriverUnloading", "UnplugWanted", "ClientDetached", "DeviceDeleted"]
    places = [kinds.index(kind) for kind in (*wanted[:3], "DriverUnloaded")]
    assert places == sorted(places)
    assert kinds.count("DeviceDeleted") == 2, "the filter and the engine, once each"
    assert rig.serving.output() == ""


def test_surprise_removal_with_references_held(pluggable: Rig) -> None:
    rig, control, guest = pluggable, pluggable.serving.control, pluggable.guest
    with rig.serving.trace() as trace:
        start(guest, FUNCTION, ALL)
        control.call("stack.reference", device="engine0", holder="a test")
        pulled = control.call("stack.surprise_remove", device="engine0")
        assert pulled == {"status": "STATUS_PENDING"}
        result = end(guest)
        assert (result["gone"], result["late"]) == (True, False)
        assert 0 < result["pages"] < PAGES
        assert row(rig, "engine0")["state"] == "SURPRISE_PENDING"
        assert row(rig, "engine0")["references"] == {HELD: 1}
        print(guest.check(f"od -An -tx1 -N64 /sys/bus/pci/devices/{FUNCTION}/config"))
        control.call("stack.release", device="engine0", holder="a test")
        assert control.call("stack.list") == []
        # QEMU has the rest of it; the guest lets go of that as ever.
        guest.qmp("device_del", id="engine0")
        guest.check(f"while [ -e /sys/bus/pci/devices/{FUNCTION} ]; do sleep 0.1; done")
        events = trace.read()
    kinds = [event["kind"] for event in events]
    after = kinds[kinds.index("ClientDetached") :]
    assert "DmaMoved" not in after
    assert after.count("DeviceDeleted") == 1
    assert rig.serving.output() == ""
