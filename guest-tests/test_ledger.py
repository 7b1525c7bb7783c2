"""The ledger over a stock driver, whose detaches are complete; and over one that leaves a command out, which it names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import INSIDE, Shared
from linux_rig import LinuxRig

from viommu.lab.assets import Assets
from viommu.lab.rig import Rig
from viommu.ledger import Ledger, Severity, Verdict

ENGINE = "0000:00:02.0"
DRIVER = "/sys/bus/pci/drivers/vfio-pci"


@pytest.fixture(scope="module")
def linux(kernel: dict[str, Any], assets: Assets) -> Iterator[LinuxRig]:
    rig = LinuxRig("aarch64-virt", assets, kernel, ledger=True)
    rig.start()
    yield rig
    rig.close()


def verdict(events: list[dict[str, Any]]) -> Verdict:
    ledger = Ledger()
    for event in events:
        ledger.read(event)
    return ledger.verdict()


WORK = {
    "close-in-flight": "vfio close-in-flight",
    "flip": "groups flip",
}


@pytest.mark.parametrize("name", WORK)
def test_x(linux: LinuxRig, name: str) -> None:
    results = []
    events = linux.events_of(lambda: results.extend(linux.cases(WORK[name])))
    from rich.console import Console
    v = verdict(events)
    v.print(Console(width=160))
    print(results)
    kinds = {}
    for e in events: kinds[e["kind"]] = kinds.get(e["kind"],0)+1
    print(kinds)
    assert 0
