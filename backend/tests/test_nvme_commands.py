"""What the commands of the NVMe controller do, and how they fail."""

import random
import struct
from pathlib import Path

import pytest

from tests.nvme_rig import (
    BLOCK,
    COMPARE,
    DATA,
    DATASET,
    FLUSH,
    GET_FEATURES,
    GET_LOG,
    IDENTIFY,
    PAGE,
    READ,
    SET_FEATURES,
    WRITE,
    WRITE_ZEROES,
    NvmeRig,
)
from viommu.disks.raw_file import RawFile
from viommu.endpoints.nvme.store import RamDisk
from viommu.endpoints.transfers import Steps

SIZE = 1 << 20
BLOCKS = SIZE // BLOCK
ALL = 0xFFFF_FFFF
LIST = DATA + 0x8_0000


@pytest.fixture
def rig() -> NvmeRig:
    rig = NvmeRig()
    rig.store.write(0, memoryview(random.Random(1).randbytes(SIZE)))
    return rig


def stored(rig: NvmeRig, offset: int = 0, size: int = SIZE) -> bytes:
    data = bytearray(size)
    rig.store.read(offset, memoryview(data))
    return bytes(data)


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


# Identify


def identify(rig: NvmeRig, kind: int, nsid: int = 0) -> bytes:
    assert rig.admin.do(IDENTIFY, kind, nsid=nsid, prp1=DATA).status == 0
    return rig.read(DATA, PAGE)


def test_the_controller_says_what_it_is(rig: NvmeRig) -> None:
    data = identify(rig, 1)
    assert data[0:2] == b"\x34\x12"
    assert data[4:24] == b"nvme".ljust(20)
    assert data[24:64] == b"viommu NVMe".ljust(40)
    assert (data[77], data[78:84]) == (7, b"\0\0\x00\x04\x01\x00")
    assert data[111] == 1
    assert data[512:514] == b"\x66\x44"
    assert int.from_bytes(data[516:520], "little") == 1
    assert int.from_bytes(data[520:522], "little") == 0b11101
    assert data[525] & 1, "it has a volatile write cache"
    assert data[256:258] == b"\0\0", "no optional admin command"
    assert data[536:540] == b"\x01\0\x05\0", (
        "SGLs of bytes, with bit buckets, and longer than the data"
    )
    assert data[768:].startswith(b"nqn.2014-08.org.nvmexpress:")


def test_the_namespace_says_what_it_is(rig: NvmeRig) -> None:
    data = identify(rig, 0, nsid=1)
    assert struct.unpack_from("<QQQ", data) == (BLOCKS,) * 3
    assert (data[25], data[26], data[128:132]) == (0, 0, b"\0\0\x09\0")
    descriptors = identify(rig, 3, nsid=1)
    assert descriptors[:4] == b"\x02\x10\0\0"
    assert descriptors[4:20] == data[104:120]
    assert not any(descriptors[20:])


def test_the_list_of_namespaces(rig: NvmeRig) -> None:
    assert identify(rig, 2, nsid=0) == (1).to_bytes(PAGE, "little")
    assert identify(rig, 2, nsid=1) == bytes(PAGE)


@pytest.mark.parametrize(
    ("kind", "nsid", "status"),
    [(0, 0, 0x0B), (0, 2, 0x0B), (0, ALL, 0x0B), (2, ALL - 1, 0x0B), (3, 9, 0x0B), (5, 1, 2), (0xFF, 1, 2)],
)  # fmt: skip
def test_identify_refuses(rig: NvmeRig, kind: int, nsid: int, status: int) -> None:
    assert rig.admin.do(IDENTIFY, kind, nsid=nsid, prp1=DATA).status == status


def test_identify_in_two_pages(rig: NvmeRig) -> None:
    whole = identify(rig, 1)
    place = DATA + 0x2_0000
    assert rig.admin.do(IDENTIFY, 1, prp1=place + 0x800, prp2=place + 0x5000).status == 0
    assert rig.read(place + 0x800, 0x800) + rig.read(place + 0x5000, 0x800) == whole


# Features and log pages


@pytest.mark.parametrize(
    ("feature", "default", "written", "read"),
    [
        (1, 3, 0x0102_0305, 0x0102_0305),
        (2, 0, 0, 0),
        (4, 343, 350, 350),
        (5, 0, 0x1_0007, 7),
        (6, 1, 0, 0),
        (8, 0, 0x0102, 0x0102),
        (9, 5, 0x1_0005, 0x1_0005),
        (0xA, 0, 1, 1),
        (0xB, 0, 0xFFFF, 0x1FF),
    ],
)
def test_features(rig: NvmeRig, feature: int, default: int, written: int, read: int) -> None:
    index = 5 if feature == 9 else 0
    assert rig.admin.do(GET_FEATURES, feature, index).result == default
    assert rig.admin.do(SET_FEATURES, feature, written).status == 0
    assert rig.admin.do(GET_FEATURES, feature, index).result == read
    assert rig.admin.do(GET_FEATURES, feature | 1 << 8, index).result == default
    assert rig.admin.do(GET_FEATURES, feature | 2 << 8, index).result == default
    changeable = rig.admin.do(GET_FEATURES, feature | 3 << 8, index).result
    assert changeable == (0 if feature == 2 else 4)
    assert rig.admin.do(SET_FEATURES, feature | 1 << 31, written).status == 0x10D


def test_the_number_of_queues(rig: NvmeRig) -> None:
    assert rig.admin.do(SET_FEATURES, 7, 0).result == 0xF_000F
    assert rig.admin.do(GET_FEATURES, 7).result == 0xF_000F
    assert rig.admin.do(SET_FEATURES, 7, 0xFFFF).status == 2
    rig.io()
    assert rig.admin.do(SET_FEATURES, 7, 0).status == 0x0C


@pytest.mark.parametrize(
    ("opcode", "dwords"),
    [
        (GET_FEATURES, (0x7F,)),
        (SET_FEATURES, (0x0C,)),
        (GET_FEATURES, (6 | 4 << 8,)),
        (SET_FEATURES, (2, 1)),
        (SET_FEATURES, (9, 17)),
        (SET_FEATURES, (4, 3 << 16)),
    ],
)
def test_features_that_there_are_not(rig: NvmeRig, opcode: int, dwords: tuple[int, ...]) -> None:
    completion = rig.admin.do(opcode, *dwords)
    assert (completion.status, completion.dnr) == (2, True)


def log(rig: NvmeRig, log_id: int, size: int = 512, offset: int = 0) -> bytes:
    done = rig.admin.do(GET_LOG, log_id | (size // 4 - 1) << 16, 0, offset, prp1=DATA)
    assert done.status == 0
    return rig.read(DATA, size)


def test_errors_are_logged(rig: NvmeRig) -> None:
    queue = rig.io()
    assert log(rig, 1, 64) == bytes(64)
    queue.do(READ, BLOCKS, 0, 0, nsid=1, prp1=DATA)
    queue.do(0x7F, nsid=1)
    newest = log(rig, 1, 128)
    count, sq_id, cid, status = struct.unpack_from("<QHHH", newest)
    assert (count, sq_id, cid, status >> 1 & 0x7FF) == (2, 1, 1, 1)
    assert struct.unpack_from("<QHHH", newest, 64) == (1, 1, 0, 0x80 << 1)
    assert log(rig, 1, 64, offset=64) == newest[64:]


def test_the_health_log_counts(rig: NvmeRig) -> None:
    queue = rig.io()
    queue.do(READ, 0, 0, 7, nsid=1, prp1=DATA)
    queue.do(WRITE, 0, 0, 7, nsid=1, prp1=DATA)
    assert queue.do(COMPARE, 0, 0, 7, nsid=1, prp1=DATA).status == 0
    queue.do(0x7F, nsid=1)
    data = log(rig, 2)
    counts = [int.from_bytes(data[at : at + 16], "little") for at in (32, 48, 64, 80, 160, 176)]
    assert counts == [1, 1, 2, 1, 0, 1]
    assert int.from_bytes(data[1:3], "little") == 300
    assert data[0] == 0, "nothing to warn of"


def test_the_firmware_log(rig: NvmeRig) -> None:
    data = log(rig, 3)
    assert (data[0], data[8:16]) == (1, b"1.0".ljust(8))


def test_no_namespace_has_changed(rig: NvmeRig) -> None:
    assert log(rig, 4, 4096) == bytes(4096)
    assert rig.admin.do(IDENTIFY, 1, prp1=DATA).status == 0
    assert int.from_bytes(rig.read(DATA + 92, 4), "little") == 1 << 8, "and events would tell of it"


@pytest.mark.parametrize(
    ("dwords", "status"), [((0x7F | 1 << 16,), 0x109), ((2, 0, 2), 2), ((2, 0, 516), 2)]
)
def test_logs_that_there_are_not(rig: NvmeRig, dwords: tuple[int, ...], status: int) -> None:
    assert rig.admin.do(GET_LOG, *dwords, prp1=DATA).status == status


@pytest.mark.parametrize("opcode", [0x03, 0x0D, 0x10, 0x18, 0x80, 0x81, 0xC0])
def test_other_admin_commands(rig: NvmeRig, opcode: int) -> None:
    completion = rig.admin.do(opcode)
    assert (completion.status, completion.dnr) == (1, True)


# Data


@pytest.mark.parametrize(
    ("first", "blocks", "offset"),
    [(0, 1, 0), (3, 8, 0), (5, 8, 0x200), (0, 8, 0xE04), (7, 17, 0), (8, 64, 0xFFC), (100, 1024, 0)],
)  # fmt: skip
def test_data_in_pages_anywhere(rig: NvmeRig, first: int, blocks: int, offset: int) -> None:
    """Pages in any order, and a first one with an offset: what is read is what is there, and the same written."""
    queue = rig.io()
    size = blocks * BLOCK
    pages = [DATA + 0x10_0000 + PAGE * number for number in range(-(-(offset + size) // PAGE))]
    random.Random(first).shuffle(pages)
    rig.write(LIST, words(*pages[1:]))
    prp1, prp2 = pages[0] + offset, LIST if len(pages) > 2 else (*pages, 0)[1]

    def data() -> bytes:
        whole = b"".join(rig.read(page, PAGE) for page in pages)
        return whole[offset : offset + size]

    assert queue.do(READ, first, 0, blocks - 1, nsid=1, prp1=prp1, prp2=prp2).status == 0
    assert data() == stored(rig, first * BLOCK, size)
    rest = stored(rig)
    for page in pages:
        rig.write(page, random.Random(page).randbytes(PAGE))
    written = data()
    assert queue.do(WRITE, first, 0, blocks - 1, nsid=1, prp1=prp1, prp2=prp2).status == 0
    end = first * BLOCK + size
    assert stored(rig) == rest[: first * BLOCK] + written + rest[end:]


def test_lists_that_lead_to_lists(rig: NvmeRig) -> None:
    queue = rig.io()
    pages = [DATA + 0x10_0000 + 2 * PAGE * number for number in range(9)]
    # Room for three entries, of which the last one leads on.
    first, second = LIST + PAGE - 24, LIST + PAGE * 3
    rig.write(first, words(pages[1], pages[2], second))
    rig.write(second, words(*pages[3:]))
    done = queue.do(READ, 0, 0, 9 * 8 - 1, nsid=1, prp1=pages[0], prp2=first)
    assert done.status == 0
    assert b"".join(rig.read(page, PAGE) for page in pages) == stored(rig, 0, 9 * PAGE)
    rig.write(first + 16, words(second + 8))
    done = queue.do(READ, 0, 0, 9 * 8 - 1, nsid=1, prp1=pages[0], prp2=first)
    assert (done.status, done.dnr) == (0x13, True), "the next list begins with its page"


def test_adjacent_pages_move_at_once(rig: NvmeRig) -> None:
    queue = rig.io()
    rig.write(LIST, words(*(DATA + PAGE * number for number in range(1, 32))))
    rig.port.seen.clear()
    assert queue.do(READ, 0, 0, 255, nsid=1, prp1=DATA, prp2=LIST).status == 0
    moved = [(iova, size) for iova, size, write, *_ in rig.port.seen if write]
    assert moved == [(DATA, 32 * PAGE), (queue.cq, 16)]


@pytest.mark.parametrize(
    ("prp1", "prp2", "blocks", "status"),
    [
        (DATA + 2, 0, 1, 0x13),
        (DATA, DATA + 0x1008, 16, 0x13),
        (DATA, LIST + 4, 24, 0x13),
        (DATA, LIST, 24, 0x13),
        (1 << 40, 0, 1, 0x04),
        (DATA, 1 << 40, 16, 0x04),
        (DATA, 1 << 40, 24, 0x04),
        ((1 << 64) - 512, 0, 1, 0x04),
    ],
)
@pytest.mark.parametrize("opcode", [READ, WRITE])
def test_data_that_cannot_be_reached(
    rig: NvmeRig, opcode: int, prp1: int, prp2: int, blocks: int, status: int
) -> None:
    queue = rig.io()
    rig.write(LIST, words(DATA + 4, DATA))
    before = stored(rig)
    completion = queue.do(opcode, 0, 0, blocks - 1, nsid=1, prp1=prp1, prp2=prp2)
    assert (completion.status, completion.dnr) == (status, status != 4)
    assert stored(rig) == before
    assert rig.port.in_flight == 0


@pytest.mark.parametrize("opcode", [READ, WRITE, COMPARE, WRITE_ZEROES])
@pytest.mark.parametrize(("first", "blocks"), [(BLOCKS, 1), (BLOCKS - 1, 2), ((1 << 64) - 1, 1)])
def test_blocks_beyond_the_end(rig: NvmeRig, opcode: int, first: int, blocks: int) -> None:
    queue, before = rig.io(), stored(rig)
    done = queue.do(opcode, first & ALL, first >> 32, blocks - 1, nsid=1, prp1=DATA, prp2=DATA)
    assert (done.status, done.dnr) == (0x80, True)
    assert stored(rig) == before


def test_what_a_command_cannot_say(rig: NvmeRig) -> None:
    queue = rig.io()
    assert queue.do(READ, 0, 0, 1024, nsid=1, prp1=DATA, prp2=LIST).status == 2, "more than MDTS"
    assert queue.do(READ, 0, 0, 0, nsid=2, prp1=DATA).status == 0x0B
    assert queue.do(READ, 0, 0, 0, nsid=ALL, prp1=DATA).status == 0x0B
    assert queue.do(FLUSH, nsid=ALL).status == 0
    assert queue.do(FLUSH, nsid=0).status == 0x0B
    for flags in (0x80, 0xC0, 0x01, 0x41):  # an SGL for metadata, reserved, and fused
        cid = queue.put(bytes((READ, flags)) + bytes(62))
        queue.ring()
        rig.drain()
        (completion,) = queue.completions()
        assert (completion.command_id, completion.status) == (cid, 2)
    for opcode in (0x04, 0x0D, 0x7F, 0xFF):
        assert queue.do(opcode, nsid=1).status == 1


def test_compare(rig: NvmeRig) -> None:
    queue = rig.io()
    rig.write(DATA, stored(rig, 0, 2 * BLOCK))
    assert queue.do(COMPARE, 0, 0, 1, nsid=1, prp1=DATA).status == 0
    rig.write(DATA + 700, bytes([rig.read(DATA + 700, 1)[0] ^ 0x80]))
    assert queue.do(COMPARE, 0, 0, 1, nsid=1, prp1=DATA).status == 0x285


def test_write_zeroes_and_deallocate(rig: NvmeRig) -> None:
    queue, before = rig.io(), stored(rig)
    assert queue.do(WRITE_ZEROES, 4, 0, 1, nsid=1).status == 0
    ranges = struct.pack("<IIQIIQ", 0, 3, 10, 0, 1, BLOCKS - 1)
    rig.write(DATA, ranges)
    assert queue.do(DATASET, 1, 1, nsid=1, prp1=DATA).status == 0, "a hint alone"
    assert stored(rig, 10 * BLOCK, BLOCK) == before[10 * BLOCK : 11 * BLOCK]
    assert queue.do(DATASET, 1, 4, nsid=1, prp1=DATA).status == 0
    expected = bytearray(before)
    for first, blocks in ((4, 2), (10, 3), (BLOCKS - 1, 1)):
        expected[first * BLOCK : (first + blocks) * BLOCK] = bytes(blocks * BLOCK)
    assert stored(rig) == bytes(expected)
    rig.write(DATA, struct.pack("<IIQ", 0, 2, BLOCKS - 1))
    assert queue.do(DATASET, 0, 4, nsid=1, prp1=DATA).status == 0x80


class Flaky(RamDisk):
    """Blocks that can be lost, and a count of flushes."""

    broken = False
    flushes = 0
    flushed: tuple[int, int | None] = 0, 0

    def read(self, offset: int, buffer: memoryview) -> None:
        if self.broken:
            raise OSError("gone")
        super().read(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        if self.broken:
            raise OSError("gone")
        super().write(offset, data)

    def flush(self, offset: int = 0, size: int | None = None) -> Steps:
        yield None
        self.flushes += 1
        self.flushed = offset, size


def test_blocks_that_are_lost() -> None:
    store = Flaky(SIZE)
    rig = NvmeRig(store)
    queue = rig.io()
    store.broken = True
    assert queue.do(READ, 0, 0, 0, nsid=1, prp1=DATA).status == 0x281
    assert queue.do(WRITE, 0, 0, 0, nsid=1, prp1=DATA).status == 0x280
    assert queue.do(COMPARE, 0, 0, 0, nsid=1, prp1=DATA).status == 0x281
    assert int.from_bytes(log(rig, 2)[160:176], "little") == 3


def test_when_a_write_lasts() -> None:
    store = Flaky(SIZE)
    rig = NvmeRig(store)
    queue = rig.io()
    queue.do(WRITE, 0, 0, 0, nsid=1, prp1=DATA)
    assert store.flushes == 0
    queue.do(WRITE, 2, 0, 1 << 30, nsid=1, prp1=DATA)
    assert store.flushes == 1, "force unit access"
    assert store.flushed == (2 * BLOCK, BLOCK), "of what it wrote alone"
    queue.do(FLUSH, nsid=1)
    assert store.flushes == 2
    assert store.flushed == (0, None)
    rig.admin.do(SET_FEATURES, 6, 0)
    queue.do(WRITE, 0, 0, 0, nsid=1, prp1=DATA)
    assert store.flushes == 4, "the write cache is off: at once, and with each write"
    assert store.flushed == (0, None)


def test_a_raw_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    store = RawFile(path, SIZE)
    rig = NvmeRig(store)
    assert path.stat().st_size == SIZE
    queue = rig.io()
    rig.write(DATA, b"\xa5" * PAGE)
    assert queue.do(WRITE, 8, 0, 7, nsid=1, prp1=DATA).status == 0
    queue.do_later(FLUSH, nsid=1)
    while rig.nvme.tasks:  # it is flushed elsewhere
        rig.drain()
    assert [each.status for each in queue.completions()] == [0]
    assert path.read_bytes()[8 * BLOCK : 16 * BLOCK] == b"\xa5" * PAGE
    assert queue.do(WRITE_ZEROES, 9, 0, 0, nsid=1).status == 0
    assert path.read_bytes()[8 * BLOCK : 11 * BLOCK] == b"\xa5" * BLOCK + bytes(BLOCK) + b"\xa5" * BLOCK  # fmt: skip
    with path.open("r+b") as file:
        file.truncate(PAGE)
    assert queue.do(READ, 16, 0, 0, nsid=1, prp1=DATA).status == 0x281
    store.close()
    again = RawFile(path)
    assert again.size == PAGE
    again.close()
    with pytest.raises(FileNotFoundError):
        RawFile(tmp_path / "absent.raw")
