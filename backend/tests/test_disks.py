"""Images as block stores: what their names say, and what a real `qemu-nbd` makes of them."""

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from threading import Event

import pytest

from tests.disk_tools import flush, qemu_img
from viommu.disks import ImageFormat, image_format, open_disk
from viommu.disks.nbd import NbdDisk, NbdError
from viommu.disks.qemu_nbd import served
from viommu.disks.raw_file import RawFile
from viommu.endpoints.nvme.store import BlockStore
from viommu.lab.errors import DiskError
from viommu.lab.serving import Serving
from viommu.lab.user_disk import UserDisk

MIB = 1 << 20
SIZE = 80 * MIB
QCOW2_HEADER = b"QFI\xfb" + bytes(508)


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", path, str(SIZE))
    return path


def content(store: BlockStore, offset: int, size: int) -> bytes:
    data = bytearray(size)
    store.read(offset, memoryview(data))
    return bytes(data)


# Which format


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.qcow2", "qcow2"), ("a.QCOW2", "qcow2"), ("a.raw", "raw"), ("a.img", "raw"), ("a", "raw")],
)
def test_the_name_says_what_it_is(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    assert image_format(path) == kind, "also before it is there"
    path.write_bytes(bytes(512))
    assert image_format(path) == kind


def test_what_a_guest_writes_does_not_say_it(tmp_path: Path) -> None:
    """A qcow2 header in a raw image could name any file of the host as what is below it."""
    path = tmp_path / "guest.raw"
    path.write_bytes(QCOW2_HEADER)
    with open_disk(path, None) as store:
        assert content(store, 0, 512) == QCOW2_HEADER


def test_a_name_and_a_content_that_disagree(tmp_path: Path) -> None:
    path = tmp_path / "cloud.img"
    path.write_bytes(QCOW2_HEADER)
    with pytest.raises(DiskError, match=r"cloud\.img begins like a qcow2 image, .*: give its form"):
        image_format(path)
    with open_disk(path, None, ImageFormat.RAW) as store:
        assert store.size == 512


# qemu-nbd


def test_a_qcow2_image(qcow2: Path) -> None:
    data = Random(1).randbytes(40 * MIB)  # more than goes into one request
    with open_disk(qcow2, None) as store:
        assert store.size == SIZE
        store.write(MIB + 512, memoryview(data))
        store.zero(2 * MIB, MIB)
        flush(store)
        assert content(store, MIB, 512) == bytes(512)
    expected = bytearray(data)
    expected[MIB - 512 : 2 * MIB - 512] = bytes(MIB)
    with open_disk(qcow2, None) as store:
        assert content(store, MIB + 512, len(data)) == expected
    assert "No errors were found" in qemu_img("check", qcow2)


@pytest.mark.parametrize("kind", ImageFormat)
def test_a_snapshot(tmp_path: Path, kind: ImageFormat) -> None:
    path = tmp_path / f"disk.{kind}"
    qemu_img("create", "-f", str(kind), path, str(MIB))
    before = path.read_bytes()
    with open_disk(path, None, snapshot=True) as store:
        store.write(4096, memoryview(b"x" * 512))
        flush(store)
        assert content(store, 4096, 512) == b"x" * 512
    assert path.read_bytes() == before


def test_an_error_of_the_image(qcow2: Path) -> None:
    with open_disk(qcow2, None) as store:
        with pytest.raises(OSError, match="Invalid argument"):
            content(store, SIZE, 512)
        assert content(store, 0, 512) == bytes(512), "and it goes on"


def test_an_image_that_is_no_qcow2(tmp_path: Path) -> None:
    path = tmp_path / "junk.qcow2"
    path.write_bytes(b"junk" * 1000)
    with (
        pytest.raises(
            DiskError, match=r"junk\.qcow2 cannot be opened by qemu-nbd: Image is not in"
        ),
        open_disk(path, None),
    ):
        pass


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    for name in ("none.qcow2", "none.raw"):
        with pytest.raises(FileNotFoundError), open_disk(tmp_path / name, None):
            pass


def test_no_qemu_nbd(qcow2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("VIOMMU_CACHE", str(tmp_path))
    with (
        pytest.raises(DiskError, match="needs qemu-nbd: install qemu-utils, or run viommu setup"),
        open_disk(qcow2, None),
    ):
        pass


def test_qemu_nbd_of_the_host_comes_first(
    qcow2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "qemu-nbd"
    program.write_text("#!/bin/sh\necho 'qemu-nbd: that of the host' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with (
        pytest.raises(DiskError, match="cannot be opened by qemu-nbd: that of the host"),
        open_disk(qcow2, None),
    ):
        pass


def test_it_dies(qcow2: Path) -> None:
    """What the guest asks for fails from then on."""
    with served(qcow2, "qcow2") as store:
        (child,) = children(os.getpid())
        os.kill(child, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                flush(store)


def test_a_flush_keeps_nobody_waiting(qcow2: Path) -> None:
    woken = Event()
    with served(qcow2, "qcow2", wake=woken.set) as store:
        (child,) = children(os.getpid())
        os.kill(child, signal.SIGSTOP)
        flushing = store.flush()
        awaited = next(flushing)
        assert awaited is not None
        assert awaited.waiting
        os.kill(child, signal.SIGCONT)
        assert woken.wait(30)
        assert not awaited.waiting
        assert list(flushing) == []


# Who else has it


@pytest.mark.parametrize("kind", ImageFormat)
def test_an_image_belongs_to_one_server(tmp_path: Path, qcow2: Path, kind: ImageFormat) -> None:
    path = {ImageFormat.QCOW2: qcow2, ImageFormat.RAW: tmp_path / "disk.raw"}[kind]
    path.touch()
    with (
        open_disk(path, None),
        pytest.raises((OSError, DiskError), match="in use by another program"),
        open_disk(path, None),
    ):
        pass
    with open_disk(path, None):
        pass


def children(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for path in tasks for child in path.read_text().split()}


def test_a_server_that_is_killed_leaves_the_image_to_the_next(qcow2: Path) -> None:
    with Serving("x86_64-nvme", disk=UserDisk(qcow2)) as serving:
        (child,) = children(serving.pid)
        os.kill(serving.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{child}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with open_disk(qcow2, None):
        pass
    assert "No errors were found" in qemu_img("check", qcow2)


def test_a_raw_image_that_a_qemu_has(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB))
    with served(raw, "raw"), pytest.raises(OSError, match="in use by another program"):
        RawFile(raw)
    with open_disk(raw, None), pytest.raises(DiskError, match="in use"), served(raw, "raw"):
        pass


# A server that is none


GREETING = b"NBDMAGICIHAVEOPT\0\x03"
INFORMED = struct.pack(">QIII", 0x3_E889_0455_65A9, 7, 3, 12) + struct.pack(">HQ", 0, MIB)
AGREED = struct.pack(">QIII", 0x3_E889_0455_65A9, 7, 1, 0)
WILLING = [GREETING, INFORMED, b"\x01\x41", AGREED]


@contextmanager
def speaker(*said: bytes) -> Iterator[Callable[[], socket.socket]]:
    """The other end of each connection says this, whatever it is told, and hangs up."""
    with ExitStack() as stack:

        def connect() -> socket.socket:
            ours, theirs = map(stack.enter_context, socket.socketpair())
            theirs.sendall(b"".join(said))
            theirs.shutdown(socket.SHUT_WR)
            return ours

        yield connect


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([b"SSH-2.0-what is this"], "no NBD server"),
        ([GREETING[:-1] + b"\0"], "no NBD server"),
        ([GREETING, struct.pack(">QIII", 0x3_E889_0455_65A9, 7, 0x8000_0006, 4), b"none"], "none"),
        ([GREETING, AGREED], "offers no disk"),
        ([GREETING, INFORMED, b"\x01\x43", AGREED], "offers no disk"),  # read-only
        ([GREETING, INFORMED, b"\x01\x01", AGREED], "offers no disk"),  # without zeroes
        ([GREETING, INFORMED, b"\x00\x41", AGREED], "QEMU 7.1"),  # for one connection
    ],
)
def test_a_server_that_will_not_do(said: list[bytes], why: str) -> None:
    with speaker(*said) as connect, pytest.raises(NbdError, match=why):
        NbdDisk(connect)


REPLY = struct.Struct(">IIQ")


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", ConnectionResetError),
        (REPLY.pack(0x6744_6698, 0, 2), NbdError),  # to another request
        (REPLY.pack(0x1234_5678, 0, 1), NbdError),
        (REPLY.pack(0x6744_6698, 28, 1), OSError),
    ],
)
def test_a_reply_that_is_none(reply: bytes, error: type[OSError]) -> None:
    with speaker(*WILLING, reply) as connect, NbdDisk(connect) as disk:
        assert disk.size == MIB
        for ask in (flush, lambda disk: content(disk, 0, 512)):
            with pytest.raises(error) as raised:
                ask(disk)
            if reply[4:8] == b"\0\0\0\x1c":
                assert raised.value.strerror == "No space left on device"
