"""Devices on real sockets, served by the real library in the thread of the test."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfio_user import PciDevice

from .client import Client
from .scratch import Scratch


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a path short enough for sockets, whatever the base of the test run."""
    with tempfile.TemporaryDirectory(prefix="vu-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def device(directory: Path) -> Iterator[PciDevice]:
    """A declared device that is not realized yet."""
    made = PciDevice(
        directory / "dev.sock",
        vendor_id=0x1234,
        device_id=0x5678,
        subsystem_vendor_id=0x9ABC,
        subsystem_id=0xDEF0,
        class_code=0xFF0102,
        revision=3,
    )
    with made:
        yield made


@pytest.fixture
def scratch(device: PciDevice) -> Scratch:
    """4 KiB of plain memory as BAR 0 of the device."""
    memory = Scratch(0x1000)
    device.add_bar(0, 0x1000, read=memory.read, write=memory.write)
    return memory


Connect = Callable[[], Client]


@pytest.fixture
def connect(device: PciDevice) -> Iterator[Connect]:
    """Realizes the device on first use and returns clients that have attached to it."""
    clients: list[Client] = []
    realized = False

    def make() -> Client:
        nonlocal realized
        if not realized:
            device.realize()
            realized = True
        client = Client(device.socket_path, device.run)
        clients.append(client)
        client.say_version()
        assert device.attach()
        client.receive()
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(scratch: Scratch, connect: Connect) -> Client:
    """A client attached to a device with the scratch BAR."""
    return connect()
