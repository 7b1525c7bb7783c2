"""Attach, disconnect, re-attach, close; socket paths; the log."""

import logging
import os
import select
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vfio_user import ClientLost, DeviceError, PciDevice, SocketBusy, SocketError

from .client import Client, Command
from .conftest import Connect
from .scratch import Scratch


def make(path: Path) -> PciDevice:
    return PciDevice(path, vendor_id=1, device_id=2, class_code=0)


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def readable(device: PciDevice) -> bool:
    return bool(select.select([device], [], [], 0)[0])


def test_a_client_comes_goes_and_another_comes(
    device: PciDevice, scratch: Scratch, connect: Connect
) -> None:
    events: list[str] = []
    assert not device.attached
    device.on_attach = lambda: events.append("attach")
    device.on_disconnect = lambda: events.append("disconnect")
    for _ in range(3):
        client = connect()
        client.write(0, 0, b"kept by the device")
        assert not readable(device)
        client.close()
        assert readable(device), "a disconnect shows on the poll descriptor"
        with pytest.raises(ClientLost):
            device.run()
        assert not readable(device)
    assert events == ["attach", "disconnect"] * 3
    with pytest.raises(DeviceError, match="no client"):
        device.run()


def test_attach_does_not_block(device: PciDevice, scratch: Scratch) -> None:
    with pytest.raises(DeviceError, match="realized"):
        device.attach()
    device.realize()
    assert not device.attach()
    with Client(device.socket_path) as client:
        assert readable(device)
        client.say_version()
        assert device.attach()
        with pytest.raises(DeviceError, match="already"):
            device.attach()
        assert not readable(device)


def test_a_client_that_speaks_something_else_is_sent_away(
    device: PciDevice, scratch: Scratch, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    device.realize()
    with Client(device.socket_path) as client:
        client.socket.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert not device.attach()
    with Client(device.socket_path) as client:
        client.say_version(major=7)
        assert not device.attach()
        with pytest.raises(OSError, match="Invalid argument"):
            client.receive()
    Client(device.socket_path).close()
    assert not device.attach()
    assert caplog.text.count("a client failed to attach") == 3
    with Client(device.socket_path, device.run) as client:
        client.say_version()
        assert device.attach()
        client.receive()
        assert client.read(0, 0, 2) == b"\0\0"


def test_a_client_killed_within_a_message(
    client: Client, device: PciDevice, scratch: Scratch, connect: Connect
) -> None:
    client.socket.sendall(b"\0\0\x09")
    client.close()
    with pytest.raises(ClientLost):
        device.run()
    assert connect().read(0, 0, 1) == b"\0"


def test_close_removes_the_socket_and_tells(client: Client, device: PciDevice) -> None:
    lost: list[bool] = []
    device.on_disconnect = lambda: lost.append(True)
    assert device.socket_path.exists()
    device.close()
    device.close()
    assert lost == [True]
    assert not device.socket_path.exists()
    with pytest.raises(ConnectionError):
        client.receive()
    assert not device.bus_master
    for use in (device.fileno, device.realize, device.set_interrupts):
        with pytest.raises(DeviceError, match="closed"):
            use()


def test_a_request_that_close_leaves_unanswered_ends_in_end_of_file(
    client: Client, device: PciDevice
) -> None:
    client.send(Command.DEVICE_RESET)
    device.close()
    assert client.socket.recv(1) == b"", "and not in a connection reset"
    with pytest.raises(BrokenPipeError):
        client.send(Command.DEVICE_RESET)


def test_descriptors_do_not_pass_to_children(client: Client, device: PciDevice) -> None:
    assert not os.get_inheritable(device.fileno())


def test_nothing_is_left_open(directory: Path) -> None:
    before = open_descriptors()
    with make(directory / "a.sock") as device:
        device.realize()
        with Client(device.socket_path) as client:
            client.say_version()
            assert device.attach()
    assert open_descriptors() == before


def test_a_live_server_is_not_disturbed(client: Client, device: PciDevice) -> None:
    with pytest.raises(SocketBusy, match=r"another server is listening on .*dev\.sock"):
        make(device.socket_path)
    assert client.read(0, 0, 1) == b"\0"
    assert device.socket_path.exists()


def test_a_stale_socket_is_replaced(directory: Path) -> None:
    path = directory / "stale.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.listen()
    left.close()
    with make(path) as device:
        device.realize()
        assert not device.attach()
        assert stat.S_ISSOCK(path.stat().st_mode)


def test_the_socket_of_another_server_is_not_removed(directory: Path) -> None:
    path = directory / "taken.sock"
    first = make(path)
    path.unlink()
    with make(path):
        first.close()
        assert path.exists()


def test_unusable_paths_are_named(directory: Path) -> None:
    fits = directory / ("x" * (107 - len(str(directory)) - 1))
    make(fits).close()
    with pytest.raises(SocketError, match="108 bytes is longer than the 107"):
        make(fits.with_name(fits.name + "x"))
    with pytest.raises(SocketError, match="no such directory"):
        make(directory / "none" / "a.sock")
    with pytest.raises(SocketError, match="zero byte"):
        make(directory / "a\0b")
    file = directory / "file"
    file.write_text("precious")
    with pytest.raises(SocketError, match="not a socket"):
        make(file)
    assert file.read_text() == "precious"


def test_the_library_logs_into_logging(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="vfio_user"), make(directory / "a.sock") as device:
        device.realize()
        device.library.call.vfu_log(device._context.pointer(), 4, b"watch out")
        device.library.call.vfu_log(device._context.pointer(), 7, b"\xff details")
    records = {r.getMessage(): r.levelno for r in caplog.records}
    assert records["a.sock: watch out"] == logging.WARNING
    assert records["a.sock: � details"] == logging.DEBUG


def test_quiet_when_the_logger_is(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="vfio_user"), make(directory / "a.sock") as device:
        device.library.call.vfu_log(device._context.pointer(), 4, b"not shown")
    assert "not shown" not in caplog.text


def test_a_killed_server_leaves_a_socket_that_the_next_takes(directory: Path) -> None:
    path = directory / "k.sock"
    program = (
        "import sys, vfio_user\n"
        "d = vfio_user.PciDevice(sys.argv[1], vendor_id=1, device_id=1, class_code=0)\n"
        "d.realize(); print('up', flush=True); sys.stdin.read()\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        with pytest.raises(SocketBusy):
            make(path)
        server.kill()
    assert path.exists()
    make(path).close()
    assert not path.exists()
