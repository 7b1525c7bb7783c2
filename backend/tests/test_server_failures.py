"""What goes wrong at the server: QEMU keeps guest RAM to itself, a model fails."""

import logging
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import smmu_rig as hw
from tests.server_rig import BASE, ERROR, HALTED, RAM, Function, Machine, names
from viommu.endpoints.pattern import rand48
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.layouts.test_engine import UserFrame
from viommu.smmu import Smmu

PAGE = 0x1000


@pytest.fixture
def machine() -> Iterator[Machine]:
    # A path short enough for sockets, whatever the base of the test run.
    with tempfile.TemporaryDirectory(prefix="vs-", dir="/tmp") as path, Machine(Path(path)) as made:
        yield made


# Guest RAM that QEMU keeps to itself


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_memory_that_is_not_shared(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    engine = machine.connect("engine0", shared=False)
    smmu = machine.connect("smmu", shared=False)
    assert not said(caplog), "nothing is wrong before a driver comes"
    assert engine.get(0) == HALTED
    assert not said(caplog)
    for _ in range(2):
        engine.set_bus_master(True)
        engine.set_bus_master(False)
    engine.set_bus_master(True)
    (sentence,) = said(caplog)
    assert sentence.startswith("engine0: ")
    assert "QEMU keeps guest RAM to itself" in sentence
    assert "-object memory-backend-memfd," in sentence
    assert "share=on -machine …,memory-backend=" in sentence
    engine.fill(PAGE)
    engine.start()
    machine.run()
    assert engine.status() == ERROR
    assert "BusMasterChanged" not in machine.kinds(), "the port stays off"
    smmu.put(hw.CR0, hw.SMMUEN)
    smmu.put(hw.CR0, hw.SMMUEN)
    assert [sentence[:6] for sentence in said(caplog)] == ["engine", "smmu: "]

    # Another QEMU is another matter.
    engine.close()
    smmu.reset()
    machine.run()
    caplog.clear()
    engine = machine.connect("engine0", bus_master=True)
    engine.fill(PAGE)
    engine.start()
    machine.run()
    assert engine.status() == HALTED
    engine.close()
    machine.run()
    assert not said(caplog)
    machine.connect("engine0", shared=False, bus_master=True)
    assert len(said(caplog)) == 1


def test_a_read_only_region_is_no_memory(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = machine.connect("engine0", shared=False)
    engine.map(BASE + RAM, PAGE, machine.fd, rights=1)
    engine.set_bus_master(True)
    assert len(said(caplog)) == 1


def test_regions_out_of_reach_beside_memory_are_normal(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = machine.connect("engine0")
    engine.map(BASE + RAM, PAGE)
    engine.set_bus_master(True)
    engine.fill(2 * PAGE, at=BASE + RAM - PAGE)
    engine.start()
    machine.run()
    assert (engine.status(), engine.field(UserFrame.udata2)) == (ERROR, BASE + RAM)
    assert not said(caplog)


def test_memory_that_comes_later_is_used(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = machine.connect("engine0", shared=False, bus_master=True)
    assert len(said(caplog)) == 1
    engine.unmap(BASE, RAM)
    engine.map(BASE, RAM, machine.fd)
    engine.fill(PAGE)
    engine.start()
    machine.run()
    assert engine.status() == HALTED


# Clients that cannot be served


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Nobody in this process gets another one."""
    free = os.dup(0)
    os.close(free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_client_is_lost_alone_when_there_is_no_descriptor_for_its_memory(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    engine, other = (machine.connect(f"engine{n}", bus_master=True) for n in range(2))
    with no_descriptors(), pytest.raises(ConnectionError):
        engine.map(BASE + RAM, PAGE, machine.fd)
    machine.run()
    assert names(machine.events, "ClientDetached") == ["engine0"]
    assert said(caplog)[-1].startswith("engine0: the client cannot be served: vfu_run_ctx")
    other.fill(PAGE)
    other.start()
    machine.run()
    assert other.status() == HALTED
    assert machine.connect("engine0").status() == HALTED


def test_a_client_waits_until_there_is_a_descriptor_for_it(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    client = Function(machine.server.sockets["engine0"], machine.server.turn)
    client.say_version()
    with no_descriptors():
        for _ in range(3):
            machine.server.turn()
    assert len(said(caplog)) == 1
    machine.server.turn()
    client.receive()
    assert client.status() == HALTED
    client.close()


# Models that fail


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_model_whose_mmio_fails_is_dead_until_it_is_reset(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    access: str,
) -> None:
    smmu, engine = machine.connect("smmu"), machine.connect("engine0")

    def broken(*_: object) -> int:
        raise ZeroDivisionError("in the model")

    monkeypatch.setattr(Smmu, access, broken)
    smmu.put(hw.CR1, 0x75)
    assert smmu.get(hw.CR1) == 0xFFFF_FFFF
    monkeypatch.undo()
    assert smmu.get(hw.CR1, 8) == 2**64 - 1, "it is not asked any more"
    (record,) = (record for record in caplog.records if record.exc_info)
    assert record.getMessage() == "smmu: the model failed: it is dead until it is reset"
    assert "in the model" in str(record.exc_info)
    assert names(machine.events, "FunctionFailed") == ["smmu"]
    assert engine.status() == HALTED
    smmu.reset()
    assert smmu.get(hw.CR1) == 0


def test_a_model_whose_step_fails_is_dead_until_it_is_reset(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, other = (machine.connect(f"engine{n}", bus_master=True) for n in range(2))
    engine.fill(PAGE)
    step = SmmuTestEngine.step

    def broken(model: SmmuTestEngine) -> bool:
        if model.name == "engine0":
            raise ZeroDivisionError("in the model")
        return step(model)

    monkeypatch.setattr(SmmuTestEngine, "step", broken)
    engine.start()
    assert machine.run() == 1
    (record,) = (record for record in caplog.records if record.exc_info)
    assert record.getMessage() == "engine0: the model failed: it is dead until it is reset"
    assert "in the model" in str(record.exc_info)
    assert names(machine.events, "FunctionFailed") == ["engine0"]
    # As of a card that was pulled.
    assert (engine.get(0), engine.get(0x28, 8)) == (0xFFFF_FFFF, 2**64 - 1)
    engine.put(0x28, 0x1234, 8)

    other.fill(PAGE)
    other.start()
    machine.run()
    assert other.status() == HALTED
    monkeypatch.undo()
    assert machine.run() == 0
    engine.reset()
    assert (engine.status(), engine.get(0x28, 8)) == (HALTED, 0)
    engine.set_bus_master(True)
    engine.fill(PAGE, seed=4)
    engine.start()
    machine.run()
    assert bytes(machine.ram[:PAGE]) == rand48(4, BASE, BASE, PAGE)
