"""Interrupts arrive at the eventfds of the client."""

import os
from collections.abc import Iterator

import pytest

from vfio_user import DeviceError, PciDevice

from .client import CONFIG
from .conftest import Connect
from .scratch import Scratch

INTX, MSI, MSIX = range(3)


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(4)]
    yield made
    for fd in made:
        os.close(fd)


def counts(eventfds: list[int]) -> list[int]:
    found = []
    for fd in eventfds:
        try:
            found.append(os.eventfd_read(fd))
        except BlockingIOError:
            found.append(0)
    return found


@pytest.mark.parametrize(("index", "vectors"), [(INTX, 1), (MSI, 4), (MSIX, 3)])
def test_each_kind(
    device: PciDevice,
    connect: Connect,
    scratch: Scratch,
    eventfds: list[int],
    index: int,
    vectors: int,
) -> None:
    device.set_interrupts(intx=1, msi=4, msix=3, msix_bar=5)
    client = connect()
    assert client.read_int(CONFIG, 0x3D, 1) == 1, "INTA#"
    assert [client.irq_count(i) for i in (INTX, MSI, MSIX)] == [1, 4, 3]
    client.set_eventfds(index, eventfds[:vectors])
    assert device.trigger_interrupt(vectors - 1)
    assert device.trigger_interrupt(vectors - 1)
    assert device.trigger_interrupt()
    expected = [0, 0, 0, 0]
    expected[vectors - 1] += 2
    expected[0] += 1
    assert counts(eventfds) == expected


def test_the_client_says_when_it_lets_go_of_the_pin(
    device: PciDevice, connect: Connect, eventfds: list[int]
) -> None:
    device.set_interrupts(intx=1)
    released: list[bool] = []
    device.on_pin_released = lambda: released.append(True)
    client = connect()
    client.set_eventfds(INTX, eventfds[:1])
    client.mask(INTX, True)
    assert released == []
    client.mask(INTX, False)
    assert released == [True]


@pytest.mark.parametrize("writes", [False, True])
def test_the_pin_shows_in_the_status_register_until_the_guest_looks(
    device: PciDevice, connect: Connect, scratch: Scratch, eventfds: list[int], writes: bool
) -> None:
    device.set_interrupts(intx=1)
    client = connect()
    client.set_eventfds(INTX, eventfds[:1])
    before = client.read_int(CONFIG, 0x06, 2)
    assert not before & 1 << 3
    for _ in range(2):
        device.trigger_interrupt()
        assert client.read_int(CONFIG, 0x06, 2) == before | 1 << 3
        client.write(CONFIG, 0x06, b"\xff\xff")  # not for the client to clear
        assert client.read_int(CONFIG, 0x06, 2) & 1 << 3
        if writes:
            client.write(0, 0, bytes(4))
        else:
            client.read_int(0, 0, 4)
        assert client.read_int(CONFIG, 0x06, 2) == before


def test_nobody_listens(
    device: PciDevice,
    connect: Connect,
    scratch: Scratch,
    eventfds: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    device.set_interrupts(intx=1)
    client = connect()
    assert not device.trigger_interrupt()
    client.set_eventfds(INTX, eventfds[:1])
    assert device.trigger_interrupt()
    assert not caplog.records, "an interrupt that is not enabled is no error"


def test_the_eventfds_of_a_lost_client_are_forgotten(
    device: PciDevice, connect: Connect, scratch: Scratch, eventfds: list[int]
) -> None:
    device.set_interrupts(intx=1)
    first = connect()
    first.set_eventfds(INTX, eventfds[:1])
    first.close()
    with pytest.raises(Exception, match="closed its connection"):
        device.run()
    connect()
    assert not device.trigger_interrupt()
    assert counts(eventfds) == [0] * 4


def test_what_was_not_declared_is_refused(device: PciDevice, scratch: Scratch) -> None:
    with pytest.raises(DeviceError, match="no interrupt 0"):
        device.trigger_interrupt()  # before realize this would end the process
    for wrong in ({"intx": 2}, {"msi": 5}, {"msix": 8}, {"msix": 2049, "msix_bar": 0}):
        with pytest.raises(DeviceError):
            device.set_interrupts(**wrong)
    device.set_interrupts(msi=2)
    with pytest.raises(DeviceError, match="declared"):
        device.set_interrupts(intx=1)
    device.realize()
    for vector in (-1, 2):
        with pytest.raises(DeviceError, match="no interrupt"):
            device.trigger_interrupt(vector)
    assert not device.trigger_interrupt(1), "no client yet"


def test_an_msix_table_has_to_fit_its_bar(device: PciDevice, scratch: Scratch) -> None:
    device.set_interrupts(msix=300, msix_bar=0)
    with pytest.raises(DeviceError, match="too small for MSI-X"):
        device.realize()
