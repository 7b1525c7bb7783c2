"""A guest that means harm: nothing that it writes may raise, loop or hold memory; what is held is waited for."""

import random
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine_rig import BASE
from tests.nvme_rig import (
    ACQ,
    ACQ_AT,
    AQA,
    ASQ,
    ASYNC_EVENT,
    CC,
    CFS,
    CREATE_CQ,
    CREATE_SQ,
    CSTS,
    DATA,
    DELETE_SQ,
    ENABLE,
    FLUSH,
    PAGE,
    RDY,
    READ,
    WRITE,
    NvmeRig,
    command,
)  # fmt: skip
from viommu.endpoints.port import DmaStalled, Transfer

WORDS = st.one_of(
    st.integers(0, 70),
    st.integers(0, (1 << 32) - 1),
    st.sampled_from([DATA, DATA + 8, BASE, BASE + 0x5_2000, 0xFFFF_FFFF, 63 << 16 | 1, 3]),
)
SEGMENTS = st.sampled_from([0x20 << 56 | PAGE, 0x30 << 56 | 64, 0x20 << 56 | 16])
"""The second half of an SGL descriptor; what the first half points to is a table of anything."""
ADDRESSES = st.one_of(
    st.sampled_from([BASE, DATA, DATA + 4088, BASE + (4 << 20) - 8, (1 << 64) - 8]),
    st.integers(0, (1 << 64) - 1),
)


@st.composite
def entries(draw: st.DrawFn) -> bytes:
    return command(
        draw(st.one_of(st.integers(0, 12), st.integers(0, 255))),
        *(draw(WORDS) for _ in range(6)),
        nsid=draw(st.sampled_from([0, 1, 2, 0xFFFF_FFFF])),
        prp1=draw(ADDRESSES),
        prp2=draw(st.one_of(ADDRESSES, SEGMENTS)),
        cid=draw(st.integers(0, 3)),
        flags=draw(st.sampled_from([0, 0, 0, 1, 0x40, 0x40, 0x80])),
    )


ACTIONS = st.one_of(
    st.tuples(st.just("admin"), entries()),
    st.tuples(st.just("io"), entries()),
    st.tuples(
        st.just("mmio"),
        st.integers(0, 0x2100),
        st.sampled_from([1, 2, 4, 8]),
        st.integers(0, (1 << 64) - 1),
    ),
    st.tuples(st.just("doorbell"), st.integers(0, 40), st.integers(0, 1 << 32)),
    st.tuples(st.just("steps"), st.integers(0, 30)),
    st.tuples(st.just("tables"), st.integers(0, 1 << 32)),
    st.tuples(st.just("again")),
)


def play(rig: NvmeRig, action: tuple[Any, ...]) -> None:
    match action:
        case ("admin", entry):
            rig.admin.put(entry)
            rig.admin.ring()
        case ("io", entry):
            rig.write(BASE + 0x4_2000, entry * 64)
            rig.doorbell(2, len(rig.events) & 63)
        case ("mmio", offset, size, value):
            rig.nvme.write(0, offset, size, value)
            rig.nvme.read(0, offset, size)
        case ("doorbell", index, value):
            rig.doorbell(index, value)
        case ("steps", count):
            for _ in range(count):
                rig.nvme.step()
        case ("tables", seed):
            for place in (DATA, BASE + 0x5_2000):
                rig.write(place, random.Random(seed).randbytes(PAGE))
        case ("again",):
            rig.set(CC, 0)
            rig.enable()
            rig.io()


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIONS, max_size=30))
def test_whatever_a_guest_does_ends(actions: list[tuple[Any, ...]]) -> None:
    rig = NvmeRig()
    rig.io()
    for action in actions:
        play(rig, action)
        assert rig.port.in_flight <= 1500
    rig.drain()
    assert rig.port.in_flight == 0
    rig.nvme.reset()
    rig.enable()
    assert rig.io().do(FLUSH, nsid=1).status == 0


@given(st.lists(ADDRESSES, min_size=512, max_size=512), ADDRESSES, ADDRESSES)
@settings(max_examples=50, deadline=None)
def test_lists_of_anything(addresses: list[int], prp1: int, prp2: int) -> None:
    rig = NvmeRig()
    queue = rig.io()
    rig.write(DATA, b"".join(address.to_bytes(8, "little") for address in addresses))
    before = rig.get(CSTS)
    done = queue.do(WRITE, 0, 0, 1023, nsid=1, prp1=prp1, prp2=prp2)
    assert done.status in (0, 0x04, 0x13)
    assert rig.get(CSTS) == before == RDY


def test_a_list_that_leads_to_itself() -> None:
    rig = NvmeRig()
    queue = rig.io()
    rig.write(DATA, DATA.to_bytes(8, "little") * 512)
    assert queue.do(READ, 0, 0, 1023, nsid=1, prp1=DATA + 0x1000, prp2=DATA + PAGE - 8).status == 0


def test_queues_that_come_and_go_full_leave_nothing() -> None:
    rig = NvmeRig()
    for _ in range(50):
        rig.admin.do(5, 1 | 1 << 16, 1, prp1=DATA)
        rig.admin.do(1, 1 | 63 << 16, 1 | 1 << 16, prp1=DATA + PAGE)
        rig.write(DATA + PAGE, command(FLUSH, nsid=1) * 64)
        rig.doorbell(2, 60)
        rig.drain()
        assert rig.admin.do(0, 1).status == 0
        assert rig.admin.do(4, 1).status == 0
    assert rig.nvme.tasks == 0


def test_a_full_completion_queue_does_not_gather_what_nobody_takes() -> None:
    """Commands of submission queues that come and go, whose completion queue stays."""
    rig = NvmeRig()
    rig.admin.do(CREATE_CQ, 1 | 1 << 16, 1, prp1=DATA)
    rig.write(DATA + PAGE, b"".join(command(FLUSH, nsid=1, cid=number) for number in range(64)))
    for _ in range(20):
        assert rig.admin.do(CREATE_SQ, 1 | 63 << 16, 1 | 1 << 16, prp1=DATA + PAGE).status == 0
        rig.doorbell(2, 60)
        rig.drain()
        assert rig.admin.do(DELETE_SQ, 1).status == 0
    head = posted = 0
    while rig.read(DATA + 16 * head + 12, 4) != bytes(4):
        rig.write(DATA + 16 * head, bytes(16))
        head, posted = 1 - head, posted + 1
        rig.doorbell(3, head)
        rig.drain()
    assert posted == 1


def test_events_on_a_full_queue_do_not_make_room_negative() -> None:
    rig = NvmeRig()
    for entry in (command(ASYNC_EVENT), *[command(0x7F)] * 16):
        rig.admin.put(entry)
    for _ in range(8):
        rig.admin.ring()
        rig.drain()
        for _ in range(15):
            rig.admin.put(command(0x7F))
    rig.doorbell(2 * 9, 1)  # there is no such queue: the event
    rig.admin.ring()
    rig.drain()
    assert rig.get(CSTS) == RDY
    rig.admin.completions()
    rig.drain()
    assert rig.admin.completions(), "it goes on when there is room"


def test_a_queue_that_leaves_the_address_space() -> None:
    rig = NvmeRig(enable=False)
    top, entries = (1 << 64) - PAGE, b"".join(command(0x7F, cid=number) for number in range(64))
    rig.port.memory.add_region(top, PAGE, memoryview(bytearray(entries)))
    rig.set(AQA, 1023 | 127 << 16)
    rig.set(ASQ, top, 8)
    rig.set(ACQ, ACQ_AT, 8)
    rig.set(CC, ENABLE)
    for index, value in ((0, 64), (1, 64), (0, 70)):
        assert rig.get(CSTS) == RDY
        rig.doorbell(index, value)
        rig.drain()
    assert rig.get(CSTS) == RDY | CFS


# What is held


@dataclass
class Held:
    """A transaction that waits for software."""

    address: int = 0
    resolution: str | None = None


def test_a_stalled_transaction_is_waited_for() -> None:
    rig = NvmeRig()
    queue = rig.io()
    held = Held()
    begin, tries = rig.port.begin, 0

    def stall(iova: int, size: int, **access: Any) -> Transfer:
        nonlocal tries
        if iova == DATA and held.resolution is None:
            tries += 1
            raise DmaStalled(held)
        return begin(iova, size, **access)

    rig.port.begin = stall  # type: ignore[method-assign]
    for _ in range(3):
        queue.put(command(READ, 0, 0, 0, nsid=1, prp1=DATA))
    queue.put(command(FLUSH, nsid=1))
    queue.ring()
    rig.drain()
    assert tries == 3, "each once: it does not ask again before it is told"
    assert [each.command_id for each in queue.completions()] == [3], "others go on"
    held.resolution = "retry"
    assert rig.nvme.busy
    rig.drain()
    assert [each.status for each in queue.completions()] == [0, 0, 0]


def test_a_stalled_transaction_that_is_aborted() -> None:
    rig = NvmeRig()
    queue = rig.io()

    def stall(iova: int, size: int, **access: Any) -> Transfer:
        if iova == DATA:
            raise DmaStalled(Held(iova, "abort"))
        return begin(iova, size, **access)

    begin, rig.port.begin = rig.port.begin, stall  # type: ignore[method-assign]
    assert queue.do(READ, 0, 0, 0, nsid=1, prp1=DATA).status == 0x04


def test_a_transaction_that_is_never_let_through() -> None:
    rig = NvmeRig()
    queue = rig.io()

    def stall(iova: int, size: int, **access: Any) -> Transfer:
        if iova == DATA:
            raise DmaStalled(Held(iova, "retry"))
        return begin(iova, size, **access)

    begin, rig.port.begin = rig.port.begin, stall  # type: ignore[method-assign]
    assert queue.do(READ, 0, 0, 0, nsid=1, prp1=DATA).status == 0x04


def test_it_cannot_be_enabled_over_nothing() -> None:
    rig = NvmeRig()
    rig.port.bus_master = False
    rig.set(CC, 0)
    rig.enable()
    rig.admin.put(command(6, 1, prp1=DATA))
    rig.admin.ring()
    rig.drain()
    assert rig.get(CSTS) == RDY | 2
    assert rig.get(CC) == ENABLE
