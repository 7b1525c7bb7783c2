"""Configuration space: identity, BARs, who may write what, capabilities, bus master, resets."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_user import DeviceError, PciDevice, ResetType
from vfio_user.capabilities import Capability, express, msi, msix
from vfio_user.config_space import ConfigSpace

from .client import CONFIG, Client
from .conftest import Connect
from .scratch import Scratch


def capabilities(client: Client) -> dict[int, int]:
    """Capability id → offset, found as a client finds them."""
    found = {}
    offset = client.read_int(CONFIG, 0x34, 1)
    while offset:
        found[client.read_int(CONFIG, offset, 1)] = offset
        offset = client.read_int(CONFIG, offset + 1, 1)
    return found


def test_identity(client: Client) -> None:
    assert client.read(CONFIG, 0, 4) == struct.pack("<HH", 0x1234, 0x5678)
    assert client.read_int(CONFIG, 8, 4) == 0xFF010203
    assert client.read(CONFIG, 0x2C, 4) == struct.pack("<HH", 0x9ABC, 0xDEF0)
    assert client.read_int(CONFIG, 0x0E, 1) == 0, "an ordinary function"
    assert client.region_info(CONFIG).size == 0x1000


def test_a_conventional_function_has_256_bytes(
    device: PciDevice, connect: Connect, scratch: Scratch
) -> None:
    path = device.socket_path.with_name("old.sock")
    with PciDevice(path, vendor_id=1, device_id=2, class_code=0, express=False) as old:
        assert len(old.config) == 256
        with pytest.raises(DeviceError, match="no room"):
            old.add_capability(0x0B, b"", extended=True)


def test_an_identity_that_does_not_fit_is_refused(device: PciDevice) -> None:
    path = device.socket_path.with_name("bad.sock")
    with pytest.raises(DeviceError, match="0x12345 does not fit 16 bits"):
        PciDevice(path, vendor_id=0x12345, device_id=0, class_code=0)
    assert not path.exists()


def test_bars_are_sized_as_pci_does(device: PciDevice, connect: Connect) -> None:
    memory = Scratch(0x2000)
    device.add_bar(0, 0x2000, read=memory.read, write=memory.write)
    device.add_bar(
        2, 0x1000, read=memory.read, write=memory.write, is_64bit=False, prefetchable=False
    )
    client = connect()
    for offset in range(0x10, 0x28, 4):
        client.write(CONFIG, offset, b"\xff" * 4)
    bars = struct.unpack("<6I", client.read(CONFIG, 0x10, 24))
    assert bars == (0xFFFF_E00C, 0xFFFF_FFFF, 0xFFFF_F000, 0, 0, 0)
    client.write(CONFIG, 0x10, struct.pack("<Q", 0x12_3456_7FFF))
    assert client.read_int(CONFIG, 0x10, 8) == 0x12_3456_600C
    assert client.region_info(0).size == 0x2000
    assert client.region_info(1).size == 0


def test_read_only_bits_stay(client: Client, device: PciDevice) -> None:
    before = bytes(device.config)
    for offset in (0, 8, 0x0E, 0x2C, 0x34, 0x30, 0x3D, 0x40, 0x44, 0x800):
        client.write(CONFIG, offset, b"\xff\xff")
    assert bytes(device.config) == before


def test_the_config_view_is_live(client: Client, device: PciDevice) -> None:
    device.config[0x200:0x204] = b"live"
    assert client.read(CONFIG, 0x200, 4) == b"live"
    device.config[0x07] = 0x08  # signaled target abort
    assert client.read_int(CONFIG, 0x06, 2) == 0x0810
    client.write(CONFIG, 0x06, b"\0\x08")
    assert device.config[0x07] == 0, "cleared by writing 1"


def test_bus_master_and_the_write_callback(client: Client, device: PciDevice) -> None:
    seen: list[tuple[int, bytes, bool]] = []
    device.on_config_write = lambda offset, data: seen.append((offset, data, device.bus_master))
    client.write(CONFIG, 4, b"\x06\x00")
    assert client.read_int(CONFIG, 4, 2) == 6
    client.write(CONFIG, 4, b"\x02\x00")
    assert seen == [(4, b"\x06\x00", True), (4, b"\x02\x00", False)]


def test_an_exception_in_the_write_callback_is_an_errno(
    client: Client, device: PciDevice, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(offset: int, data: bytes) -> None:
        raise RuntimeError("never mind")

    device.on_config_write = fail
    with pytest.raises(OSError, match="Input/output"):
        client.write(CONFIG, 4, b"\x06\x00")
    assert "RuntimeError: never mind" in caplog.text


def test_capabilities_are_linked(device: PciDevice, connect: Connect, scratch: Scratch) -> None:
    device.set_interrupts(intx=1, msi=4, msix=5, msix_bar=4)
    vendor = device.add_capability(0x09, b"\x08secret"[:6], writable=b"\0\xff")
    first = device.add_capability(0x0F, bytes(4), writable=b"\0\0\x1f\x80", extended=True)
    second = device.add_capability(0x1B, bytes(4), extended=True, version=2)
    client = connect()
    assert client.read_int(CONFIG, 6, 2) & 0x10
    found = capabilities(client)
    assert found.keys() == {0x10, 0x05, 0x11, 0x09}
    assert all(offset % 4 == 0 for offset in found.values())
    assert found[0x09] == vendor
    client.write(CONFIG, vendor + 2, b"\0Z\0")
    assert client.read(CONFIG, vendor + 2, 6) == b"\x08Zecre"
    assert (first, second) == (0x100, 0x108)
    assert client.read_int(CONFIG, 0x100, 4) == 0x108_1_000F
    assert client.read_int(CONFIG, 0x108, 4) == 0x000_2_001B
    client.write(CONFIG, 0x104, b"\xff" * 4)
    assert client.read_int(CONFIG, 0x104, 4) == 0x801F_0000
    assert client.read_int(CONFIG, found[0x05] + 2, 2) == 0x84
    assert client.read_int(CONFIG, found[0x11] + 2, 2) == 4
    assert client.read_int(CONFIG, found[0x11] + 4, 4) == 4
    assert client.read_int(CONFIG, found[0x11] + 8, 4) == 80 | 4
    assert client.region_info(4).size == 0x1000, "a BAR for the table was made"
    client.write(4, 0, b"table entry")
    assert client.read(4, 0, 11) == b"table entry"


def test_room_for_capabilities_ends(device: PciDevice) -> None:
    for _ in range(4):
        device.add_capability(0x09, bytes(30))
    with pytest.raises(DeviceError, match="no room"):
        device.add_capability(0x09, bytes(30))
    with pytest.raises(DeviceError, match="no room"):
        device.add_capability(0x0B, bytes(0x1000), extended=True)
    with pytest.raises(DeviceError, match="masks"):
        device.add_capability(0x09, b"", writable=b"\1")
    with pytest.raises(DeviceError, match="id 0x100"):
        device.add_capability(0x100, b"")
    with pytest.raises(DeviceError, match="version 16"):
        device.add_capability(1, b"", extended=True, version=16)


@pytest.mark.parametrize("kind", [ResetType.DEVICE, ResetType.FUNCTION_LEVEL])
def test_a_reset_restores_config_space(client: Client, device: PciDevice, kind: ResetType) -> None:
    seen: list[tuple[ResetType, bool]] = []
    device.on_reset = lambda kind: seen.append((kind, device.bus_master))
    initial = bytes(device.config)
    client.write(CONFIG, 4, b"\x06\x04")
    client.write(CONFIG, 0x10, b"\0\0\0\xfe")
    control = capabilities(client)[0x10] + 8
    if kind is ResetType.DEVICE:
        client.reset()
    else:
        assert client.read_int(CONFIG, control - 4, 4) & 1 << 28, "reset is announced"
        client.write(CONFIG, control, b"\x10\x80")
    assert bytes(device.config) == initial
    assert seen == [(kind, False)]


def test_a_failed_reset_is_an_errno(
    client: Client, device: PciDevice, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(kind: ResetType) -> None:
        raise TimeoutError(110, "stuck")

    device.on_reset = fail
    with pytest.raises(OSError, match="timed out"):
        client.reset()
    assert "TimeoutError" in caplog.text


def test_a_held_view_of_config_space_outlives_the_device(
    client: Client, device: PciDevice, caplog: pytest.LogCaptureFixture
) -> None:
    held = device.config[0:4]
    device.close()
    assert "config space is still held" in caplog.text
    assert held.nbytes == 4
    held[0] = 1
    del held
    with pytest.raises(DeviceError, match="closed"):
        _ = device.config
    device.close()


def test_bad_capabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="vectors"):
        msi(3)
    with pytest.raises(ValueError, match="vectors"):
        msix(2049, 0, 0, 0)
    with pytest.raises(ValueError, match="multiples of 8"):
        msix(1, 0, 4, 0x1000)


@given(
    st.lists(
        st.builds(
            Capability,
            id=st.integers(1, 0x14),
            body=st.binary(max_size=40),
            writable=st.just(b""),
            clearable=st.just(b""),
            extended=st.booleans(),
            version=st.integers(0, 15),
        ),
        max_size=12,
    ),
    st.lists(st.tuples(st.integers(0, 0xFF8), st.binary(min_size=1, max_size=8)), max_size=20),
)
def test_no_write_reaches_what_is_read_only(
    added: list[Capability], writes: list[tuple[int, bytes]]
) -> None:
    config = ConfigSpace(memoryview(bytearray(0x1000)))
    placed: list[tuple[int, int]] = []
    for capability in (express(), *added):
        try:
            offset = config.add(capability)
        except DeviceError:
            continue
        header = 4 if capability.extended else 2
        placed.append((offset, offset + header + len(capability.body)))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(placed)))
    config.remember()
    before = bytes(config.data)
    for offset, data in writes:
        config.write(offset, data)
    config.data[0x04:0x06] = before[0x04:0x06]  # command
    config.data[0x0C] = config.data[0x3C] = 0  # cache line size, interrupt line
    (control, _) = placed[0]
    for field in (8, 16):  # device and link control
        config.data[control + field : control + field + 2] = bytes(2)
    assert bytes(config.data) == before
    config.reset()
    assert bytes(config.data) == before
