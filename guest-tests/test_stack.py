"""Device stacks as a guest sees them: filters while its DMA runs, unload with references held, surprise removal."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
UNIT = 128
ALL = PAGES * 4096 // UNIT
"""The transactions of a DMA that fills them."""
FUNCTION = "0000:01:00.0"
HELD = "a test (held)"


@pytest.fixture
def boot(assets: Assets, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Boots a guest whose `engine1` can be unplugged. It is the only engine if it is `alone`."""
    with ExitStack() as rigs:

        def make(*, alone: bool, linux_driver: bool = False) -> Rig:
            text = (machine_directory() / "aarch64-virt.toml").read_text("utf-8")
            smmu, engine0, engine1 = text.split("[[devices]]")[1:]
            devices = [smmu, *([] if alone else [engine0]), f"{engine1}bus = 1\n"]
            path = tmp_path / "pluggable.toml"
            path.write_text("[[devices]]".join([text.partition("[[devices]]")[0], *devices]))
            rig = Rig(path, assets=assets, trace=True, scripts=INSIDE, linux_driver=linux_driver)
            return rigs.enter_context(rig)

        yield make


def start(guest: Guest, address: str, transactions: int) -> None:
    """Let a long DMA run in the guest's background."""
    guest.check(
        "PYTHONPATH=/viommu python3 /viommu/inside/long_dma.py "
        f"{address} {transactions} > /run/long 2>&1 &"
    )
    said = guest.check("until [ -s /run/long ]; do sleep 0.1; done; cat /run/long")
    assert said == "started\n"


def end(guest: Guest) -> dict[str, Any]:
    """What the guest says of it when it is over."""
    waiting = "until grep -q -e '^{' -e Error /run/long; do sleep 0.1; done; cat /run/long"
    said = guest.check(waiting, timeout=90)
    assert "Error" not in said, said
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
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
    assert {(event["outcome"], event["size"]) for event in traced} == {("MOVED", UNIT)}
    assert kinds.count("DeviceDeleted") == 1


def test_an_unload_waits_for_references_and_unplugs(boot: Callable[..., Rig]) -> None:
    rig = boot(alone=True)
    control, guest = rig.serving.control, rig.guest
    socket = rig.serving.sockets["engine1"]
    with rig.serving.trace() as trace:
        start(guest, FUNCTION, ALL)
        control.call("stack.attach", filter="tracing", target="engine1", name="trace")
        control.call("stack.reference", device="engine1", holder="a test")
        with pytest.raises(NotUnloaded, match=r"after 0.5 s: engine1 \(UNLOAD_PENDING: ") as held:
            rig.unload("test-engine", timeout=0.5)
        assert held.match(r"in flight, trace, a test \(held\)\)")
        result = end(guest)
        assert (result["status"], result["late"]) == ("ERROR", False), "it takes no new ones"
        assert 0 < result["pages"] < PAGES
        assert guest.check(f"ls -d /sys/bus/pci/devices/{FUNCTION}")
        assert row(rig, "engine1")["references"] == {"trace": 1, HELD: 1}

        control.call("stack.detach", device="trace")
        assert row(rig, "engine1")["state"] == "UNLOAD_PENDING"
        control.call("stack.release", device="engine1", holder="a test")
        assert row(rig, "engine1")["state"] == "UNPLUGGING"
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


def test_surprise_removal_with_references_held(boot: Callable[..., Rig]) -> None:
    rig = boot(alone=False)
    control, guest = rig.serving.control, rig.guest
    with rig.serving.trace() as trace:
        start(guest, FUNCTION, ALL)
        control.call("stack.reference", device="engine1", holder="a test")
        pulled = control.call("stack.surprise_remove", device="engine1")
        assert pulled == {"status": "PENDING"}
        result = end(guest)
        assert (result["gone"], result["late"]) == (True, False)
        assert 0 < result["pages"] < PAGES
        assert row(rig, "engine1")["state"] == "SURPRISE_PENDING"
        assert row(rig, "engine1")["references"] == {HELD: 1}
        identity = guest.check(f"od -An -tx4 -N4 /sys/bus/pci/devices/{FUNCTION}/config")
        assert identity.split() == ["ffffffff"], "nobody answers"
        control.call("stack.release", device="engine1", holder="a test")
        assert [each["device"] for each in control.call("stack.list")] == ["engine0"]
        # QEMU has the rest of it; the guest lets go of that as ever.
        guest.qmp("device_del", id="engine1")
        guest.check(f"while [ -e /sys/bus/pci/devices/{FUNCTION} ]; do sleep 0.1; done")
        events = trace.read()
    kinds = [event["kind"] for event in events]
    after = kinds[kinds.index("ClientDetached") :]
    assert "DmaMoved" not in after
    assert after.count("DeviceDeleted") == 1
    assert rig.serving.output() == ""
    with pytest.raises(NotUnloaded, match=r"cannot unplug 'engine0': .*does not support hotplug"):
        rig.unload("test-engine")


def test_the_stock_driver_detaches_what_is_unloaded(boot: Callable[..., Rig]) -> None:
    rig = boot(alone=True, linux_driver=True)
    group = rig.guest.check(f"readlink -f /sys/bus/pci/devices/{FUNCTION}/iommu_group").strip()
    with rig.serving.trace() as trace:
        trace.read()
        rig.unload("test-engine")
        events = trace.read()
    assert rig.guest.check(f"ls -d {group} || echo gone").endswith("gone\n")
    kinds = [event["kind"] for event in events]
    stopped, wanted, left = (
        kinds.index(kind) for kind in ("DeviceStopped", "UnplugWanted", "ClientDetached")
    )
    assert stopped < wanted < left
    commands = [event["text"] for event in events[wanted:] if event["kind"] == "CommandConsumed"]
    assert any("CMD_CFGI_STE" in text and "stream_id=0x100" in text for text in commands)
    assert rig.serving.output() == ""
