"""DMA regions: shared both ways, dead after unmap, and never a crash."""

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from vfio_user import ClientLost, DmaRegion, PciDevice, ResetType

from .client import Client
from .conftest import Connect
from .scratch import Scratch

SIZE = 0x4000


class Ram:
    """Memory of the client, as a virtual machine would share it."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.truncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)


@pytest.fixture
def ram() -> Iterator[Ram]:
    made = Ram(SIZE)
    yield made
    made.memory.close()
    os.close(made.fd)


def test_a_view_is_the_memory_of_the_client(client: Client, device: PciDevice, ram: Ram) -> None:
    seen: list[DmaRegion] = []
    device.on_dma_map = seen.append
    client.map(0x8000_0000, SIZE, ram.fd)
    (region,) = seen
    assert (region.iova, region.size) == (0x8000_0000, SIZE)
    assert region.readable
    assert region.writable
    assert device.dma_regions == (region,)
    assert region.view is not None
    assert len(region.view) == SIZE
    region.view[0x100:0x105] = b"hello"
    assert ram.memory[0x100:0x105] == b"hello"
    ram.memory[SIZE - 4 :] = b"back"
    assert bytes(region.view[-4:]) == b"back"


def test_the_offset_into_the_file_counts(client: Client, device: PciDevice, ram: Ram) -> None:
    ram.memory[0x2010:0x2014] = b"here"
    client.map(0, 0x1000, ram.fd, offset=0x2010)
    view = device.dma_regions[0].view
    assert view is not None
    assert bytes(view[:4]) == b"here"


def test_a_region_without_a_file_is_known_and_out_of_reach(
    client: Client, device: PciDevice
) -> None:
    client.map(0x1000, 0x1000)
    (region,) = device.dma_regions
    assert region.view is None
    assert "not accessible" in repr(region)
    client.unmap(0x1000, 0x1000)
    assert device.dma_regions == ()


def test_rights_are_kept(client: Client, device: PciDevice, ram: Ram) -> None:
    client.map(0, 0x1000, ram.fd, rights=1)
    client.map(0x1000, 0x1000, ram.fd, offset=0x1000, rights=2)
    client.map(0x2000, 0x1000, ram.fd, offset=0x2000, rights=0)
    read_only, write_only, neither = device.dma_regions
    assert read_only.view is not None
    assert not read_only.writable
    with pytest.raises(TypeError, match="read-only"):
        read_only.view[0] = 1
    assert write_only.view is None
    assert not write_only.readable
    assert neither.view is None


def test_a_view_is_dead_after_unmap(client: Client, device: PciDevice, ram: Ram) -> None:
    alive: list[bytes] = []

    def unmapped(region: DmaRegion) -> None:
        assert region.view is not None
        alive.append(bytes(region.view[:3]))

    device.on_dma_unmap = unmapped
    ram.memory[:3] = b"yes"
    client.map(0, SIZE, ram.fd)
    view = device.dma_regions[0].view
    assert view is not None
    client.unmap(0, SIZE)
    assert alive == [b"yes"], "inside the callback the memory is still there"
    for use in (lambda: view[0], lambda: view[0:1], lambda: bytes(view)):
        with pytest.raises(ValueError, match="released"):
            use()


@pytest.mark.parametrize("kind", ["slice", "memoryview", "cast", "ctypes"])
def test_a_leaked_view_is_logged_and_sees_no_guest_memory(
    client: Client,
    device: PciDevice,
    ram: Ram,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    ram.memory[:] = b"G" * SIZE
    client.map(0, SIZE, ram.fd)
    view = device.dma_regions[0].view
    assert view is not None
    leaked = keep_another(view, kind)
    client.unmap(0, SIZE)
    assert "is still held" in caplog.text
    assert leaked[0] == 0, "private zeros took the place of guest memory"
    leaked[0] = 1
    assert ram.memory[:] == b"G" * SIZE, "and nothing gets through to it"
    place = ctypes.addressof(ctypes.c_char.from_buffer(leaked)) & -0x1000
    assert is_mapped(place)
    del leaked, view
    assert not is_mapped(place), "the last view takes its pages with it"
    assert client.read(0, 0, 1) == b"\0"


def keep_another(view: memoryview, kind: str) -> memoryview:
    match kind:
        case "slice":
            return view[16:32]
        case "memoryview":
            return memoryview(view)
        case "cast":
            return view.cast("I")
    return memoryview((ctypes.c_char * SIZE).from_buffer(view)).cast("B")


def is_mapped(place: int) -> bool:
    """Whether an anonymous mapping of the leaked size begins at `place`."""
    with open("/proc/self/maps", encoding="ascii") as maps:  # noqa: PTH123 - a pseudo file
        lines = [line.split() for line in maps]
    spans = [[int(part, 16) for part in line[0].split("-")] for line in lines if len(line) == 5]
    return [place, place + SIZE] in spans


def test_a_view_in_a_dead_cycle_is_no_leak(
    client: Client, device: PciDevice, ram: Ram, caplog: pytest.LogCaptureFixture
) -> None:
    client.map(0, SIZE, ram.fd)
    view = device.dma_regions[0].view
    assert view is not None
    cycle: list[object] = [view[0:4]]
    cycle.append(cycle)
    del cycle
    client.unmap(0, SIZE)
    assert "is still held" not in caplog.text


def test_a_region_mapped_twice_is_told_once(client: Client, device: PciDevice, ram: Ram) -> None:
    seen: list[DmaRegion] = []
    device.on_dma_map = seen.append
    client.map(0, SIZE, ram.fd)
    client.map(0, SIZE, ram.fd)
    assert len(seen) == 1


@pytest.mark.parametrize("when", ["map", "unmap"])
def test_an_exception_here_closes_the_connection(
    client: Client,
    device: PciDevice,
    connect: Connect,
    ram: Ram,
    caplog: pytest.LogCaptureFixture,
    when: str,
) -> None:
    def fail(region: DmaRegion) -> None:
        raise RuntimeError("no such memory")

    lost: list[bool] = []
    device.on_disconnect = lambda: lost.append(True)
    if when == "map":
        device.on_dma_map = fail
    else:
        client.map(0, SIZE, ram.fd)
        device.on_dma_unmap = fail
    client.serve = lambda: None
    if when == "map":
        client.send(2, bytes((32, 0, 0, 0, 3, 0, 0, 0)) + bytes(16) + SIZE.to_bytes(8, "little"))
    else:
        client.send(3, bytes((24, 0, 0, 0, 0, 0, 0, 0)) + bytes(8) + SIZE.to_bytes(8, "little"))
    with pytest.raises(ClientLost):
        device.run()
    with pytest.raises(ConnectionError):
        client.receive()
    assert lost == [True]
    assert f"DMA {when} failed" in caplog.text
    assert "RuntimeError: no such memory" in caplog.text
    assert device.dma_regions == ()
    device.on_dma_map = device.on_dma_unmap = None
    assert connect().read(0, 0, 1) == b"\0", "the next client is served"


def test_a_lost_client_takes_its_regions_along(client: Client, device: PciDevice, ram: Ram) -> None:
    events: list[object] = []
    device.on_dma_unmap = lambda region: events.append(region.iova)
    device.on_reset = events.append
    device.on_disconnect = lambda: events.append("disconnect")
    client.map(0, 0x1000, ram.fd)
    client.map(0x1000, 0x1000)
    view = device.dma_regions[0].view
    assert view is not None
    client.close()
    with pytest.raises(ClientLost):
        device.run()
    assert events == [0, 0x1000, ResetType.LOST_CONNECTION, "disconnect"]
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_close_ends_the_views(client: Client, device: PciDevice, ram: Ram) -> None:
    client.map(0, SIZE, ram.fd)
    view = device.dma_regions[0].view
    assert view is not None
    device.close()
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_the_largest_number_of_regions(client: Client, device: PciDevice, scratch: Scratch) -> None:
    for i in range(16):
        client.map(i << 12, 0x1000)
    if device.library.api == (0, 1):
        with pytest.raises(OSError, match="Invalid argument"):
            client.map(16 << 12, 0x1000)
    assert len(device.dma_regions) == 16
