"""What each action does at the points of a function, and what happens out of the blue; the guest is played here."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import smmu_rig as hw
from tests.client import CONFIG
from tests.faults_rig import shows
from tests.server_rig import BASE, ERROR, HALTED, RAND48, Function, Machine
from viommu.control import CallFailed, ControlLost
from viommu.endpoints.pattern import rand48
from viommu.faults.injector import FaultInjected
from viommu.faults.plan import Plan, PlanError
from viommu.lab.serving import Serving
from viommu.layouts.test_engine import EngineCommand, UserFrame

SIZE = 64
GOOD = rand48(3, BASE, BASE, SIZE)
NOTHING = bytes(SIZE)
SUM64 = EngineCommand.SUM64


@pytest.fixture
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="vs-", dir="/tmp") as path, Machine(Path(path)) as made:
        yield made


class Engine:
    """`engine0`, allowed to do DMA, and a plan of one rule."""

    def __init__(self, machine: Machine, at: str = "", do: Any = None, **when: Any) -> None:
        self.machine = machine
        self.client: Function = machine.connect("engine0", bus_master=True)
        if at:
            machine.server.faults.load(Plan.of({"at": at, "when": when, "do": do}))

    def fill(self) -> EngineCommand:
        self.client.fill(SIZE, seed=3)
        return self.go(RAND48)

    def sum(self) -> EngineCommand:
        self.client.prepare(begin=BASE, end_incl=BASE + SIZE - 1)
        return self.go(SUM64)

    def go(self, command: EngineCommand) -> EngineCommand:
        self.client.start(command=command)
        self.machine.run()
        return self.client.status()

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.machine.server.turn()

    @property
    def memory(self) -> bytes:
        return bytes(self.machine.ram[:SIZE])

    def memory_at(self, offset: int) -> bytes:
        return bytes(self.machine.ram[offset : offset + SIZE])


# DMA


@shows("dma-requested", "abort")
@pytest.mark.parametrize(
    "at", ["dma-requested", pytest.param("dma-translated", marks=shows("dma-translated", "abort"))]
)
def test_a_dma_that_is_aborted(machine: Machine, at: str) -> None:
    engine = Engine(machine, at, "abort", stream_id=0x10, write=True)
    assert (engine.fill(), engine.memory) == (ERROR, NOTHING)
    assert engine.client.field(UserFrame.udata2) == BASE


@shows("dma-requested", "replace")
def test_a_dma_that_asks_for_another_address(machine: Machine) -> None:
    engine = Engine(machine, "dma-requested", {"action": "replace", "add": 0x1000})
    assert engine.fill() == HALTED
    assert (engine.memory, engine.memory_at(0x1000)) == (NOTHING, GOOD)


@shows("dma-translated", "replace")
def test_a_dma_that_goes_to_another_address(machine: Machine) -> None:
    engine = Engine(machine, "dma-translated", {"action": "replace", "value": BASE + 0x2000})
    assert engine.fill() == HALTED
    assert (engine.memory, engine.memory_at(0x2000)) == (NOTHING, GOOD)


def test_an_address_outside_of_guest_ram_is_a_bus_error(machine: Machine) -> None:
    engine = Engine(machine, "dma-translated", {"action": "replace", "value": 0x1000})
    assert (engine.fill(), engine.memory) == (ERROR, NOTHING)


@shows("dma-requested", "hold")
def test_a_dma_that_begins_late(machine: Machine) -> None:
    engine = Engine(machine, "dma-requested", {"action": "hold", "turns": 5})
    engine.client.fill(SIZE, seed=3)
    engine.client.start()
    engine.turn(2)
    assert (machine.server.io.devices["engine0"].transactions, engine.memory) == (0, NOTHING)
    engine.turn(12)
    machine.run()
    assert (engine.client.status(), engine.memory) == (HALTED, GOOD)


@pytest.mark.parametrize(
    ("at", "before"),
    [
        pytest.param("dma-translated", NOTHING, marks=shows("dma-translated", "hold")),
        pytest.param("dma-completing", GOOD, marks=shows("dma-completing", "hold")),
    ],
)
def test_a_dma_that_stays_in_flight(machine: Machine, at: str, before: bytes) -> None:
    engine = Engine(machine, at, "hold")
    engine.client.fill(SIZE, seed=3)
    engine.client.start()
    engine.turn(10)
    assert machine.server.io.devices["engine0"].transactions == 1
    assert (engine.client.status(), engine.memory) == (RAND48, before)
    machine.server.faults.clear()
    engine.turn(10)
    assert (engine.client.status(), engine.memory) == (HALTED, GOOD)
    assert list(machine.server.io.devices) == ["engine0", "engine1"]


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        pytest.param("skip", NOTHING, marks=shows("dma-writing", "skip")),
        pytest.param("repeat", GOOD, marks=shows("dma-writing", "repeat")),
        pytest.param(
            {"action": "replace", "toggle": 0xFF},
            bytes([GOOD[0] ^ 0xFF]) + GOOD[1:],
            marks=shows("dma-writing", "replace"),
        ),
        pytest.param(
            {"action": "truncate", "size": 10},
            GOOD[:10] + NOTHING[10:],
            marks=shows("dma-writing", "truncate"),
        ),
    ],
)
def test_what_a_write_leaves(machine: Machine, do: Any, expected: bytes) -> None:
    engine = Engine(machine, "dma-writing", do)
    assert (engine.fill(), engine.memory) == (HALTED, expected)


def test_an_injection_shows_the_beginning_of_the_data(machine: Machine) -> None:
    engine = Engine(machine, "dma-writing", "skip")
    engine.fill()
    (injected,) = [event for event in machine.events if isinstance(event, FaultInjected)]
    assert injected.where.startswith("DmaWriting(stream_id=16, substream_id=None, ")
    assert injected.where.endswith(f", write=True, value={SIZE} bytes {GOOD[:16]!r})")


@shows("dma-writing", "defer")
def test_a_write_that_lands_when_it_is_over(machine: Machine) -> None:
    engine = Engine(machine, "dma-writing", "defer")
    assert (engine.fill(), engine.memory) == (HALTED, NOTHING)
    assert machine.server.io.devices["engine0"].transactions == 0
    machine.server.faults.clear()
    assert engine.memory == GOOD
    assert machine.kinds()[-1] != "DmaRefused"


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        pytest.param("skip", 0, marks=shows("dma-read", "skip")),
        pytest.param({"action": "replace", "toggle": 1}, 1, marks=shows("dma-read", "replace")),
        pytest.param({"action": "truncate", "size": 8}, 0x10, marks=shows("dma-read", "truncate")),
    ],
)
def test_what_a_read_gets(machine: Machine, do: Any, expected: int) -> None:
    words = SIZE // 8
    machine.ram[:SIZE] = (0x10.to_bytes(8, "little")) + bytes(8 * (words - 1))
    engine = Engine(machine, "dma-read", do)
    assert engine.sum() == HALTED
    healthy = 0x10
    assert engine.client.field(UserFrame.udata1) == (healthy ^ 1 if expected == 1 else expected)


@shows("bus-master-off", "skip")
def test_a_dma_with_bus_master_off(machine: Machine) -> None:
    engine = Engine(machine, "bus-master-off", "skip")
    engine.client.set_bus_master(False)
    assert (engine.fill(), engine.memory) == (HALTED, GOOD)
    machine.server.faults.clear()
    assert engine.fill() == ERROR


# Registers, config space, resets, interrupts


@shows("mmio-access", "skip")
def test_registers_of_all_ones(machine: Machine) -> None:
    smmu = machine.connect("smmu")
    healthy = smmu.get(hw.IDR0)
    machine.server.faults.load(
        Plan.of({"at": "mmio-access", "when": {"function": "smmu"}, "do": "skip"})
    )
    assert smmu.get(hw.IDR0) == 0xFFFF_FFFF != healthy
    smmu.put(hw.CR1, 0x3F)
    machine.server.faults.clear()
    assert smmu.get(hw.CR1) == 0


@shows("mmio-access", "replace")
def test_a_register_that_is_stuck(machine: Machine) -> None:
    smmu = machine.connect("smmu")
    stuck = {
        "at": "mmio-access",
        "when": {"register": "CR0ACK", "write": False},
        "do": {"action": "replace", "value": 0},
    }
    machine.server.faults.load(Plan.of(stuck))
    smmu.put(hw.CR0, hw.CMDQEN)
    assert (smmu.get(hw.CR0), smmu.get(hw.CR0ACK)) == (hw.CMDQEN, 0)


@shows("config-access", "skip")
@shows("config-access", "replace")
def test_config_space(machine: Machine) -> None:
    client = machine.connect("engine0")
    healthy = client.read(CONFIG, 0, 4)
    when = {"function": "engine0", "offset": 0}
    machine.server.faults.load(Plan.of({"at": "config-access", "when": when, "do": "skip"}))
    assert client.read(CONFIG, 0, 4) == b"\xff" * 4
    flip = {"action": "replace", "toggle": 1}
    machine.server.faults.load(Plan.of({"at": "config-access", "when": when, "do": flip}))
    assert client.read(CONFIG, 0, 4) == bytes([healthy[0] ^ 1]) + healthy[1:]
    write = {"at": "config-access", "when": {"offset": 4, "write": True}, "do": "skip"}
    machine.server.faults.load(Plan.of(write))
    client.set_bus_master(True)
    assert client.read(CONFIG, 4, 2) == bytes(2)


@shows("function-resetting", "skip")
def test_a_function_that_goes_on_after_its_reset(machine: Machine) -> None:
    engine = Engine(machine)
    rules = (
        {"at": "function-resetting", "do": "skip"},
        {"at": "bus-master-off", "do": "skip"},
        {"at": "dma-translated", "when": {"nth": 1}, "do": {"action": "hold", "turns": 20}},
    )
    machine.server.faults.load(Plan.of(*rules))
    engine.client.fill(SIZE, seed=3)
    engine.client.start()
    engine.turn(3)
    engine.client.reset()
    assert engine.memory == NOTHING
    engine.turn(30)
    assert engine.memory == GOOD


@pytest.mark.parametrize(
    ("do", "count"),
    [
        pytest.param("skip", 0, marks=shows("function-interrupts", "skip")),
        pytest.param(
            {"action": "repeat", "times": 3}, 4, marks=shows("function-interrupts", "repeat")
        ),
        pytest.param(
            {"action": "defer", "turns": 1}, 1, marks=shows("function-interrupts", "defer")
        ),
    ],
)
def test_interrupts_of_a_function(machine: Machine, do: Any, count: int) -> None:
    engine = Engine(machine, "function-interrupts", do)
    listener = os.eventfd(0)
    engine.client.set_eventfds(0, [listener])
    engine.client.fill(SIZE, seed=3, msiaddress=1)
    assert engine.go(RAND48) == HALTED
    engine.turn(2)
    os.eventfd_write(listener, 1)  # so that there is something to read
    assert os.eventfd_read(listener) == 1 + count
    os.close(listener)


def test_an_interrupt_that_is_due_when_the_function_was_pulled_out(machine: Machine) -> None:
    engine = Engine(machine, "function-interrupts", "defer")
    engine.client.fill(SIZE, seed=3, msiaddress=1)
    assert engine.go(RAND48) == HALTED
    call(machine, "stack.surprise_remove", device="engine0")
    call(machine, "faults.clear")
    engine.turn()
    assert list(machine.server.sockets) == ["smmu", "engine1"]


@pytest.mark.parametrize("at", ["dma-writing", "function-interrupts"])
def test_what_is_deferred_is_lost_with_its_guest(machine: Machine, at: str) -> None:
    engine = Engine(machine, at, "defer")
    engine.client.fill(SIZE, seed=3, msiaddress=1)
    assert engine.go(RAND48) == HALTED
    engine.client.close()
    machine.run()
    machine.ram[:SIZE] = NOTHING
    listener = os.eventfd(0, os.EFD_NONBLOCK)
    machine.connect("engine0", bus_master=True).set_eventfds(0, [listener])
    call(machine, "faults.clear")
    assert engine.memory == NOTHING
    with pytest.raises(BlockingIOError):
        os.eventfd_read(listener)
    os.close(listener)


# Out of the blue


def call(machine: Machine, method: str, **parameters: Any) -> Any:
    return machine.server.methods.call(method, parameters)


def test_a_dma_that_nobody_asked_for(machine: Machine) -> None:
    Engine(machine)
    assert call(machine, "function.dma", function="engine0", iova=BASE, size=16, byte=7) == {
        "moved": 16,
        "data": "07" * 16,
    }
    assert machine.ram[:17] == b"\x07" * 16 + b"\0"
    read = call(machine, "function.dma", function="engine0", iova=BASE, size=2, write=False)
    assert read["data"] == "0707"
    refused = call(machine, "function.dma", function="engine0", iova=0x10)
    assert (refused["moved"], "bus error" in refused["why"]) == (0, True)


def test_an_effect_happens_in_the_middle_of_what_the_guest_does(machine: Machine) -> None:
    smmu = machine.connect("smmu")
    Engine(machine)
    effect = {
        "on": {"event": "RegisterAccess", "name": "GBPA", "write": True},
        "call": "function.dma",
        "arguments": {"function": "engine0", "iova": BASE},
    }
    machine.server.faults.load(Plan.of(effects=[effect]))
    smmu.put(hw.GBPA, 1 << 31 | 1 << 20)  # aborts from here on, and is seen before it does
    assert machine.ram[0] == 0xDB
    assert call(machine, "function.dma", function="engine0", iova=BASE + 8)["moved"] == 0


def test_what_an_effect_does_later_causes_no_effects(machine: Machine) -> None:
    effect = {
        "on": {"event": "DeviceAttached"},
        "call": "stack.attach",
        "arguments": {"filter": "tracing", "target": "engine0"},
    }
    machine.server.faults.load(Plan.of(effects=[effect]))
    call(machine, "stack.attach", filter="tracing", target="engine1")
    for _ in range(5):
        machine.server.turn()
    assert machine.kinds().count("DeviceAttached") == 2


def test_errors_records_and_service_failure(machine: Machine) -> None:
    smmu = machine.connect("smmu")
    call(machine, "smmu.raise_error", error="EVENTQ_ABT_ERR")
    assert smmu.get(hw.GERROR) == 1 << 2
    call(machine, "smmu.reset")
    smmu.put(hw.EVENTQ_BASE, BASE + 0x1_0000 | 3, 8)
    smmu.put(hw.CR0, hw.EVENTQEN)
    call(machine, "smmu.record", event="F_UUT", stream_id=9, times=3)
    assert smmu.get(hw.EVENTQ_PROD) == 3
    assert machine.word(BASE + 0x1_0000) == 9 << 32 | 1
    call(machine, "smmu.service_failure")
    assert smmu.get(hw.GERROR) == 1 << 8
    with pytest.raises(CallFailed, match="there is no 'F_NONE', but F_UUT"):
        call(machine, "smmu.record", event="F_NONE")


def test_a_function_is_reset_without_the_guest(machine: Machine) -> None:
    engine = Engine(machine, "dma-translated", "hold")
    engine.client.fill(SIZE, seed=3)
    engine.client.start()
    engine.turn(5)
    assert (engine.client.status(), machine.server.io.devices["engine0"].transactions) == (
        RAND48,
        1,
    )
    call(machine, "function.reset", function="engine0")
    assert (engine.client.status(), machine.server.io.devices["engine0"].transactions) == (
        HALTED,
        0,
    )
    machine.server.faults.clear()
    engine.turn(5)
    assert engine.memory == NOTHING


@pytest.mark.parametrize("event", ["Translated", "DmaMoved"])
def test_a_function_is_reset_in_the_middle_of_its_step(machine: Machine, event: str) -> None:
    engine = Engine(machine)
    effect = {
        "on": {"event": event},
        "when": {"nth": 2},
        "call": "function.reset",
        "arguments": {"function": "engine0"},
    }
    machine.server.faults.load(Plan.of(effects=[effect]))
    engine.client.fill(1 << 20)
    assert engine.go(RAND48) == HALTED
    assert machine.server.io.devices["engine0"].transactions == 0
    assert "FunctionFailed" not in machine.kinds()
    assert machine.kinds().count("DmaMoved") <= 2
    assert engine.fill() == HALTED
    assert engine.memory == GOOD


def test_page_requests_that_nobody_needs(machine: Machine) -> None:
    smmu = machine.connect("smmu")
    Engine(machine)
    smmu.put(0xC0, BASE + 0x1_0000 | 2, 8)  # PRIQ_BASE: 4 entries
    smmu.put(hw.CR0, hw.SMMUEN | 1 << 1)
    call(machine, "function.page_request", function="engine0", address=0x1234_5678, times=3)
    assert smmu.get(0x1_00C8) == 3
    assert machine.word(BASE + 0x1_0008) & ~0xFFF == 0x1234_5000
    call(machine, "function.page_request", function="engine0", address=0, times=2)
    assert smmu.get(0x1_00C8) == 1 << 31 | 1 << 2, "full, and overflowed"


def test_a_server_that_stalls(machine: Machine) -> None:
    before = time.monotonic()
    call(machine, "server.stall", ms=50)
    assert time.monotonic() - before >= 0.05


def test_a_server_that_dies() -> None:
    with Serving("aarch64-virt") as serving:
        with pytest.raises(ControlLost):
            serving.control.call("server.die")
        deadline = time.monotonic() + 5
        while serving.exit_code is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert serving.exit_code == -signal.SIGKILL


def test_a_function_dies_alone(machine: Machine) -> None:
    engine = Engine(machine)
    machine.connect("engine1")
    machine.server.faults.load(
        Plan.of(
            effects=[
                {
                    "when": {"after": 0.01},
                    "call": "server.hang_up",
                    "arguments": {"function": "engine0"},
                }
            ]
        )
    )
    for _ in range(100):
        machine.server.turn(5)
        if "ClientDetached" in machine.kinds():
            break
    gone = [event.function for event in machine.events if event.kind == "ClientDetached"]  # type: ignore[attr-defined]
    assert gone == ["engine0"]
    assert engine.client is not None


def test_a_plan_that_calls_what_is_not_there(machine: Machine) -> None:
    with pytest.raises(PlanError, match=r"line 1: call: there is no method 'smmu\.explode'"):
        machine.server.faults.load(Plan.of(effects=[{"call": "smmu.explode"}]))
    with pytest.raises(PlanError, match="there is no parameter 'depth'"):
        machine.server.faults.load(
            Plan.of(effects=[{"call": "smmu.reset", "arguments": {"depth": 1}}])
        )


def test_a_plan_is_listed_with_what_it_did(machine: Machine) -> None:
    engine = Engine(machine, "dma-writing", "skip")
    engine.fill()
    engine.fill()
    (row,) = call(machine, "faults.list")
    assert row == {"line": 1, "name": "", "at": "dma-writing", "does": "skip", "count": 2}
    stacks = call(machine, "stack.list")
    assert [each["driver"] for each in stacks] == ["test-engine", "fault-injector"] * 2
    call(machine, "faults.clear")
    assert call(machine, "faults.list") == []
    assert [each["driver"] for each in call(machine, "stack.list")] == ["test-engine"] * 2
    assert (engine.fill(), engine.memory) == (HALTED, GOOD)
