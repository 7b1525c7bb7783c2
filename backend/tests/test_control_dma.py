"""DMA that is paused, stepped and looked at, while clients are served."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest

from tests import smmu_rig as hw
from tests.server_rig import BASE, HALTED, RAND48, Function, Machine
from tests.test_server import order_of_steps
from viommu.control import ControlClient, Refused
from viommu.driver.domains import NtStatus
from viommu.layouts.test_engine import UserFrame
from viommu.smmu.ats_port import InvalidateRequest
from viommu.smmu.pri_queue import PageResponse

PAGE = 0x1000
COMMANDS = BASE + 0x10_0000
CFGI_ALL, SYNC = (0x04, 31), (0x46, 0)


class Held(Machine):
    """A machine that is told what to do over its control socket's methods."""

    def call(self, method: str, **parameters: Any) -> Any:
        return self.server.methods.call(method, parameters)

    def in_flight(self, **parameters: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.call("dma.in_flight", **parameters)["transactions"]
        return rows

    def stepped(self, steps: int = 1, **parameters: Any) -> list[str]:
        names: list[str] = self.call("dma.step", steps=steps, **parameters)["stepped"]
        return names


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cd-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def machine(directory: Path) -> Iterator[Held]:
    with ExitStack() as stack:
        yield stack.enter_context(Held(directory, control=directory / "control.sock"))


@pytest.fixture
def engine(machine: Held) -> Function:
    return machine.connect("engine0", bus_master=True)


def begin(engine: Function, pages: int = 3, at: int = BASE) -> None:
    """Let an engine fill pages, each by a transaction."""
    engine.fill(pages * PAGE, at=at, rate=PAGE // 64)
    engine.start(command=RAND48)


def test_nothing_moves_while_it_is_paused_and_clients_are_served(
    machine: Held, engine: Function
) -> None:
    assert machine.call("dma.pause")["paused"] is True
    begin(engine)
    for _ in range(100):
        machine.server.turn()
    assert engine.status() == RAND48, "it is running, and answers"
    assert "DmaMoved" not in machine.kinds()
    assert machine.call("dma.state") == {
        "paused": True,
        "functions": [
            {"function": "engine0", "stream_id": 0x10, "has_work": True, "in_flight": 0},
            {"function": "engine1", "stream_id": 0x18, "has_work": False, "in_flight": 0},
        ],
    }
    assert machine.call("dma.resume")["paused"] is False
    machine.run()
    assert engine.status() == HALTED


def test_a_pause_in_the_turn_in_which_it_was_somebodys_turn(
    machine: Held, engine: Function
) -> None:
    begin(engine)
    machine.server.turn()
    ready = machine.server.scheduler.ready()
    assert [function.name for function in ready] == ["engine0"]
    machine.call("dma.pause")
    before = [row["iova"] for row in machine.in_flight()]
    machine.server.scheduler.turn(ready)
    assert [row["iova"] for row in machine.in_flight()] == before


def test_what_is_in_flight_is_listed(machine: Held, engine: Function) -> None:
    machine.call("dma.pause")
    begin(engine)
    assert machine.in_flight() == []
    assert machine.stepped() == ["engine0"]
    (row,) = machine.in_flight()
    assert 0 <= row.pop("seconds") < 60
    assert row == {
        "function": "engine0",
        "stream_id": 0x10,
        "substream_id": None,
        "iova": BASE,
        "size": PAGE,
        "direction": "write",
        "address": BASE,
    }
    assert machine.in_flight(stream_id=0x10) != []
    assert machine.in_flight(stream_id=0x18) == []
    engine.fill(PAGE, frame=1, at=BASE + 8 * PAGE)
    engine.start(1)
    machine.stepped(2)
    assert len(machine.in_flight()) in (1, 2)
    assert machine.call("dma.in_flight", limit=1)["more"] is (len(machine.in_flight()) > 1)
    machine.call("dma.resume")
    machine.run()
    assert machine.in_flight() == []


def test_the_steps_of_one_transaction(machine: Held, engine: Function) -> None:
    machine.call("dma.pause")
    begin(engine, pages=1)
    machine.stepped()
    assert not any(machine.ram[:PAGE]), "it is translated, and in flight"
    assert machine.stepped(10) == ["engine0"], "no more than there is to do"
    assert any(machine.ram[:PAGE])
    assert engine.status() == HALTED
    assert machine.stepped(10) == []


def test_one_function_can_do_all_the_steps(machine: Held, engine: Function) -> None:
    other = machine.connect("engine1", bus_master=True)
    machine.call("dma.pause")
    begin(engine)
    begin(other, at=BASE + 8 * PAGE)
    assert set(machine.stepped(1000, function="engine1")) == {"engine1"}
    assert other.status() == HALTED
    assert engine.field(UserFrame.count_of_transactions_launched) == 0
    with pytest.raises(Refused, match="no endpoint 'smmu', but engine0, engine1"):
        machine.call("dma.step", function="smmu")


def test_a_step_is_for_dma_that_is_paused(machine: Held, engine: Function) -> None:
    with pytest.raises(Refused, match=r"DMA is not paused: call dma\.pause first"):
        machine.call("dma.step")
    begin(engine)
    machine.run()
    assert engine.status() == HALTED


def test_a_sync_that_waits_goes_on_waiting(machine: Held, engine: Function) -> None:
    smmu = machine.connect("smmu")
    smmu.put(hw.CMDQ_BASE, COMMANDS | 5, 8)
    smmu.put(hw.CR0, hw.CMDQEN)
    machine.call("dma.pause")
    begin(engine)
    machine.stepped()
    for place, (low, high) in enumerate((CFGI_ALL, SYNC)):
        at = COMMANDS - BASE + 16 * place
        machine.ram[at : at + 16] = low.to_bytes(8, "little") + high.to_bytes(8, "little")
    smmu.put(hw.CMDQ_PROD, 2)
    for _ in range(100):
        machine.server.turn()
    assert smmu.get(hw.CMDQ_CONS) == 1, "the SMMU goes on, as far as it can"
    command, *_ = machine.call("smmu.queues")
    assert (command["state"], command["pending"]) == ("waits for transactions", 1)
    assert command["entries"][0]["fields"] == {"opcode": "CMD_SYNC"}
    machine.stepped()
    assert smmu.get(hw.CMDQ_CONS) == 2, "what it waited for is over"
    assert engine.status() == RAND48


def stepped_order(directory: Path, seed: int) -> list[tuple[int, int]]:
    """As `order_of_steps`, but by steps, a few at a time."""
    counts = Random(seed + 1)
    with Held(directory, seed=seed) as machine:
        engines = [machine.connect(f"engine{n}", bus_master=True) for n in range(2)]
        machine.call("dma.pause")
        for engine in engines:
            for frame in range(8):
                engine.fill(256, frame=frame, at=BASE + frame * PAGE, rate=1)
        start = len(machine.events)
        for frame in range(8):
            for engine in engines:
                engine.start(frame)
        while machine.stepped(counts.randint(1, 20)):
            machine.server.turn()
        moved = [event for event in machine.events[start:] if event.kind == "DmaMoved"]
    return [(event.stream_id, event.iova) for event in moved]  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_steps_have_the_order_that_the_seed_gives(directory: Path, seed: int) -> None:
    assert stepped_order(directory, seed) == order_of_steps(directory, seed)


def test_a_host_domain_that_is_left_meanwhile_does_not_wait_forever(
    machine: Held, engine: Function
) -> None:
    host = machine.server.host
    assert host.create("d") is NtStatus.SUCCESS
    assert host.map_identity("d") is NtStatus.SUCCESS
    assert host.attach("engine0", "d") is NtStatus.SUCCESS
    machine.call("dma.pause")
    begin(engine, pages=1)
    machine.stepped()
    machine.call("host.detach", endpoint="engine0", domain="d")
    assert machine.in_flight() == [], "the host's driver lets it end"
    assert machine.call("dma.state")["paused"] is True


class Deaf:
    """A function that never answers an Invalidate Request."""

    def held(self) -> tuple[()]:
        return ()

    def invalidate(self, request: InvalidateRequest, complete: Callable[[], None]) -> None:
        pass

    def page_response(self, response: PageResponse) -> None:
        pass


def test_nobodys_patience_ends_meanwhile(directory: Path) -> None:
    with Held(directory, invalidation_timeout=0.0) as machine:
        smmu = machine.server.smmu
        assert smmu is not None
        smmu.connect(0x10, Deaf())
        machine.call("dma.pause")
        smmu.ats_port.invalidate(0x10, InvalidateRequest(None, 0, PAGE))
        for _ in range(10):
            machine.server.turn()
        assert len(smmu.ats_port) == 1
        machine.call("dma.resume")
        for _ in range(10):
            machine.server.turn()
        assert len(smmu.ats_port) == 0, "it was given up"


def test_the_functions_are_listed(machine: Held, engine: Function) -> None:
    smmu, first, second = machine.call("function.list")
    region = {"address": BASE, "size": 4 << 20, "accessible": True}
    assert first == {
        "function": "engine0",
        "stream_id": 0x10,
        "attached": True,
        "bus_master": True,
        "dead": False,
        "memory": [region],
    }
    assert smmu["stream_id"] is None
    assert (second["attached"], second["bus_master"], second["memory"]) == (False, False, [])
    engine.set_bus_master(False)
    assert machine.call("function.list")[1]["bus_master"] is False


def test_without_a_control_socket_nobody_keeps_time(directory: Path) -> None:
    with Held(directory) as machine:
        engine = machine.connect("engine0", bus_master=True)
        machine.call("dma.pause")
        begin(engine)
        machine.stepped()
        assert machine.in_flight()[0]["seconds"] is None


def test_over_the_socket(machine: Held, engine: Function) -> None:
    with ControlClient(machine.directory / "control.sock") as client:

        def told(method: str, **parameters: Any) -> Any:
            """What the server answers in its turns."""
            answers: list[Any] = []
            caller = Thread(target=lambda: answers.append(client.call(method, **parameters)))
            caller.start()
            while caller.is_alive():
                machine.server.turn(1)
            return answers.pop()

        assert told("events.subscribe", kinds=["DmaMoved"], streams=[0x10]) is None
        told("dma.pause")
        begin(engine, pages=2)
        assert told("dma.step", steps=3)["stepped"] == ["engine0"] * 3
        assert told("dma.state")["paused"] is True, "the event did not get in its way"
        name, event = next(client.notifications())
        assert (name, event["kind"], event["iova"]) == ("events.event", "DmaMoved", BASE)
