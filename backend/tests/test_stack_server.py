"""The stacks of a server: what its control socket's methods do to functions that clients have, while DMA runs."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.server_rig import ERROR, HALTED, RAND48, Function, Machine, names
from viommu.control import CallFailed, ErrorCode, Refused
from viommu.endpoints.pattern import rand48
from viommu.layouts.test_engine import UserFrame

SIZE = 0x10_0000
BASE = 0x4000_0000


class Stacks(Machine):
    """A machine whose engines write without an SMMU's help, and its methods."""

    def call(self, method: str, **parameters: Any) -> Any:
        return self.server.methods.call(f"stack.{method}", parameters)

    def row(self, device: str) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {row["device"]: row for row in self.call("list")}
        return rows[device]

    def refused(self, method: str, **parameters: Any) -> str:
        with pytest.raises(Refused) as raised:
            self.call(method, **parameters)
        status: str = raised.value.data["status"]
        return status

    def write(self, engine: Function, size: int = SIZE, rate: int = 64) -> None:
        engine.fill(size, rate=rate, seed=1)
        engine.start(command=RAND48)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.server.turn()


@pytest.fixture
def machine() -> Iterator[Stacks]:
    with tempfile.TemporaryDirectory(prefix="st-", dir="/tmp") as path, ExitStack() as stack:
        yield stack.enter_context(Stacks(Path(path)))


@pytest.fixture
def engine(machine: Stacks) -> Function:
    return machine.connect("engine0", bus_master=True)


def landed(machine: Stacks, size: int = SIZE) -> bool:
    return bytes(machine.ram[:size]) == rand48(1, BASE, BASE, size)


def test_each_endpoint_is_a_device_of_its_models_driver(machine: Stacks) -> None:
    rows = machine.call("list")
    assert [(row["device"], row["driver"], row["stack_size"]) for row in rows] == [
        ("engine0", "test-engine", 1),
        ("engine1", "test-engine", 1),
    ]
    assert machine.call("drivers") == [
        {"driver": "test-engine", "devices": ["engine0", "engine1"], "state": "LOADED"}
    ]


def test_a_filter_comes_and_goes_while_dma_runs(machine: Stacks, engine: Function) -> None:
    machine.write(engine)
    machine.steps(40)
    assert "TransactionTraced" not in machine.kinds()
    row = machine.call("attach", filter="tracing", target="engine0")
    assert (row["device"], row["attached_to"], row["stack_size"]) == ("tracing0", "engine0", 2)
    assert machine.row("engine0")["references"] == {"tracing0": 1}
    machine.steps(40)
    traced = names(machine.events, "TransactionTraced")
    assert 10 < len(traced) < 40
    status = machine.call("detach", device="tracing0")["status"]
    assert status in ("SUCCESS", "PENDING")
    machine.run()
    assert engine.status() == HALTED
    assert landed(machine)
    assert len(names(machine.events, "TransactionTraced")) - len(traced) <= 1
    assert machine.kinds().count("DeviceDeleted") == 1
    assert [row["device"] for row in machine.call("list")] == ["engine0", "engine1"]


def test_a_filter_that_corrupts(machine: Stacks, engine: Function) -> None:
    machine.call("attach", filter="corrupting", target="engine0", options={"mask": 1})
    machine.write(engine, 0x1000)
    machine.run()
    expected = bytearray(rand48(1, BASE, BASE, 0x1000))
    assert machine.ram[:0x1000] != expected
    expected[0] ^= 1
    assert machine.ram[:0x1000] == expected


def test_what_the_methods_refuse(machine: Stacks) -> None:
    attach = {"filter": "tracing", "target": "engine0", "name": "low"}
    machine.call("attach", **attach)
    machine.call("attach", **{**attach, "name": "high"})
    assert machine.refused("detach", device="low") == "DEVICE_BUSY"
    assert machine.refused("detach", device="engine0") == "INVALID_DEVICE_REQUEST"
    assert machine.refused("detach", device="none") == "OBJECT_NAME_NOT_FOUND"
    assert machine.refused("attach", **attach) == "OBJECT_NAME_COLLISION"
    nowhere = {"filter": "tracing", "target": "none"}
    assert machine.refused("attach", **nowhere) == "OBJECT_NAME_NOT_FOUND"
    assert machine.refused("unload", driver="none") == "OBJECT_NAME_NOT_FOUND"
    assert machine.refused("release", device="engine0") == "INVALID_PARAMETER"
    with pytest.raises(Refused, match="there is no filter 'odd', but tracing, corrupting"):
        machine.call("attach", filter="odd", target="engine0")
    with pytest.raises(CallFailed, match="every: input should be greater") as raised:
        machine.call("attach", filter="corrupting", target="engine0", options={"every": 0})
    assert raised.value.code == ErrorCode.INVALID_PARAMS
    assert sorted(row["device"] for row in machine.call("list")) == [
        "engine0",
        "engine1",
        "high",
        "low",
    ]


def test_an_unload_waits_for_references_then_for_the_unplug(
    machine: Stacks, engine: Function
) -> None:
    machine.call("attach", filter="tracing", target="engine0", name="trace")
    machine.call("reference", device="engine0", holder="test")
    machine.write(engine)
    machine.steps(41)
    assert machine.call("unload", driver="test-engine") == {"status": "PENDING"}
    machine.run()
    assert engine.status() == ERROR, "what comes after is refused"
    assert 0 < engine.field(UserFrame.count_of_transactions_returned) < 256
    held = {"trace": 1, "test (held)": 1}
    row = machine.row("engine0")
    assert (row["references"], row["state"]) == (held, "UNLOAD_PENDING")
    assert machine.refused("attach", filter="tracing", target="engine0") == "NO_SUCH_DEVICE"
    assert machine.refused("reference", device="engine0") == "NO_SUCH_DEVICE"
    assert "engine1" in [row["device"] for row in machine.call("list")], "it waits for both"

    machine.call("release", device="engine0", holder="test")
    machine.call("detach", device="trace")
    assert "DriverUnloading" in machine.kinds()
    assert names(machine.events, "UnplugWanted") == ["engine0"], "nobody has the other"
    assert [(row["device"], row["state"]) for row in machine.call("list")] == [
        ("engine0", "UNPLUGGING")
    ]
    assert engine.get(0) == ERROR, "the guest still sees it"
    engine.set_bus_master(True)
    machine.write(engine, 0x1000)
    machine.run()
    assert engine.status() == ERROR, "and its DMA stays off"

    engine.close()
    machine.steps(3)
    assert machine.kinds()[-2:] == ["DeviceDeleted", "DriverUnloaded"]
    assert list(machine.server.sockets) == ["smmu"]
    assert not list(machine.directory.glob("engine*"))
    assert machine.refused("unload", driver="test-engine") == "OBJECT_NAME_NOT_FOUND"


def test_one_device_leaves_and_the_driver_stays(machine: Stacks, engine: Function) -> None:
    other = machine.connect("engine1", bus_master=True)
    machine.call("reference", device="engine0")
    assert machine.call("remove", device="engine0") == {"status": "PENDING"}
    engine.close()
    machine.steps(3)
    assert machine.row("engine0")["state"] == "REMOVE_PENDING"
    machine.call("release", device="engine0")
    assert [row["device"] for row in machine.call("list")] == ["engine1"]
    machine.write(other)
    machine.run()
    assert other.status() == HALTED
    assert landed(machine)


@pytest.mark.parametrize("in_flight", [0, 1])
def test_surprise_removal(machine: Stacks, engine: Function, in_flight: int) -> None:
    other = machine.connect("engine1", bus_master=True)
    machine.call("reference", device="engine0")
    machine.write(engine)
    machine.steps(40 + in_flight)
    assert machine.row("engine0")["transactions"] == in_flight
    assert machine.call("surprise_remove", device="engine0") == {"status": "PENDING"}
    before = bytes(machine.ram)
    with pytest.raises(ConnectionError):
        engine.get(0)
    assert "engine0" not in machine.server.sockets
    machine.run()
    assert bytes(machine.ram) == before, "no byte lands any more"
    row = machine.row("engine0")
    assert (row["state"], row["transactions"]) == ("SURPRISE_PENDING", 0)
    assert machine.call("release", device="engine0") == {"status": "SUCCESS"}
    assert [row["device"] for row in machine.call("list")] == ["engine1"]
    assert machine.kinds().count("DeviceDeleted") == 1
    machine.write(other)
    machine.run()
    assert other.status() == HALTED


def test_a_guest_resets_a_function_in_the_middle_of_filtered_dma(
    machine: Stacks, engine: Function
) -> None:
    machine.call("attach", filter="tracing", target="engine0", name="trace")
    machine.write(engine)
    machine.steps(41)
    assert machine.row("trace")["transactions"] == 1
    engine.reset()
    assert (machine.row("trace")["transactions"], machine.row("engine0")["transactions"]) == (0, 0)
    traced = [event for event in machine.events if event.kind == "TransactionTraced"]
    assert traced[-1].as_dict()["outcome"] == "ENDED"


# The filters of a plan

SKIP = '[[fault]]\nat = "dma-writing"\nwhen = { stream_id = 0x10 }\ndo = "skip"\n'
ELSEWHERE = SKIP.replace("0x10", "0x77")


def fault(machine: Stacks, method: str, **parameters: Any) -> Any:
    return machine.server.methods.call(f"faults.{method}", parameters)


def test_a_plan_that_is_cleared_takes_no_other_filter_away(
    machine: Stacks, engine: Function
) -> None:
    fault(machine, "load", plan=ELSEWHERE)
    machine.call("attach", filter="tracing", target="engine0", name="trace")
    fault(machine, "clear")
    machine.write(engine, 0x1000)
    machine.run()
    assert "TransactionTraced" in machine.kinds()
    machine.call("detach", device="trace")
    assert [row["device"] for row in machine.call("list")] == ["engine0", "engine1"]


def test_the_next_plan_goes_by_the_filters_of_the_one_before(
    machine: Stacks, engine: Function
) -> None:
    fault(machine, "load", plan=ELSEWHERE)
    machine.call("attach", filter="tracing", target="engine0", name="trace")
    stacks = machine.call("list")
    (row,) = fault(machine, "load", plan=SKIP)
    assert machine.call("list") == stacks
    machine.write(engine, 0x1000)
    machine.run()
    assert "TransactionTraced" in machine.kinds()
    assert machine.ram[:0x1000] == bytes(0x1000)
    assert fault(machine, "list")[0]["count"] == row["count"] + 1
    fault(
        machine, "load", plan='[[fault]]\nat = "config-access"\nwhen = { nth = 9 }\ndo = "skip"\n'
    )
    assert machine.row("faults1.engine0")["state"] == "REMOVE_PENDING"


def test_a_plan_that_cannot_do_anything_is_refused(machine: Stacks) -> None:
    for engine in ("engine0", "engine1"):
        fault(machine, "load", plan=ELSEWHERE)
        machine.call("attach", filter="tracing", target=engine)
    rules = fault(machine, "list")
    assert machine.call("unload", driver="fault-injector") == {"status": "PENDING"}
    why = "no way to the DMA of engine0: DELETE_PENDING, engine1: DELETE_PENDING"
    with pytest.raises(Refused, match=why):
        fault(machine, "load", plan=SKIP)
    assert fault(machine, "list") == rules, "the plan before goes on"
