"""Region accesses: sizes, integers and bytes, and what becomes of exceptions."""

import errno
import logging
import os
from collections.abc import Callable

import pytest

from vfio_user import DeviceError, PciDevice

from .client import Client
from .conftest import Connect
from .scratch import Scratch


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 16, 0x1000])
def test_bytes_of_any_length_go_both_ways(client: Client, scratch: Scratch, length: int) -> None:
    data = bytes(range(1, 256)) * 17
    client.write(0, 0, data[:length])
    assert scratch.memory[: length + 1] == (data[:length] + b"\0")[:0x1000]
    assert client.read(0, 0, length) == data[:length]
    assert scratch.accesses == [("write", 0, length), ("read", 0, length)]


def test_offsets_need_no_alignment(client: Client, scratch: Scratch) -> None:
    client.write(0, 0xFFD, b"abc")
    assert client.read(0, 0xFFB, 5) == b"\0\0abc"


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6, 8, 12])
def test_an_integer_is_little_endian(device: PciDevice, connect: Connect, length: int) -> None:
    largest = (1 << 8 * length) - 2
    device.add_bar(2, 64, read=lambda offset, size: largest, write=lambda offset, data: None)
    assert connect().read(2, 8, length) == largest.to_bytes(length, "little")


@pytest.mark.parametrize("value", [1 << 32, -1, b"12345", b"", "1234", None])
def test_what_does_not_fit_the_access_is_an_error(
    device: PciDevice, connect: Connect, caplog: pytest.LogCaptureFixture, value: int
) -> None:
    device.add_bar(1, 16, read=lambda offset, size: value, write=print, is_64bit=False)
    client = connect()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        client.read(1, 0, 4)
    assert "read from BAR 1 at 0x0, 4 bytes, failed" in caplog.text


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (ValueError("broken model"), errno.EIO),
        (PermissionError(errno.EACCES, "no"), errno.EACCES),
        (OSError("without an errno"), errno.EIO),
        (OSError(0, "errno 0 is success for the library"), errno.EIO),
        (OSError(-5, "negative"), errno.EIO),
    ],
)
def test_an_exception_becomes_an_errno_and_a_traceback(
    client: Client,
    scratch: Scratch,
    caplog: pytest.LogCaptureFixture,
    fault: Exception,
    expected: int,
) -> None:
    scratch.fault = fault
    for access in (lambda: client.read(0, 4, 4), lambda: client.write(0, 4, b"data")):
        caplog.clear()
        with pytest.raises(OSError, match=os.strerror(expected)):
            access()
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR and r.exc_info]
        assert record.exc_info is not None
        assert record.exc_info[1] is fault
        assert "scratch.py" in caplog.text, "the traceback shows where it was raised"
        assert "dev.sock" in record.getMessage()
    scratch.fault = None
    assert client.read(0, 4, 4) == b"\0\0\0\0", "the device goes on"


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_program_reaches_the_caller_of_run(
    client: Client, device: PciDevice, scratch: Scratch, fault: BaseException
) -> None:
    scratch.fault = fault
    client.serve = lambda: None
    client.send(9, (0).to_bytes(8, "little") + (0).to_bytes(4, "little") + b"\4\0\0\0")
    with pytest.raises(type(fault)):
        device.run()
    with pytest.raises(OSError, match="Input/output"):
        client.receive()
    scratch.fault = None
    client.serve = device.run
    assert client.read(0, 0, 1) == b"\0"


def test_accesses_outside_of_a_bar_never_arrive(client: Client, scratch: Scratch) -> None:
    for offset, length in ((0x1000, 1), (0xFFE, 4), (1 << 63, 8)):
        with pytest.raises(OSError, match="Invalid argument"):
            client.read(0, offset, length)
    assert scratch.accesses == []


def test_run_handles_all_that_is_there_up_to_its_limit(
    client: Client, device: PciDevice, scratch: Scratch
) -> None:
    for i in range(10):
        client.post(0, i, bytes((i,)))
    assert device.run(limit=4) == 4
    assert device.run(limit=100) == 6
    assert device.run() == 0
    assert scratch.memory[:10] == bytes(range(10))


def test_the_library_cannot_be_entered_from_a_callback(
    device: PciDevice, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    calls: dict[int, Callable[[], object]] = {0: device.run, 4: device.close, 8: device.attach}
    device.add_bar(0, 16, read=lambda offset, _: bool(calls[offset]()), write=print)
    client = connect()
    for offset in calls:
        with pytest.raises(OSError, match="Input/output"):
            client.read(0, offset, 4)
    assert caplog.text.count("DeviceError") >= 3


def test_bad_bars_are_refused(device: PciDevice, scratch: Scratch) -> None:
    for index, size, wide in (
        (-1, 16, False),
        (6, 16, False),
        (5, 16, True),
        (1, 16, False),  # the upper half of BAR 0
        (2, 24, False),
        (2, 8, False),
        (2, 1 << 32, False),
        (2, 0, False),
    ):
        with pytest.raises(DeviceError):
            device.add_bar(index, size, read=scratch.read, write=scratch.write, is_64bit=wide)
    device.realize()
    with pytest.raises(DeviceError, match="realized"):
        device.add_bar(2, 16, read=scratch.read, write=scratch.write)
