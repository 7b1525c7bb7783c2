"""A model that is not ours on a real socket: it has everything of the house, and when it fails it fails alone."""

import logging
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import smmu_rig as hw
from tests.server_rig import BASE, FUNCTIONS, HALTED, RAM, Function, Machine, names
from viommu.driver.domains import NtStatus
from viommu.endpoints.base import ExtendedCapability
from viommu.endpoints.master import DmaMaster
from viommu.faults.plan import Plan
from viommu.function import Function as Served
from viommu.stack.endpoint import driver_name

EXAMPLE = Path(__file__).parents[2] / "examples/custom-device/copy_engine.py"
RING, TAIL, HEAD, STATUS = 0, 8, 12, 16
SIZE = 0x100
SOURCE, TARGET = BASE + 0x1000, BASE + 0x2000
INTX, MSIX = 0, 2
DONE, ABORTED = 1, 2


def spec(name: str, model: str, stream_id: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, model=model, stream_id=stream_id, options={})


COPY = spec("copy0", f"{EXAMPLE}:CopyEngine", 0x20)


@pytest.fixture
def make() -> Iterator[Callable[..., Machine]]:
    with ExitStack() as stack:
        path = stack.enter_context(tempfile.TemporaryDirectory(prefix="vs-", dir="/tmp"))
        yield lambda **options: stack.enter_context(
            Machine(Path(path), functions=[*FUNCTIONS, COPY], **options)
        )


@pytest.fixture
def machine(make: Callable[..., Machine]) -> Machine:
    return make()


def served(machine: Machine) -> Served:
    (found,) = [each for each in machine.server.scheduler.functions if each.name == "copy0"]
    return found


class Copy:
    """A driver of the example."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.client: Function = machine.connect("copy0", bus_master=True)
        self.tail = 0
        self.data = os.urandom(SIZE)
        machine.ram[SOURCE - BASE : SOURCE - BASE + SIZE] = self.data

    def start(self, target: int = TARGET, size: int = SIZE) -> None:
        self.client.put(RING, BASE, 8)
        place = 32 * self.tail
        self.tail += 1
        struct.pack_into("<QQI", self.machine.ram, place, SOURCE, target, size)
        self.client.put(TAIL, self.tail)

    def result(self) -> tuple[int, int]:
        crc, result = struct.unpack_from("<II", self.machine.ram, 20)
        return crc, result

    @property
    def copied(self) -> bool:
        place = TARGET - BASE
        return bytes(self.machine.ram[place : place + SIZE]) == self.data


def call(machine: Machine, method: str, **parameters: Any) -> Any:
    return machine.server.methods.call(method, parameters)


def test_it_works(machine: Machine) -> None:
    copy = Copy(machine)
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    copy.client.set_eventfds(INTX, [descriptor])
    copy.start()
    assert machine.run() > 3
    assert copy.result() == (zlib.crc32(copy.data), DONE)
    assert copy.copied
    assert os.eventfd_read(descriptor) == 1
    copy.start(target=BASE + RAM)
    machine.run()
    assert (copy.client.get(HEAD), copy.client.get(STATUS)) == (2, 0)
    assert struct.unpack_from("<I", machine.ram, 32 + 24) == (ABORTED,)
    os.close(descriptor)


def test_it_has_a_stack_and_a_driver(machine: Machine) -> None:
    rows = {row["device"]: row["driver"] for row in call(machine, "stack.list")}
    assert rows["copy0"] == "copy_engine.py:CopyEngine"
    assert call(machine, "stack.unload", driver="copy_engine.py:CopyEngine") == {
        "status": "SUCCESS"
    }
    assert "copy0" not in machine.server.sockets


def test_it_has_a_stack_whatever_its_file_is_called(tmp_path: Path) -> None:
    file = tmp_path / f"2nd {'long' * 40} copy.py"
    shutil.copy(EXAMPLE, file)
    copy = spec("copy0", f"{file}:CopyEngine", 0x20)
    with (
        tempfile.TemporaryDirectory(prefix="vs-", dir="/tmp") as path,
        Machine(Path(path), functions=[*FUNCTIONS, copy]) as machine,
    ):
        assert [row["device"] for row in call(machine, "stack.list")][-1] == "copy0"
        assert "copy0" in call(machine, "stack.drivers")[-1]["devices"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("test-engine", "test-engine"),
        ("/a/my_device.py:MyDevice", "my_device.py:MyDevice"),
        ("/a b/2nd gerät.py:Fill", "_2nd_ger_t.py:Fill"),
    ],
)
def test_the_name_of_a_driver(model: str, name: str) -> None:
    assert driver_name(model) == name


def test_filters_and_plans_see_its_dma(machine: Machine) -> None:
    copy = Copy(machine)
    machine.server.faults.load(
        Plan.of({"at": "dma-completing", "when": {"stream_id": 0x20, "write": True}, "do": "hold"})
    )
    copy.start()
    machine.run()
    (flying,) = call(machine, "dma.in_flight")["transactions"]
    assert (flying["function"], flying["iova"]) == ("copy0", TARGET)
    assert (copy.copied, copy.result()) == (True, (0, 0))
    call(machine, "faults.clear")
    machine.run()
    assert copy.result()[1] == DONE


def test_plans_see_its_registers(machine: Machine) -> None:
    copy = Copy(machine)
    machine.server.faults.load(
        Plan.of({"at": "mmio-access", "when": {"register": "0x8", "write": True}, "do": "skip"})
    )
    copy.start()
    assert machine.run() == 0, "the doorbell was lost"


def test_host_domains_rule_it(machine: Machine) -> None:
    copy = Copy(machine)
    assert machine.server.host.block("copy0") is NtStatus.SUCCESS
    copy.start()
    machine.run()
    assert (copy.client.get(STATUS), copy.copied) == (ABORTED, False)


def test_it_is_behind_the_smmu(machine: Machine) -> None:
    smmu, copy = machine.connect("smmu"), Copy(machine)
    smmu.put(hw.CR0, hw.SMMUEN)
    copy.start()
    machine.run()
    assert copy.client.get(STATUS) == ABORTED
    aborted = [event for event in machine.events if event.kind == "Aborted"]
    assert {event.stream_id for event in aborted} == {0x20}  # type: ignore[attr-defined]


def test_it_has_the_capabilities_of_the_profile(machine: Machine) -> None:
    (_, copy) = machine.connect("engine0"), machine.connect("copy0")
    assert struct.unpack("<H", copy.read(7, 0x100, 2)) == (0x0F,), "ATS"


def test_messages_have_a_table_where_the_model_leaves_room(
    make: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DmaMaster, "msix_vectors", 5)
    copy = make(msix=True).connect("copy0")
    assert copy.irq_count(MSIX) == 5
    assert [copy.region_info(bar).size for bar in range(4)] == [0x1000, 0, 0x1000, 0]


# When it fails


def boom(*_: object) -> Any:
    raise ZeroDivisionError("in the model")


@pytest.mark.parametrize("what", ["read", "write", "step", "reset", "busy", "pin_released"])
def test_it_fails_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    copy, engine = Copy(machine), machine.connect("engine0", bus_master=True)
    function = served(machine)
    kind = type(function._model)
    monkeypatch.setattr(kind, what, property(boom) if what == "busy" else boom)
    copy.start()
    machine.run()
    if what == "reset":
        copy.client.reset()
    if what == "pin_released":
        function._pin_released()
    assert copy.client.get(STATUS) == 0xFFFF_FFFF
    copy.client.put(RING, 0, 8)
    assert names(machine.events, "FunctionFailed") == ["copy0"]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == "copy0: the model failed: it is dead until it is reset"
    assert "in the model" in str(record.exc_info)
    assert [row["dead"] for row in call(machine, "function.list")][-1]

    engine.fill(SIZE)
    engine.start()
    machine.run()
    assert engine.status() == HALTED, "the others go on"

    monkeypatch.undo()
    copy.client.reset()
    copy.client.set_bus_master(True)
    copy.tail = 0
    copy.start()
    machine.run()
    assert copy.copied


@pytest.mark.parametrize("what", ["write", "step", "busy"])
def test_it_does_not_end_the_server(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    copy = Copy(machine)

    def leave(*_: object) -> None:
        raise SystemExit(3)

    kind = type(served(machine)._model)
    monkeypatch.setattr(kind, what, property(leave) if what == "busy" else leave)
    copy.start()
    machine.run()
    assert names(machine.events, "FunctionFailed") == ["copy0"]
    assert copy.client.get(STATUS) == 0xFFFF_FFFF


def test_what_is_no_number_is_a_failure(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Copy(machine)
    function = served(machine)
    monkeypatch.setattr(type(function._model), "read", lambda *_: None)
    assert copy.client.get(STATUS) == 0xFFFF_FFFF
    assert names(machine.events, "FunctionFailed") == ["copy0"]


def test_what_is_too_large_is_cut_off(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Copy(machine)
    copy.client.put(RING, 0x1122_3344_5566_7788, 8)
    assert (copy.client.get(RING, 2), copy.client.get(RING, 8)) == (0x7788, 0x1122_3344_5566_7788)
    function = served(machine)
    monkeypatch.setattr(type(function._model), "read", lambda *_: -1)
    assert copy.client.get(STATUS) == 0xFFFF_FFFF
    assert names(machine.events, "FunctionFailed") == []


def test_nothing_of_it_is_in_flight_when_it_has_failed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Copy(machine)
    copy.start()
    machine.server.turn()
    assert call(machine, "dma.in_flight")["transactions"]
    function = served(machine)
    monkeypatch.setattr(type(function._model), "read", boom)
    copy.client.get(HEAD)
    assert not call(machine, "dma.in_flight")["transactions"]


def test_a_capability_that_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Copy(machine)
    function = served(machine)
    capability: ExtendedCapability = function._model.capabilities[0]
    monkeypatch.setattr(capability, "written", boom)
    copy.client.write(7, 0x106, b"\0\x80")
    assert names(machine.events, "FunctionFailed") == ["copy0"]
