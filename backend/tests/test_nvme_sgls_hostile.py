"""SGLs of a guest that means harm: random ones against a simple model of what moves, and those that have no end."""

import random
import struct
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine_rig import BASE
from tests.nvme_rig import (
    BLOCK,
    BLOCK_TYPE,
    BUCKET,
    DATA,
    LAST,
    PAGE,
    READ,
    SEGMENT,
    WRITE,
    NvmeRig,
    block,
    command,
    descriptor,
)

RAM, TOP = 0x16_0000, 1 << 64
LISTS = DATA + 0x4_0000
BLOCKS = 3
SIZE = BLOCKS * BLOCK
LIMIT = 4096
DONE, TRANSFER_ERROR = 0, 0x04
SEGMENT_INVALID, NUMBER_INVALID, LENGTH_INVALID, TYPE_INVALID = 0x0D, 0x0E, 0x0F, 0x11

Places = list[int | None]
"""Where each byte of the data is; None in a bit bucket."""


# The model


class Refused(Exception):
    """The status that an SGL gives."""

    def __init__(self, status: int) -> None:
        super().__init__(hex(status))
        self.status = status


def there(address: int, size: int = 1) -> bool:
    return address >= BASE and address + size <= BASE + RAM


def require(fine: bool, status: int) -> None:
    if not fine:
        raise Refused(status)


def fetch(rig: NvmeRig, address: int, size: int, fetched: list[bytes]) -> Iterator[bytes]:
    """The descriptors of a segment, of which no more than a page is fetched at once."""
    for at in range(0, size, PAGE):
        piece = min(PAGE, size - at)
        require(len(fetched) + piece // 16 <= LIMIT, NUMBER_INVALID)
        require(there(address + at, piece), TRANSFER_ERROR)
        found = [rig.read(address + at + place, 16) for place in range(0, piece, 16)]
        fetched += found
        yield from found


def walk(rig: NvmeRig, sgl1: bytes, *, to_host: bool) -> Places:
    """What an SGL says of the data. Raises `Refused`."""
    places: Places = []
    fetched: list[bytes] = []
    segment, count, last = iter([sgl1]), 1, False
    while True:
        link = (0, 0, 0)
        for number, each in enumerate(segment, 1):
            address, size, kind = struct.unpack("<QI3xB", each)
            wanted = min(size, SIZE - len(places))
            require(kind in (BLOCK_TYPE, BUCKET, SEGMENT, LAST), TYPE_INVALID)
            if kind == BUCKET:
                places += [None] * wanted if to_host else []
            elif kind == BLOCK_TYPE:
                require(address + size <= TOP, LENGTH_INVALID)
                places += range(address, address + wanted)
            else:
                require(number == count, NUMBER_INVALID)
                require(not last and size > 0 and size % 16 == address % 8 == 0, SEGMENT_INVALID)
                require(address + size <= TOP, LENGTH_INVALID)
                link = address, size, kind
            if len(places) == SIZE:
                return places
        address, size, kind = link
        require(size > 0, LENGTH_INVALID)
        segment, count, last = fetch(rig, address, size, fetched), size // 16, kind == LAST


def expected_read(ram: bytes, data: bytes, places: Places) -> bytes:
    after = bytearray(ram)
    for byte, place in zip(data, places, strict=True):
        if place is not None:
            after[place - BASE] = byte
    return bytes(after)


# Random ones

LENGTHS = st.one_of(
    st.integers(0, 40), st.sampled_from([BLOCK, 1000, SIZE, PAGE]), st.integers(0, (1 << 32) - 1)
)
ADDRESSES = st.one_of(
    st.integers(DATA, DATA + 3 * PAGE),
    st.integers(DATA, DATA + 3 * PAGE),
    st.sampled_from([BASE + RAM - 20, TOP - 16, 0, LISTS]),
    st.integers(0, TOP - 1),
)
PLAIN = st.one_of(
    st.builds(block, ADDRESSES, st.integers(0, 700)),
    st.builds(block, ADDRESSES, LENGTHS),
    st.builds(descriptor, st.just(BUCKET), ADDRESSES, LENGTHS),
)
ANY = st.one_of(
    st.builds(descriptor, st.sampled_from([SEGMENT, LAST]), ADDRESSES, LENGTHS),
    st.builds(descriptor, st.integers(0, 255), ADDRESSES, LENGTHS),
    st.binary(min_size=16, max_size=16),
)


@st.composite
def sgls(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, bytes]]]:
    """The first descriptor, and segments with their places: most in order, each with a link to one of them."""
    count = draw(st.integers(0, 4))
    places = [LISTS + 0x2000 * n + 8 * draw(st.integers(0, 600)) for n in range(count)]
    bodies = [draw(st.lists(PLAIN, max_size=5)) for _ in range(count)]
    sizes = [16 * len(body) + 16 for body in bodies]
    segments = []
    for number, (place, body) in enumerate(zip(places, bodies, strict=True)):
        if draw(st.integers(0, 9)) == 0:
            body.insert(draw(st.integers(0, len(body))), draw(ANY))
        following = draw(st.sampled_from([number + 1] * 9 + [draw(st.integers(0, count))]))
        if following < count and draw(st.integers(0, 9)):
            final = following == count - 1
            kind = LAST if final else SEGMENT
            body.append(descriptor(kind, places[following], sizes[following]))
        else:
            body.append(draw(PLAIN))
        segments.append((place, b"".join(body)))
    if not count:
        return draw(st.one_of(PLAIN, ANY)), segments
    return descriptor(LAST if count == 1 else SEGMENT, places[0], sizes[0]), segments


@settings(max_examples=500, deadline=None)
@given(sgls(), st.sampled_from([READ, WRITE]))
def test_what_moves_is_what_the_model_says(
    sgl: tuple[bytes, list[tuple[int, bytes]]], opcode: int
) -> None:
    rig = NvmeRig(ram=RAM)
    queue = rig.io()
    rig.store.write(0, memoryview(random.Random(1).randbytes(PAGE)))
    rig.write(DATA, random.Random(2).randbytes(4 * PAGE))
    sgl1, segments = sgl
    for place, content in segments:
        rig.write(place, content)
    before = bytearray(PAGE)
    rig.store.read(0, memoryview(before))
    ram, data, status = bytes(rig.ram), bytes(before[:SIZE]), DONE
    try:
        places = walk(rig, sgl1, to_host=opcode == READ)
        require(all(place is None or there(place) for place in places), TRANSFER_ERROR)
        if opcode == READ:
            ram = expected_read(ram, data, places)
        else:
            data = bytes(ram[place - BASE] for place in places if place is not None)
    except Refused as refused:
        status = refused.status
    done = queue.do_sgl(opcode, BLOCKS, sgl1)
    assert done.status == status
    if opcode != READ or status != TRANSFER_ERROR:  # which moves what is before the fault
        assert rig.ram[DATA - BASE :] == ram[DATA - BASE :]
    if opcode == WRITE and status == DONE:
        before[:SIZE] = data
    after = bytearray(PAGE)
    rig.store.read(0, memoryview(after))
    assert after == before
    assert rig.port.in_flight == 0


# Without an end


def test_a_segment_that_leads_to_itself_does_not_hold_up_others() -> None:
    rig = NvmeRig(ram=RAM)
    queue = rig.io()
    loop = descriptor(SEGMENT, LISTS, 32)
    rig.write(LISTS, bytes(16) + loop)
    first, second = struct.unpack("<QQ", loop)
    queue.put(command(READ, 0, 0, 0, nsid=1, prp1=first, prp2=second, flags=0x40))
    queue.put(command(READ, 0, 0, 0, nsid=1, prp1=DATA))
    queue.ring()
    rig.port.seen.clear()
    rig.drain()
    done = [(each.command_id, each.status, each.dnr) for each in queue.completions()]
    assert done == [(1, 0, False), (0, NUMBER_INVALID, True)]
    assert sum(each[:2] == (LISTS, 32) for each in rig.port.seen) == LIMIT // 2


def test_the_most_descriptors() -> None:
    rig = NvmeRig(ram=RAM)
    queue = rig.io()
    blocks = b"".join(block(DATA + 2 * number, 1) for number in range(2 * BLOCK))
    for nothing, status in ((LIMIT - 2 * BLOCK, 0), (LIMIT - 2 * BLOCK + 1, NUMBER_INVALID)):
        segment = bytes(16) * nothing + blocks
        rig.write(LISTS, segment)
        assert queue.do_sgl(WRITE, 2, descriptor(LAST, LISTS, len(segment))).status == status


def test_a_segment_of_four_gigabytes() -> None:
    """It is looked at from the beginning, and not fetched at once."""
    rig = NvmeRig(ram=RAM)
    queue = rig.io()
    rig.write(LISTS, bytes(LIMIT * 16))
    rig.port.seen.clear()
    huge = descriptor(LAST, LISTS, 0xFFFF_FFF0)
    assert queue.do_sgl(READ, 1, huge).status == NUMBER_INVALID
    assert max(each[1] for each in rig.port.seen) == PAGE
    rig.write(LISTS, block(DATA, BLOCK))
    assert queue.do_sgl(READ, 1, huge).status == 0


def test_an_end_of_the_queue_ends_a_loop() -> None:
    rig = NvmeRig(ram=RAM)
    queue = rig.io()
    loop = descriptor(SEGMENT, LISTS, 16)
    rig.write(LISTS, loop)
    first, second = struct.unpack("<QQ", loop)
    queue.put(command(READ, 0, 0, 0, nsid=1, prp1=first, prp2=second, flags=0x40))
    queue.ring()
    for _ in range(50):
        rig.nvme.step()
    assert rig.admin.do(0, 1).status == 0
    assert (rig.nvme.tasks, rig.port.in_flight) == (0, 0)
