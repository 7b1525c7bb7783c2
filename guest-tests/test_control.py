"""The control socket beside a stock guest: what it shows of the tables, and DMA that is held up from outside."""

import json
from typing import Any

from linux_rig import LinuxRig

PAGES = 3
STREAM = 0x10


def said(linux: LinuxRig, line: int) -> dict[str, Any]:
    """A line of what the DMA in the guest's background says, once it is there."""
    waiting = f"until [ $(grep -c -e '^{{' /run/paused) -ge {line} ] || grep -q Error /run/paused"
    output = linux.run(f"{waiting}; do sleep 0.1; done; cat /run/paused")
    assert "Error" not in output, output
    found: dict[str, Any] = json.loads(output.splitlines()[line - 1])
    return found


def test_dma_that_is_paused_can_be_looked_at(linux: LinuxRig) -> None:
    control = linux.rig.serving.control
    assert control.call("dma.pause")["paused"]
    linux.run(
        f"PYTHONPATH=/viommu python3 /viommu/inside/paused_dma.py {PAGES} > /run/paused 2>&1 &"
    )
    placed = said(linux, 1)
    iova, page = placed["iova"], placed["page"]

    # The SMMU's tables say of each IOVA what the kernel's own page tables say of the memory behind it.
    walks = [
        control.call("smmu.walk", stream_id=STREAM, iova=iova + number * page + 8, write=True)
        for number in range(PAGES)
    ]
    assert [walk["address"] - 8 for walk in walks] == placed["frames"]
    for walk in walks:
        assert (walk["enabled"], walk["state"], walk["fault"]) == (True, "translate", None)
        assert [each["kind"] for each in walk["descriptors"][:-1]] == ["table"] * 3
        leaf = walk["descriptors"][-1]
        assert (leaf["kind"], leaf["level"], leaf["stage"]) == ("page", 3, 1)
    unmapped = control.call("smmu.walk", stream_id=STREAM, iova=iova - page)
    assert (unmapped["address"], unmapped["fault"]) == (None, "F_TRANSLATION")
    ste = control.call("smmu.stream", stream_id=STREAM)
    assert ste["ste"]["fields"]["config"] == "S1_TRANSLATE"
    assert ste["cd"]["fields"]["ttb0"] == walks[0]["descriptors"][0]["address"] & -4096
    streams = control.call("smmu.streams", first=STREAM, limit=1)["streams"]
    assert (streams[0]["stream_id"], streams[0]["state"]) == (STREAM, "translate")
    domains = control.call("smmu.domains")["domains"]
    (own,) = [
        each for each in domains if {"stream_id": STREAM, "substream_id": None} in each["streams"]
    ]
    assert own["ttb0"] == ste["cd"]["fields"]["ttb0"]
    assert [queue["pending"] for queue in control.call("smmu.queues")] == [0, 0, 0]

    # Nothing moves until it is stepped.
    assert control.call("dma.in_flight") == {"transactions": [], "more": False}
    stepped = control.call("dma.step")
    assert stepped["stepped"] == ["engine0"]
    (flying,) = control.call("dma.in_flight", stream_id=STREAM)["transactions"]
    assert (flying["iova"], flying["size"], flying["direction"]) == (iova, 4096, "write")
    assert flying["address"] == placed["frames"][0]
    assert flying["seconds"] >= 0
    cached = control.call("smmu.tlb", address=iova)["entries"]
    assert [entry["address"] for entry in cached] == [placed["frames"][0]]
    assert cached[0]["asid"] == own["asid"]
    linux.run("true")  # the guest goes on, and is served
    assert control.call("dma.state")["functions"][0]["in_flight"] == 1
    control.call("dma.step", function="engine0")
    assert control.call("dma.in_flight")["transactions"] == []

    control.call("dma.resume")
    end = said(linux, 2)
    assert end["status"] == "HALTED"
    assert end["landed"]
    assert all(end["landed"])
    assert control.call("dma.state")["paused"] is False
    assert control.call("smmu.walk", stream_id=STREAM, iova=iova)["address"] is None
