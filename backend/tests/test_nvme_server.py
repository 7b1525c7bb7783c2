"""An NVMe controller on its socket: what QEMU does to it reaches it, and what it does QEMU."""

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace

import pytest

from tests.client import CONFIG
from tests.nvme_rig import ACQ, AQA, ASQ, CC, CSTS, ENABLE, IDENTIFY, RDY, command
from tests.server_rig import BASE, BUS_MASTER, COMMAND, FUNCTIONS, MEMORY_SPACE, Function, Machine
from viommu.faults.plan import Plan

INTX, MSIX = 0, 2
DATA = BASE + 0x8000


def functions(disk: Path | None, size: int | None) -> list[SimpleNamespace]:
    nvme = SimpleNamespace(
        name="nvme0",
        model="nvme",
        stream_id=0x10,
        disk=disk,
        disk_format=None,
        snapshot=False,
        size=size,
        write_cache="host",
    )
    return [FUNCTIONS[0], nvme]


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    yield made
    for fd in made:
        os.close(fd)


def count(eventfd: int) -> int:
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def enable(client: Function) -> None:
    client.put(AQA, 7 | 7 << 16)
    client.put(ASQ, BASE, 8)
    client.put(ACQ, BASE + 0x1000, 8)
    client.put(CC, ENABLE)
    assert client.get(CSTS) == RDY


def identify(machine: Machine, client: Function, place: int) -> None:
    """The `place`-th command of the admin queue."""
    entry = command(IDENTIFY, 1, prp1=DATA, cid=place)
    machine.ram[64 * place : 64 * place + 64] = entry
    client.put(0x1000, place + 1)
    machine.run()
    cid, status = struct.unpack_from("<HH", machine.ram, 0x1000 + 16 * place + 12)
    assert (cid, status) == (place, 1)


def test_it_is_an_nvme_controller(tmp_path: Path) -> None:
    with Machine(tmp_path, functions=functions(None, 1 << 20)) as machine:
        client = machine.connect("nvme0", bus_master=True)
        assert client.read(CONFIG, 0x09, 3) == b"\x02\x08\x01"
        assert client.irq_count(MSIX) == 0
        enable(client)
        identify(machine, client, 0)
        assert machine.ram[0x8018 : 0x8018 + 11] == b"viommu NVMe"
        assert "NvmeCommandEnded" in machine.kinds()


def test_its_pin(tmp_path: Path, eventfds: list[int]) -> None:
    with Machine(tmp_path, functions=functions(None, 1 << 20)) as machine:
        client = machine.connect("nvme0", bus_master=True)
        client.set_eventfds(INTX, eventfds[:1])
        enable(client)
        identify(machine, client, 0)
        assert count(eventfds[0]) == 1
        identify(machine, client, 1)
        assert count(eventfds[0]) == 0, "it is asserted still"
        client.mask(INTX, False)
        machine.run()
        assert count(eventfds[0]) == 1, "it was let go of, and two completions are unread"
        client.put(0x1004, 2)
        client.mask(INTX, False)
        machine.run()
        assert count(eventfds[0]) == 0


def test_its_messages(tmp_path: Path, eventfds: list[int]) -> None:
    with Machine(tmp_path, functions=functions(None, 1 << 20), msix=True) as machine:
        client = machine.connect("nvme0", bus_master=True)
        assert client.irq_count(MSIX) == 17
        client.write(CONFIG, COMMAND, struct.pack("<H", MEMORY_SPACE | BUS_MASTER | 1 << 10))
        client.set_eventfds(MSIX, eventfds)
        enable(client)
        for place in range(2):
            identify(machine, client, place)
            assert count(eventfds[0]) == 1, "each has its own"


HELD = {"at": "dma-translated", "when": {"size": 4096, "write": True, "times": 1}, "do": "hold"}


def test_its_dma_is_held_in_flight(tmp_path: Path) -> None:
    with Machine(tmp_path, functions=functions(None, 1 << 20)) as machine:
        machine.server.faults.load(Plan.of(HELD))
        client = machine.connect("nvme0", bus_master=True)
        enable(client)
        machine.ram[0:64] = command(IDENTIFY, 1, prp1=DATA)
        client.put(0x1000, 1)
        machine.run()
        smmu = machine.server.smmu
        assert smmu is not None
        assert len(smmu.in_flight) == 1, "it has nothing to do, and its transaction is in flight"
        assert machine.word(BASE + 0x1008) == machine.word(DATA) == 0
        client.put(CC, 0)
        assert len(smmu.in_flight) == 0, "a controller reset ends it"
        enable(client)
        identify(machine, client, 0)


def test_its_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with pytest.raises(FileNotFoundError), Machine(tmp_path, functions=functions(path, None)):
        pass
    with Machine(tmp_path, functions=functions(path, 1 << 20)):
        assert path.stat().st_size == 1 << 20
        assert path in open_files()
    assert path not in open_files()


def open_files() -> list[Path]:
    return [link.resolve() for link in Path("/proc/self/fd").iterdir()]


SHUT_DOWN, SHUTTING_DOWN, IS_DOWN = 1 << 14, 1 << 2, 2 << 2


def test_a_disk_that_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server goes on meanwhile, and sleeps if there is nothing else to do, until the disk is done."""
    flushed = Event()
    monkeypatch.setattr(os, "fdatasync", lambda _: flushed.wait(30))
    with Machine(tmp_path, functions=functions(tmp_path / "disk.raw", 1 << 20)) as machine:
        smmu, client = machine.connect("smmu"), machine.connect("nvme0", bus_master=True)
        enable(client)
        identify(machine, client, 0)
        client.put(CC, ENABLE | SHUT_DOWN)
        machine.run()
        assert client.get(CSTS) == RDY | SHUTTING_DOWN
        assert smmu.get(0), "IDR0"
        identify(machine, client, 1)
        Timer(0.2, flushed.set).start()
        before = time.monotonic()
        assert not machine.server.turn(20_000)
        assert time.monotonic() - before < 10, "it was woken"
        machine.run()
        assert client.get(CSTS) == RDY | IS_DOWN


def test_a_reset_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = Event()
    monkeypatch.setattr(os, "fdatasync", lambda _: flushed.wait(30))
    with Machine(tmp_path, functions=functions(tmp_path / "disk.raw", 1 << 20)) as machine:
        client = machine.connect("nvme0", bus_master=True)
        enable(client)
        client.put(CC, ENABLE | SHUT_DOWN)
        machine.run()
        client.put(CC, 0)
        assert client.get(CSTS) == 0
        machine.ram[:] = bytes(len(machine.ram))
        enable(client)
        flushed.set()
        identify(machine, client, 0)
        assert client.get(CSTS) == RDY, "what was flushed is nobody's"
