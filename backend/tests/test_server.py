"""The models on real sockets, with a small client in QEMU's place."""

import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import smmu_rig as hw
from tests.server_rig import (
    BASE,
    ERROR,
    FUNCTIONS,
    HALTED,
    RAM,
    RAND48,
    Function,
    Machine,
    Make,
    names,
)
from vfio_user import SocketBusy, SocketError
from viommu.endpoints.pattern import rand48
from viommu.function import SMMU_IDENTITY
from viommu.layouts.test_engine import UserFrame, user_frame
from viommu.server import Server
from viommu.smmu import Features

INTX, MSIX = 0, 2
EVENTS = BASE + 0x10_0000
PAGE = 0x1000


@pytest.fixture
def directory() -> Iterator[Path]:
    """A path short enough for sockets, whatever the base of the test run."""
    with tempfile.TemporaryDirectory(prefix="vs-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def make(directory: Path) -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Machine(directory, **options))


@pytest.fixture
def machine(make: Make) -> Machine:
    return make()


def pattern(seed: int, size: int, address: int = BASE) -> bytes:
    return rand48(seed, address, address, size)


# Sockets


def test_each_function_has_a_socket_of_its_name_until_it_closes(
    machine: Machine, directory: Path
) -> None:
    assert machine.server.sockets == {
        function.name: directory / f"{function.name}.sock" for function in FUNCTIONS
    }
    assert {path.name for path in directory.iterdir()} == {
        "smmu.sock",
        "engine0.sock",
        "engine1.sock",
    }
    machine.server.close()
    assert not list(directory.iterdir())


def test_a_second_server_leaves_the_first_alone(
    machine: Machine, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SocketBusy, match=r"another server is listening on .*/smmu\.sock"):
        Server(FUNCTIONS, directory)
    # Also when only the last of its sockets is taken: those that it had made before are gone.
    others = [*FUNCTIONS[1:], type(FUNCTIONS[0])(name="new", model="smmuv3", stream_id=8)]
    with pytest.raises(SocketBusy, match=r"/engine0\.sock"):
        Server(others, directory)
    assert {path.stem for path in directory.iterdir()} == {"smmu", "engine0", "engine1"}
    machine.server.turn()
    engine = machine.connect("engine0", bus_master=True)
    engine.fill(PAGE)
    engine.start()
    machine.run()
    assert engine.status() == HALTED


def test_a_directory_that_is_not_there(directory: Path) -> None:
    with pytest.raises(SocketError, match="no such directory for the socket"):
        Server(FUNCTIONS, directory / "none")


def test_identities(machine: Machine) -> None:
    smmu, engine = machine.connect("smmu"), machine.connect("engine0")
    vendor, device = struct.unpack("<HH", smmu.read(7, 0, 4))
    assert (vendor, device) == (SMMU_IDENTITY.vendor_id, SMMU_IDENTITY.device_id)
    assert smmu.read(7, 9, 3) == bytes.fromhex("000608"), "class IOMMU"
    assert struct.unpack("<HH", engine.read(7, 0, 4)) == (0x13B5, 0xFF80)
    assert [smmu.region_info(bar).size for bar in range(6)] == [0x2_0000, 0, 0, 0, 0, 0]
    assert [engine.region_info(bar).size for bar in range(6)] == [0x2_0000, 0, 0, 0, 0, 0]


def test_a_profile_with_vatos_has_a_larger_bar(make: Make) -> None:
    smmu = make(features=Features(vatos=True)).connect("smmu")
    assert smmu.region_info(0).size == 0x4_0000
    place = 0x2_0000 + 0x1_0000 * smmu.get(0x08) + 0xA08
    smmu.put(place, 0x10, 8)
    assert smmu.get(place, 8) == 0x10


# MMIO


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 64, 128])
def test_mmio_of_every_size(machine: Machine, size: int) -> None:
    engine = machine.connect("engine0")
    content = bytes(range(0x80, 0x100))
    engine.write(0, 8, content[8:])
    begin = 128 - size
    assert engine.read(0, begin, size)[-8:] == content[begin:][-8:]
    engine.write(0, 128 - size, b"\x55" * size)
    after = engine.read(0, 8, 120)
    assert after[max(begin - 8, 0) :] == b"\x55" * min(size, 120)
    assert after[: max(begin - 8, 0)] == content[8:begin]


def test_registers_of_the_smmu(machine: Machine) -> None:
    smmu = machine.connect("smmu")
    idr0, idr1 = smmu.get(hw.IDR0), smmu.get(hw.IDR1)
    assert idr0
    assert idr1
    assert smmu.get(hw.IDR0, 8) == idr0 | idr1 << 32
    # What is no aligned access of 32 or 64 bits reads as 0 and writes nothing.
    for size in (1, 2, 3, 5, 6, 7, 12, 16):
        assert smmu.get(hw.IDR0, size) == 0
        smmu.put(hw.GERROR_IRQ_CFG0, (1 << 8 * size) - 1, size)
    assert smmu.get(hw.IDR0 + 2) == 0
    assert smmu.get(hw.GERROR_IRQ_CFG0, 8) == 0
    smmu.put(hw.STRTAB_BASE, 0x345_6780_0000, 8)
    assert (smmu.get(hw.STRTAB_BASE), smmu.get(hw.STRTAB_BASE + 4)) == (0x6780_0000, 0x345)


# DMA


def test_dma_follows_bus_master(machine: Machine) -> None:
    engine = machine.connect("engine0")
    engine.fill(PAGE, seed=7)
    engine.start()
    machine.run()
    assert engine.status() == ERROR
    assert engine.field(UserFrame.udata2) == BASE
    assert bytes(machine.ram[:PAGE]) == bytes(PAGE)
    engine.set_bus_master(True)
    engine.start()
    machine.run()
    assert engine.status() == HALTED
    assert bytes(machine.ram[:PAGE]) == pattern(7, PAGE)
    engine.set_bus_master(False)
    engine.fill(PAGE, seed=8)
    engine.start()
    machine.run()
    assert engine.status() == ERROR
    assert bytes(machine.ram[:PAGE]) == pattern(7, PAGE)
    changes = [event for event in machine.events if event.kind == "BusMasterChanged"]
    assert [(event.function, event.enabled) for event in changes] == [  # type: ignore[attr-defined]
        ("engine0", True),
        ("engine0", False),
    ]


def test_an_engine_is_behind_the_smmu_with_its_own_stream(machine: Machine) -> None:
    smmu = machine.connect("smmu")
    engines = [machine.connect(f"engine{number}", bus_master=True) for number in range(2)]
    smmu.put(hw.EVENTQ_BASE, EVENTS | 5, 8)
    smmu.put(hw.CR2, 1 << 1)  # record a bad StreamID; the stream table has one entry
    smmu.put(hw.CR0, hw.SMMUEN | hw.EVENTQEN)
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    smmu.set_eventfds(INTX, [descriptor])
    smmu.put(hw.IRQ_CTRL, 1 << 2)
    for engine in engines:
        engine.fill(PAGE)
        engine.start()
        machine.run()
        assert engine.status() == ERROR
    assert smmu.get(hw.EVENTQ_PROD) == 2
    records = [(machine.word(EVENTS + 32 * number)) for number in range(2)]
    assert [(record & 0xFF, record >> 32) for record in records] == [(0x02, 0x10), (0x02, 0x18)]
    assert os.eventfd_read(descriptor) >= 1
    os.close(descriptor)


# Interrupts


def test_intx(machine: Machine) -> None:
    engine = machine.connect("engine0", bus_master=True)
    assert (engine.irq_count(INTX), engine.irq_count(MSIX)) == (1, 0)
    engine.fill(PAGE, msiaddress=1, msidata=0)
    engine.start()
    machine.run()
    assert engine.get(4) & 1, "nobody listens yet"
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    engine.set_eventfds(INTX, [descriptor])
    engine.put(4, 0)
    engine.start()
    machine.run()
    assert (engine.status(), engine.get(4) & 1) == (HALTED, 0)
    assert os.eventfd_read(descriptor) == 1
    os.close(descriptor)


def test_msix(make: Make) -> None:
    machine = make(msix=True)
    engine = machine.connect("engine1", bus_master=True)
    count = engine.irq_count(MSIX)
    assert count == 64
    assert machine.connect("smmu").irq_count(MSIX) == 0
    descriptors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
    engine.set_eventfds(MSIX, descriptors[:8])
    for vector in (5, 0, 5):
        engine.fill(PAGE, msiaddress=1, msidata=vector)
        engine.start()
        machine.run()
        assert engine.get(4) & 1 == 0
    assert (os.eventfd_read(descriptors[5]), os.eventfd_read(descriptors[0])) == (2, 1)
    for descriptor in descriptors:
        os.close(descriptor)


# Clients that come and go


def test_a_client_that_is_lost_in_the_middle_of_a_dma(machine: Machine) -> None:
    engine = machine.connect("engine0", bus_master=True)
    smmu = machine.connect("smmu")
    smmu.put(hw.CR1, 0x75)
    engine.fill(RAM, rate=1)
    engine.start()
    for _ in range(100):
        machine.server.turn()
    assert 0 < engine.field(UserFrame.count_of_transactions_returned) < 100
    engine.close()
    smmu.close()
    machine.run()
    here = len(machine.events)
    assert {event.kind for event in machine.events[here:]} == set()
    assert sorted(names(machine.events, "ClientDetached")) == ["engine0", "smmu"]
    machine.ram[:] = bytes(RAM)
    machine.run()
    assert bytes(machine.ram[:]) == bytes(RAM), "no byte comes after the client is gone"

    engine, smmu = machine.connect("engine0"), machine.connect("smmu")
    assert (engine.status(), smmu.get(hw.CR1)) == (HALTED, 0)
    assert engine.field(UserFrame.count_of_transactions_launched) == 0
    engine.fill(PAGE, seed=3)
    engine.start()
    machine.run()
    assert engine.status() == ERROR, "Bus Master is not inherited"
    engine.set_bus_master(True)
    engine.start()
    machine.run()
    assert bytes(machine.ram[:PAGE]) == pattern(3, PAGE)


def test_the_guest_resets_a_function(machine: Machine) -> None:
    engine, other = (machine.connect(f"engine{n}", bus_master=True) for n in range(2))
    engine.fill(RAM, rate=1)
    other.fill(PAGE, at=BASE + RAM - PAGE, seed=2)
    engine.start()
    for _ in range(20):
        machine.server.turn()
    engine.reset()
    assert engine.status() == HALTED
    assert engine.field(UserFrame.begin) == 0
    assert names(machine.events, "FunctionReset") == ["engine0"]
    other.start()
    machine.run()
    assert other.status() == HALTED
    assert bytes(machine.ram[-PAGE:]) == pattern(2, PAGE, BASE + RAM - PAGE)
    engine.fill(PAGE)
    engine.start()
    machine.run()
    assert engine.status() == ERROR, "a reset takes Bus Master away"


# The loop


def test_mmio_does_not_starve_dma(machine: Machine) -> None:
    engine, smmu = machine.connect("engine0", bus_master=True), machine.connect("smmu")
    engine.fill(100 * 64, rate=1)
    engine.start()

    def hammer() -> None:
        for _ in range(2000):
            smmu.post(0, hw.GERRORN, bytes(4))

    guest = threading.Thread(target=hammer)
    guest.start()
    while guest.is_alive():
        machine.server.turn()
    machine.run()
    assert engine.status() == HALTED
    kinds = [kind for kind in machine.kinds() if kind in ("RegisterAccess", "DmaMoved")]
    assert kinds.count("RegisterAccess") == 2000
    # Each transaction takes two steps, and each step comes after at most 16 requests.
    last_moved = len(kinds) - kinds[::-1].index("DmaMoved")
    runs = "".join("a" if kind == "RegisterAccess" else "." for kind in kinds[:last_moved])
    assert max(len(run) for run in runs.split(".")) <= 2 * 16


def test_dma_does_not_starve_mmio(machine: Machine) -> None:
    engines: list[Function] = [machine.connect(f"engine{n}", bus_master=True) for n in range(2)]
    smmu = machine.connect("smmu")
    for engine in engines:
        for frame in range(64):
            engine.fill(PAGE, frame=frame, rate=1)
            engine.start(frame)
    before = len(machine.events)
    for _ in range(50):
        smmu.get(hw.IDR0)
    moved = [event.kind for event in machine.events[before:]].count("DmaMoved")
    assert 0 < moved <= 50, "one request waits for one step at most"
    machine.run()
    assert {engine.status(frame) for engine in engines for frame in range(64)} == {HALTED}


def order_of_steps(directory: Path, seed: int) -> list[tuple[int, int]]:
    with Machine(directory, seed=seed) as machine:
        engines = [machine.connect(f"engine{n}", bus_master=True) for n in range(2)]
        for engine in engines:
            for frame in range(8):
                engine.fill(256, frame=frame, at=BASE + frame * PAGE, rate=1)
        start = len(machine.events)
        for frame in range(8):  # all before the first step
            for engine in engines:
                engine.post(0, user_frame(frame), RAND48.to_bytes(4, "little"))
        machine.server.turn()
        machine.run()
        moved = [event for event in machine.events[start:] if event.kind == "DmaMoved"]
    order = [(event.stream_id, event.iova) for event in moved]  # type: ignore[attr-defined]
    assert len(order) == 2 * 8 * 4
    return order


def test_the_seed_replays_the_order_of_steps(directory: Path) -> None:
    first = order_of_steps(directory, 1)
    assert order_of_steps(directory, 1) == first
    others = [order_of_steps(directory, seed) for seed in range(2, 5)]
    assert all(sorted(other) == sorted(first) for other in others)
    assert any(other != first for other in others)


def test_it_runs_until_it_is_stopped(directory: Path) -> None:
    with Server(FUNCTIONS, directory) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        client = Function(server.sockets["smmu"])
        client.say_version()
        client.receive()
        assert client.get(hw.IDR0)
        time.sleep(0.05)
        server.stop()
        thread.join(2)
        assert not thread.is_alive()
        client.close()
