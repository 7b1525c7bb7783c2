"""The stock NVMe driver describes data by SGLs: as one block where the SMMU makes it one, else in segments.

On aarch64 a driver of another kernel can be taken: `--viommu-image aarch64-backports`.
"""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from nvme_rig import DISK, FUNCTION, MIB, PAGE, SGL_THRESHOLD, NvmeRig

from viommu.lab.assets import Assets
from viommu.pytest_plugin.lab import Lab

MACHINES = ("aarch64", "x86_64")
PIECES = 64
"""Pages that one command moves."""
OFFSET = 8 << 20
DEFAULT_THRESHOLD = 32768

Event = dict[str, Any]


@pytest.fixture(scope="module", params=MACHINES)
def booted(
    request: pytest.FixtureRequest,
    assets: Assets,
    tmp_path_factory: pytest.TempPathFactory,
    kernel: dict[str, Any],
) -> Iterator[NvmeRig]:
    directory, own = tmp_path_factory.mktemp("disk"), request.param == "aarch64"
    with NvmeRig(request.param, assets, directory, **kernel if own else {}) as nvme:
        yield nvme


@pytest.fixture
def nvme(booted: NvmeRig, viommu_lab: Lab) -> NvmeRig:
    viommu_lab.watch(booted.guest)
    return booted


def use_domain(nvme: NvmeRig, kind: str) -> None:
    """Give the disk's group another domain, where the guest's SMMU is in the way."""
    if nvme.machine == "aarch64":
        nvme.run(f"echo 0000:01:00.0 > {FUNCTION}/driver/unbind")
        nvme.run(f"echo {kind} > {FUNCTION}/iommu_group/type")
        nvme.run("echo 0000:01:00.0 > /sys/bus/pci/drivers/nvme/bind")
        nvme.await_disk()


def scattered(
    nvme: NvmeRig,
    threshold: int,
    seed: int,
    *,
    count: int = PIECES,
    size: int = PAGE,
    plan: str = "",
) -> list[Event]:
    """Write and read by pieces of memory in any order; check what comes back and what is on the disk.

    Returns the events.
    """
    nvme.run(f"echo {threshold} > {SGL_THRESHOLD}")
    control = nvme.rig.serving.control
    with nvme.rig.serving.trace() as trace:
        trace.skip()
        control.call("faults.load", plan=plan)
        arguments = f"{DISK} {OFFSET} {count} {size} {seed}"
        output = nvme.guest.python(f"/viommu/inside/scattered.py {arguments}", timeout=120)
        control.call("faults.clear")
        events = trace.read()
    assert json.loads(output) == {"right": True}
    with nvme.image.open("rb") as file:
        file.seek(OFFSET)
        assert file.read(count * size) == Random(seed).randbytes(count * size)
    return events


def pointers(events: list[Event]) -> list[str]:
    """What the commands were that moved data, and what described it."""
    fetched = [each for each in events if each["kind"] == "NvmeCommandFetched"]
    moving = [each for each in fetched if each["opcode"] in ("READ", "WRITE")]
    return [f"{each['opcode']} {each['data_pointer']}" for each in moving]


def segments(events: list[Event]) -> list[int]:
    """The sizes of what was read that can be neither a burst of commands nor data."""
    moved = [each for each in events if each["kind"] == "DmaMoved" and not each["write"]]
    return [each["size"] for each in moved if 8 * 64 < each["size"] < PAGE]


def test_pages_anywhere_are_in_a_segment(nvme: NvmeRig) -> None:
    """Those that are neighbours by chance are one block; a command has no more blocks than the driver has room for."""
    use_domain(nvme, "identity")
    events = scattered(nvme, PAGE, 1, count=MIB // PAGE)
    used = pointers(events)
    assert used == ["WRITE SGL"] * (len(used) // 2) + ["READ SGL"] * (len(used) // 2)
    lists = segments(events)
    assert 4 <= len(lists) <= len(used)
    assert all(size % 16 == 0 for size in lists)
    assert 2 * MIB // PAGE * 0.8 <= sum(lists) / 16 <= 2 * MIB // PAGE


def test_what_the_driver_chooses(nvme: NvmeRig) -> None:
    """Its default is SGLs for blocks of 32 KiB and more, and the SMMU makes one of all pages."""
    use_domain(nvme, "DMA")
    by_default = "SGL" if nvme.machine == "aarch64" else "PRP"
    events = scattered(nvme, DEFAULT_THRESHOLD, 2)
    assert set(pointers(events)) == {f"WRITE {by_default}", f"READ {by_default}"}
    if nvme.machine == "aarch64":
        assert segments(events) == []
    assert set(pointers(scattered(nvme, 0, 3))) == {"WRITE PRP", "READ PRP"}


def test_blocks_at_any_address(nvme: NvmeRig) -> None:
    """Older drivers (6.12) have a command with PRPs for each of them, newer ones (7.3) have SGLs of many."""
    use_domain(nvme, "identity")
    used = pointers(scattered(nvme, PAGE, 6, count=200, size=512))
    if "READ SGL" in used:
        assert set(used) == {"WRITE SGL", "READ SGL"}
        assert len(used) < 10
    else:
        assert used == ["WRITE PRP"] * 200 + ["READ PRP"] * 200


@pytest.mark.parametrize(("number", "opcode"), [(1, "WRITE"), (2, "READ")])
def test_the_fetch_of_a_segment_aborts(nvme: NvmeRig, number: int, opcode: str) -> None:
    """The driver does the command again."""
    use_domain(nvme, "identity")
    when = f"stream_id = 0x100, size = [513, 4095], write = false, nth = {number}, times = 1"
    plan = f"""
        [[fault]]
        at = "dma-requested"
        when = {{ {when} }}
        do = "abort"
    """
    events = scattered(nvme, PAGE, 3 + number, plan=plan)
    kinds = [event["kind"] for event in events]
    assert kinds.count("FaultInjected") == 1
    assert kinds.count("NvmeStateChanged") == 0
    assert pointers(events).count(f"{opcode} SGL") == 2
    assert len(pointers(events)) == 3
    ended = [event["status"] for event in events if event["kind"] == "NvmeCommandEnded"]
    assert ended.count("DATA_TRANSFER_ERROR") == 1
    assert set(ended) == {"SUCCESS", "DATA_TRANSFER_ERROR"}
