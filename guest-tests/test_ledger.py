"""The ledger over a stock driver, whose detaches are complete, and over one that leaves a command out."""

import json
from collections.abc import Callable

import pytest
from conftest import FAULTS
from linux_rig import Event, LinuxRig

from viommu.lab.rig import Rig
from viommu.ledger import Ledger, Severity, Verdict
from viommu.pytest_plugin.lab import Lab

STREAM = 0x10  # function 00:02.0
ENGINE = "0000:00:02.0"
DRIVER = "/sys/bus/pci/drivers/vfio-pci"


def verdict(events: list[Event]) -> Verdict:
    ledger = Ledger()
    for event in events:
        ledger.read(event)
    return ledger.verdict()


# The guest's own driver


@pytest.fixture(scope="module", params=["normal", "hostile"])
def caching(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def linux(profiled: Callable[..., LinuxRig], caching: str) -> LinuxRig:
    return profiled(f'caching = "{caching}"', ledger=True)


LEAVE_RUNNING = """
    python3 /viommu/inside/linux.py left > /run/left 2>&1 &
    left=$!
    for i in $(seq 100); do [ -s /run/started ] && break; sleep 0.1; done
    grep True /run/started
    rm /run/started
"""
# The kernel waits with the unbinding until who has the function open is gone.
UNBIND = f"""
    {LEAVE_RUNNING}
    echo {ENGINE} > {DRIVER}/unbind &
    sleep 0.2
    kill -9 $left
    wait
    echo {ENGINE} > {DRIVER}/bind
"""


DETACHES: dict[str, Callable[[LinuxRig], object]] = {
    "close": lambda linux: linux.cases("vfio close-in-flight"),
    "unmap": lambda linux: linux.cases("vfio unmap-in-flight"),
    "reopen": lambda linux: linux.cases("vfio reopen"),
    "flip": lambda linux: linux.cases("groups flip"),
    "remove": lambda linux: linux.cases("groups remove"),
    "unbind": lambda linux: linux.run(UNBIND),
}
"""What detaches the first engine while it does DMA; `reopen` between two DMAs."""


@pytest.mark.parametrize("name", DETACHES)
def test_a_stock_detach_is_clean(linux: LinuxRig, name: str) -> None:
    found = verdict(linux.events_of(lambda: DETACHES[name](linux)))
    assert found.violations == ()
    assert sum(stay.late for stay in found.stays) == 0
    detached = [stay for stay in found.stays if stay.changed is not None]
    assert all(stay.completed is not None for stay in detached)
    assert sum(stay.written for stay in detached if stay.stream_id == STREAM) > 0


def test_the_whole_run_is_clean(linux: LinuxRig) -> None:
    """From the boot on, whatever was done before."""
    path = linux.rig.serving.trace_path
    assert path is not None
    found = Ledger.of_file(path).verdict()
    assert found.violations == ()
    assert {stay.stream_id for stay in found.stays} == {STREAM, 0x18}


def test_a_shutdown_in_flight_is_clean(linux: LinuxRig) -> None:
    """The driver switches the SMMU off, and leaves everything attached."""
    linux.run(LEAVE_RUNNING)
    found = verdict(linux.events_of(linux.rig.reboot))
    assert found.violations == ()
    assert sum(stay.late for stay in found.stays) == 0


def test_a_disk_on_a_flush_queue_is_clean(viommu_lab: Lab) -> None:
    """Its pages are unmapped at once, and the TLB is flushed for many of them; no IOVA is used again before that."""
    rig = viommu_lab.rig(machine="aarch64-nvme", ledger=True, append="iommu.strict=0")
    group = "/sys/bus/pci/devices/0000:00:02.0/iommu_group/type"
    assert rig.guest.check(f"cat {group}").strip() == "DMA-FQ"
    with rig.serving.trace() as trace:
        trace.read()
        disk = "/viommu/inside/disk.py random /dev/nvme0n1 16 200"
        assert json.loads(rig.guest.python(disk, timeout=120)) == {"wrong": []}
        events = trace.read()
    commands = {event["opcode"] for event in events if event["kind"] == "CommandConsumed"}
    assert commands == {"CMD_TLBI_NH_ASID", "CMD_SYNC"}
    assert rig.serving.trace_path is not None
    found = Ledger.of_file(rig.serving.trace_path).verdict()
    assert found.findings == ()
    assert sum(stay.written for stay in found.stays) > 200 * 4096


# A driver that leaves a command out


@pytest.fixture
def raw(viommu_lab: Lab, machine_name: str) -> Rig:
    viommu_lab.allow(FAULTS)
    return viommu_lab.rig(machine=machine_name, raw=True, ledger=True)


OMITTED: dict[str, set[str | None]] = {
    "nothing": set(),
    "nothing-unmap": set(),
    "tlbi": {"CMD_TLBI_NH_VA"},
    "cfgi-ste": {"CMD_CFGI_STE"},
    "cfgi-cd": {"CMD_CFGI_CD"},
    "sync": {"CMD_SYNC"},
}


@pytest.mark.parametrize("name", OMITTED)
def test_what_is_left_out_is_named(raw: Rig, name: str) -> None:
    with raw.serving.trace() as trace:
        trace.read()
        output = raw.guest.python(f"/viommu/inside/raw.py omit {name}", timeout=120)
        events = trace.read()
    (result,) = (json.loads(line) for line in output.splitlines() if line.startswith('{"case"'))
    assert "error" not in result, result["error"]
    found = verdict(events)
    assert {finding.command for finding in found.violations} == OMITTED[name]
    worst = max((finding.severity for finding in found.findings), default=Severity.NOTE)
    assert worst == (Severity.VIOLATION if OMITTED[name] else Severity.NOTE)
    # What the ledger says has happened is what the guest has seen in its memory.
    landed = sum(stay.written for stay in found.stays) - 4096
    assert (landed == 4096) == result["landed"]
