"""Data that SGLs describe, in raw words of the specification: what moves, and which status a wrong one gives."""

import random
import struct

import pytest

from tests.nvme_rig import (
    BLOCK,
    BLOCK_TYPE,
    BUCKET,
    COMPARE,
    DATA,
    DATASET,
    FLUSH,
    IDENTIFY,
    KEYED,
    LAST,
    PAGE,
    READ,
    SEGMENT,
    SGL,
    SGL_AND_METADATA_SGL,
    TRANSPORT,
    WRITE,
    NvmeRig,
    Queue,
    block,
    command,
    descriptor,
)
from viommu.endpoints.nvme.events import NvmeCommandFetched

SIZE = 1 << 20
LIST = DATA + 0x10_0000
TOP = 1 << 64
INVALID_FIELD, TRANSFER_ERROR = 0x02, 0x04
SEGMENT_INVALID, NUMBER_INVALID, LENGTH_INVALID, TYPE_INVALID = 0x0D, 0x0E, 0x0F, 0x11


def bucket(size: int) -> bytes:
    return descriptor(BUCKET, 0, size)


@pytest.fixture
def rig() -> NvmeRig:
    rig = NvmeRig()
    rig.store.write(0, memoryview(random.Random(1).randbytes(SIZE)))
    rig.write(DATA, random.Random(2).randbytes(SIZE))
    return rig


@pytest.fixture
def queue(rig: NvmeRig) -> Queue:
    return rig.io()


def stored(rig: NvmeRig, size: int = SIZE) -> bytes:
    data = bytearray(size)
    rig.store.read(0, memoryview(data))
    return bytes(data)


def chain(rig: NvmeRig, *segments: bytes, at: int = LIST, gap: int = 0) -> bytes:
    """Write segments, of which each gets a descriptor of the next one; returns the first one's."""
    places = [at]
    for each in segments[:-1]:
        places.append(places[-1] + len(each) + 16 + gap)
    link = b""
    for place, each in reversed(list(zip(places, segments, strict=True))):
        rig.write(place, each + link)
        link = descriptor(SEGMENT if link else LAST, place, len(each + link))
    return link


# What moves


@pytest.mark.parametrize("offset", [0, 1, 2, 511, PAGE - 1])
def test_one_block_is_in_the_command(rig: NvmeRig, queue: Queue, offset: int) -> None:
    size = 9 * BLOCK
    rig.port.seen.clear()
    assert queue.do_sgl(READ, 9, block(DATA + offset, size)).status == 0
    assert rig.read(DATA + offset, size) == stored(rig, size)
    assert [each[1] for each in rig.port.seen] == [64, size, 16], "no more than the data is fetched"
    assert queue.do_sgl(COMPARE, 9, block(DATA + offset, size)).status == 0
    data = random.Random(3).randbytes(size)
    rig.write(DATA + offset, data)
    assert queue.do_sgl(COMPARE, 9, block(DATA + offset, size)).status == 0x285
    assert queue.do_sgl(WRITE, 9, block(DATA + offset, size)).status == 0
    assert stored(rig, size) == data


@pytest.mark.parametrize(
    ("lengths", "at"),
    [
        ([[512, 512]], LIST),
        ([[1, 511, 3, 509]], LIST + 8),
        ([[1000], [20, 0, 1], [3]], LIST + PAGE - 24),
        ([[2] * 255, [1] * 256, [1] * 256, [2]], LIST + 1024),
        ([[3] * 300, [124]], LIST + PAGE - 16),
        ([[], [], [1024]], LIST),
    ],
)
def test_blocks_in_segments(rig: NvmeRig, queue: Queue, lengths: list[list[int]], at: int) -> None:
    """Segments of any length anywhere, also over the end of a page; blocks of any size in any order."""
    place, pieces, segments = DATA + 0x4000, list[tuple[int, int]](), list[bytes]()
    for group in lengths:
        for size in group:
            place -= size + 1
            pieces.append((place, size))
        segments.append(b"".join(block(*piece) for piece in pieces[len(pieces) - len(group) :]))
    sgl = chain(rig, *segments, at=at, gap=40)
    assert queue.do_sgl(READ, 2, sgl).status == 0
    assert b"".join(rig.read(*piece) for piece in pieces) == stored(rig, 1024)
    for address, size in pieces:
        rig.write(address, random.Random(address).randbytes(size))
    assert queue.do_sgl(WRITE, 2, sgl).status == 0
    assert b"".join(rig.read(*piece) for piece in pieces) == stored(rig, 1024)


def test_adjacent_blocks_move_at_once(rig: NvmeRig, queue: Queue) -> None:
    sgl = chain(rig, b"".join(block(DATA + 128 * number, 128) for number in range(8)))
    rig.port.seen.clear()
    assert queue.do_sgl(READ, 2, sgl).status == 0
    moved = [(iova, size) for iova, size, write, *_ in rig.port.seen if write]
    assert moved == [(DATA, 1024), (queue.cq, 16)]


def test_a_read_with_a_bit_bucket(rig: NvmeRig, queue: Queue) -> None:
    """The example of 4.4: 13 KiB of blocks, of which 11 KiB go to the host."""
    kib, before = 1024, rig.read(DATA, SIZE)
    places = DATA + 1, DATA + 0x2_0003, DATA + 0x1_0000
    sgl = chain(
        rig,
        block(places[0], 3 * kib),
        block(places[1], 4 * kib) + bucket(2 * kib),
        block(places[2], 4 * kib),
    )
    assert queue.do_sgl(READ, 26, sgl).status == 0
    data, expected = stored(rig, 13 * kib), bytearray(before)
    for place, (start, end) in zip(places, ((0, 3), (3, 7), (9, 13)), strict=True):
        expected[place - DATA : place - DATA + (end - start) * kib] = data[start * kib : end * kib]
    assert rig.read(DATA, SIZE) == expected


def test_a_read_into_bit_buckets_alone(rig: NvmeRig, queue: Queue) -> None:
    before = rig.read(DATA, SIZE)
    assert queue.do_sgl(READ, 2, bucket(1024)).status == 0
    assert queue.do_sgl(READ, 2, chain(rig, bucket(0) + bucket(1), bucket(5000))).status == 0
    assert rig.read(DATA, SIZE) == before


def test_a_bit_bucket_is_nothing_to_a_write(rig: NvmeRig, queue: Queue) -> None:
    sgl = chain(rig, bucket(100) + block(DATA, 700) + bucket(1024), block(DATA + 3000, 324))
    for opcode in (WRITE, COMPARE):
        assert queue.do_sgl(opcode, 2, sgl).status == 0
    assert stored(rig, 1024) == rig.read(DATA, 700) + rig.read(DATA + 3000, 324)
    assert queue.do_sgl(WRITE, 2, bucket(1024)).status == LENGTH_INVALID


def test_blocks_of_nothing(rig: NvmeRig, queue: Queue) -> None:
    """They may be anywhere: none is reached."""
    sgl = chain(rig, bytes(16) + block(TOP - 1, 0) + block(DATA, 512) + bytes(32))
    assert queue.do_sgl(READ, 1, sgl).status == 0
    assert rig.read(DATA, 512) == stored(rig, 512)


def test_an_sgl_that_is_longer_than_the_data(rig: NvmeRig, queue: Queue) -> None:
    before = rig.read(DATA + 512, 512)
    assert queue.do_sgl(READ, 1, block(DATA, 0xFFFF_FFFF)).status == 0
    rest = block(TOP - 1, 2) + descriptor(0xFF, 0, 0)
    assert queue.do_sgl(READ, 1, chain(rig, block(DATA, 512) + rest, rest)).status == 0
    assert rig.read(DATA, 512) == stored(rig, 512)
    assert rig.read(DATA + 512, 512) == before


def test_dataset_management(rig: NvmeRig, queue: Queue) -> None:
    rig.write(DATA + 1, struct.pack("<IIQIIQ", 0, 3, 10, 0, 1, 20))
    sgl = chain(rig, block(DATA + 1, 20), block(DATA + 21, PAGE))
    first, second = struct.unpack("<QQ", sgl)
    done = queue.do(DATASET, 1, 4, nsid=1, prp1=first, prp2=second, flags=SGL)
    assert done.status == 0
    assert stored(rig)[10 * BLOCK : 13 * BLOCK] == bytes(3 * BLOCK)
    assert stored(rig)[20 * BLOCK : 21 * BLOCK] == bytes(BLOCK)


# What is refused


WRONG = {
    "a keyed block": (descriptor(KEYED, DATA, 1024), TYPE_INVALID),
    "a transport block": (descriptor(TRANSPORT, 0, 1024), TYPE_INVALID),
    "a reserved type": (descriptor(0x60, DATA, 1024), TYPE_INVALID),
    "a vendor's type": (descriptor(0xF0, DATA, 1024), TYPE_INVALID),
    "a block at an offset": (descriptor(BLOCK_TYPE | 1, 0, 1024), TYPE_INVALID),
    "a bucket with a sub type": (descriptor(BUCKET | 1, 0, 1024), TYPE_INVALID),
    "a segment at an offset": (descriptor(SEGMENT | 1, 0, 32), TYPE_INVALID),
    "a sub type of fabrics": (descriptor(LAST | 0xA, LIST, 32), TYPE_INVALID),
    "a block that is too short": (block(DATA, 1023), LENGTH_INVALID),
    "a block of nothing": (block(DATA, 0), LENGTH_INVALID),
    "a block beyond all addresses": (block(TOP - 1024, 1025), LENGTH_INVALID),
    "a segment beyond all addresses": (descriptor(LAST, TOP - 16, 32), LENGTH_INVALID),
    "an empty segment": (descriptor(SEGMENT, LIST, 0), SEGMENT_INVALID),
    "an empty last segment": (descriptor(LAST, LIST, 0), SEGMENT_INVALID),
    "half a descriptor": (descriptor(LAST, LIST, 40), SEGMENT_INVALID),
    "a segment that is not aligned": (descriptor(LAST, LIST + 4, 32), SEGMENT_INVALID),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("place", ["command", "segment", "next segment"])
@pytest.mark.parametrize("opcode", [READ, WRITE])
def test_wrong_descriptors(rig: NvmeRig, queue: Queue, opcode: int, place: str, what: str) -> None:
    """In the command, or at the end of a segment: nothing has moved."""
    wrong, status = WRONG[what]
    at = DATA + 0x8000
    if place == "command":
        sgl = wrong
    elif place == "segment":
        rig.write(at, block(DATA, 0) + wrong)
        sgl = descriptor(SEGMENT, at, 32)
    else:
        rig.write(at, block(DATA, 0) + descriptor(SEGMENT, at + 64, 32))
        rig.write(at + 64, bytes(16) + wrong)
        sgl = descriptor(SEGMENT, at, 32)
    before, there = stored(rig), rig.read(DATA, SIZE)
    done = queue.do_sgl(opcode, 2, sgl)
    assert (done.status, done.dnr) == (status, True)
    assert (stored(rig), rig.read(DATA, SIZE)) == (before, there)


@pytest.mark.parametrize("kind", [SEGMENT, LAST])
def test_a_segment_is_told_of_at_the_end_of_one(rig: NvmeRig, queue: Queue, kind: int) -> None:
    end = block(DATA, 512)
    rig.write(LIST, end * 3)
    link = descriptor(kind, LIST, 48)
    for outer in (SEGMENT, LAST):
        rig.write(LIST + 64, bytes(16) + link + block(DATA, 1024))
        assert queue.do_sgl(READ, 2, descriptor(outer, LIST + 64, 48)).status == NUMBER_INVALID
    rig.write(LIST + 64, end + link)
    assert queue.do_sgl(READ, 2, descriptor(LAST, LIST + 64, 32)).status == SEGMENT_INVALID
    assert queue.do_sgl(READ, 2, descriptor(SEGMENT, LIST + 64, 32)).status == 0


def test_the_end_of_what_is_fetched_is_not_the_end(rig: NvmeRig, queue: Queue) -> None:
    rig.write(LIST, bytes(255 * 16) + descriptor(LAST, LIST, 16) + block(DATA, 512))
    assert queue.do_sgl(READ, 1, descriptor(LAST, LIST, 257 * 16)).status == NUMBER_INVALID


def test_an_sgl_that_ends_too_early(rig: NvmeRig, queue: Queue) -> None:
    for kind in (SEGMENT, LAST):
        rig.write(LIST, block(DATA, 512) * 2)
        assert queue.do_sgl(READ, 3, descriptor(kind, LIST, 32)).status == LENGTH_INVALID
        assert queue.do_sgl(READ, 2, descriptor(kind, LIST, 32)).status == 0


def test_what_a_command_cannot_have(rig: NvmeRig, queue: Queue) -> None:
    sgl = block(DATA, 1024)
    for flags in (SGL_AND_METADATA_SGL, 0xC0):
        assert queue.do_sgl(READ, 2, sgl, flags=flags).status == INVALID_FIELD
    assert queue.do_sgl(READ, 1025, block(DATA, 0xFFFF_FFFF)).status == INVALID_FIELD, (
        "as with PRPs"
    )
    assert queue.do(FLUSH, nsid=1, flags=SGL).status == 0, "it has no data"
    entry = bytearray(command(READ, 0, 0, 1, nsid=1, flags=SGL))
    entry[16:40] = struct.pack("<Q", 0xDEAD_BEEF_DEAD_BEEF) + sgl
    queue.put(bytes(entry))
    queue.ring()
    rig.drain()
    assert queue.completions()[0].status == 0, "there is no metadata to point to"


@pytest.mark.parametrize("flags", [SGL, SGL_AND_METADATA_SGL, 0xC0])
def test_admin_commands_have_prps(rig: NvmeRig, flags: int) -> None:
    before = rig.read(DATA, PAGE)
    done = rig.admin.do(IDENTIFY, 1, prp1=DATA, prp2=PAGE, flags=flags)
    assert (done.status, done.dnr) == (INVALID_FIELD, True)
    assert rig.read(DATA, PAGE) == before


def test_the_trace_tells_what_describes_the_data(rig: NvmeRig, queue: Queue) -> None:
    rig.events.clear()
    queue.do_sgl(READ, 1, block(DATA, 512))
    queue.do(READ, 0, 0, 0, nsid=1, prp1=DATA)
    queue.do_sgl(READ, 1, block(DATA, 512), flags=0xC0)
    fetched = [each for each in rig.events if isinstance(each, NvmeCommandFetched)]
    assert [each.data_pointer for each in fetched] == ["SGL", "PRP", "0x3"]


# DMA that aborts


@pytest.mark.parametrize("opcode", [READ, WRITE])
@pytest.mark.parametrize("number", range(4))
def test_a_fetch_or_a_block_that_aborts(
    rig: NvmeRig, queue: Queue, number: int, opcode: int
) -> None:
    """Each segment's page, and the last block's, in turn; done again, the command succeeds."""
    pages = [LIST, LIST + 2 * PAGE, LIST + 4 * PAGE, DATA + 0x8000]
    sgl = chain(
        rig,
        *(block(DATA + 700 * n, 512) for n in range(2)),
        block(pages[3], 512),
        gap=2 * PAGE - 32,
    )
    before, there = stored(rig), rig.read(DATA, 512)
    rig.port.holes = {pages[number]}
    done = queue.do_sgl(opcode, 3, sgl)
    assert (done.status, done.dnr) == (TRANSFER_ERROR, False)
    assert stored(rig) == before
    assert rig.port.in_flight == 0
    if number < 3:
        assert rig.read(DATA, 512) == there, "nothing moves before all is known"
    rig.port.holes = set()
    assert queue.do_sgl(opcode, 3, sgl).status == 0
    moved = rig.read(DATA, 512) + rig.read(DATA + 700, 512) + rig.read(pages[3], 512)
    assert moved == stored(rig, 3 * 512)


def test_a_segment_that_ends_in_a_hole(rig: NvmeRig, queue: Queue) -> None:
    rig.port.holes = {LIST + PAGE}
    rig.write(LIST + PAGE - 32, block(DATA, 512) * 4)
    sgl = descriptor(LAST, LIST + PAGE - 32, 64)
    assert queue.do_sgl(READ, 2, sgl).status == TRANSFER_ERROR
    assert queue.do_sgl(READ, 2, descriptor(LAST, LIST + PAGE - 32, 32)).status == 0
