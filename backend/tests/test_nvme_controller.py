"""Registers, life and queues of the NVMe controller."""

import pytest

from tests.engine_rig import BASE
from tests.nvme_rig import (
    ABORT,
    ACQ,
    ACQ_AT,
    ADMIN_ENTRIES,
    AQA,
    ASQ,
    ASQ_AT,
    ASYNC_EVENT,
    BLOCK,
    CAP,
    CC,
    CFS,
    CREATE_CQ,
    CREATE_SQ,
    CSTS,
    DATA,
    DELETE_CQ,
    DELETE_SQ,
    ENABLE,
    FLUSH,
    GET_LOG,
    IDENTIFY,
    INTMC,
    INTMS,
    RDY,
    READ,
    SET_FEATURES,
    VS,
    WRITE,
    NvmeRig,
    Queue,
    command,
)
from viommu.endpoints.nvme.controller import NvmeController
from viommu.endpoints.nvme.events import NvmeQueueCreated, NvmeStateChanged
from viommu.endpoints.nvme.store import RamDisk
from viommu.endpoints.transfers import Steps


def states(rig: NvmeRig) -> list[str]:
    return [event.state for event in rig.events if isinstance(event, NvmeStateChanged)]


def scattered(rig: NvmeRig) -> bytes:
    """A read whose pages are all apart: it takes long."""
    pages = (DATA + 0x2000 * number for number in range(2, 129))
    rig.write(DATA + 0x1000, b"".join(page.to_bytes(8, "little") for page in pages))
    return command(READ, 0, 0, 1023, nsid=1, prp1=DATA, prp2=DATA + 0x1000)


def test_the_trace_tells_where_queues_are() -> None:
    rig = NvmeRig()
    rig.io(3, entries=8)
    created = [event for event in rig.events if isinstance(event, NvmeQueueCreated)]
    assert [(each.queue, each.queue_id, each.address, each.entries) for each in created] == [
        ("completion", 0, ACQ_AT, ADMIN_ENTRIES),
        ("submission", 0, ASQ_AT, ADMIN_ENTRIES),
        ("completion", 3, BASE + 0x8_6000, 8),
        ("submission", 3, BASE + 0x4_6000, 8),
    ]


def test_what_it_is() -> None:
    assert NvmeController.identity.class_code == 0x010802
    rig = NvmeRig(enable=False)
    capabilities = rig.get(CAP, 8)
    assert capabilities & 0xFFFF == 1023
    assert capabilities >> 16 & 1, "queues must be contiguous"
    assert capabilities >> 32 & 0xF == 0, "doorbells are 4 bytes apart"
    assert capabilities >> 37 & 0xFF == 1, "the NVM command set"
    assert rig.get(VS) == 0x10400
    assert rig.get(CSTS) == 0


def test_registers_take_halves() -> None:
    rig = NvmeRig(enable=False)
    rig.set(ASQ, 0x1234_5FFF)
    rig.set(ASQ + 4, 0x9)
    assert rig.get(ASQ, 8) == 0x9_1234_5000
    rig.set(ACQ, 0x1_0000_1000, 8)
    assert (rig.get(ACQ), rig.get(ACQ + 4)) == (0x1000, 1)
    rig.set(AQA + 1, 5, 2)
    rig.set(AQA, 0xFFFF_FFFF, 1)
    assert rig.get(AQA) == 0


def test_enable_and_disable() -> None:
    rig = NvmeRig()
    assert rig.get(CSTS) == RDY
    rig.set(ASQ, 0, 8)
    assert rig.get(ASQ, 8) == ASQ_AT, "enabled, it does not change"
    rig.set(CC, 0)
    assert rig.get(CSTS) == 0
    assert rig.get(ASQ, 8) == ASQ_AT, "a controller reset keeps it"
    rig.enable()
    assert rig.admin.do(IDENTIFY, 1, prp1=DATA).status == 0
    assert states(rig) == ["ready", "disabled", "ready"]


@pytest.mark.parametrize(
    ("register", "value"),
    [(AQA, 0), (ASQ, ASQ_AT + 0x1000), (CC, ENABLE | 1 << 4), (CC, ENABLE | 1 << 11), (CC, ENABLE | 5 << 7)],
)  # fmt: skip
def test_what_cannot_be_enabled_is_fatal(register: int, value: int) -> None:
    rig = NvmeRig(enable=False)
    rig.set(AQA, 15 | 15 << 16)
    rig.set(ASQ, ASQ_AT, 8)
    rig.set(ACQ, ACQ_AT, 8)
    rig.set(register, value, 8 if register == ASQ else 4)
    if register != CC:
        rig.set(CC, ENABLE | 1 << 7)  # pages of 8 KiB, on which the moved queue does not begin
    assert rig.get(CSTS) == CFS
    rig.set(CC, 0)
    rig.enable()
    assert rig.get(CSTS) == RDY


def test_shutdown_flushes() -> None:
    flushed = []

    class Flushed(RamDisk):
        def flush(self, offset: int = 0, size: int | None = None) -> Steps:
            yield from super().flush(offset, size)
            flushed.append((offset, size))

    rig = NvmeRig(Flushed(1 << 20))
    rig.set(CC, ENABLE | 1 << 14)
    assert rig.get(CSTS) >> 2 & 3 == 1, "occurring"
    rig.drain()
    assert rig.get(CSTS) >> 2 & 3 == 2, "complete"
    assert flushed == [(0, None)]


def test_a_function_reset_forgets_all() -> None:
    rig = NvmeRig()
    queue = rig.io()
    queue.put(command(READ, 0, 0, 7, nsid=1, prp1=DATA))
    queue.ring()
    rig.nvme.step()
    assert rig.port.in_flight
    rig.nvme.reset()
    assert rig.port.in_flight == 0
    assert not rig.nvme.busy
    assert [rig.get(register) for register in (CC, CSTS, AQA, ASQ, ACQ)] == [0] * 5


def test_a_controller_reset_under_load() -> None:
    rig = NvmeRig()
    queue = rig.io()
    for number in range(20):
        queue.put(command(WRITE, 8 * number, 0, 7, nsid=1, prp1=DATA))
    queue.ring()
    for _ in range(7):
        rig.nvme.step()
    rig.set(CC, 0)
    assert rig.port.in_flight == 0
    assert not rig.nvme.busy
    rig.enable()
    assert rig.io().do(READ, 0, 0, 7, nsid=1, prp1=DATA).status == 0


# Interrupts


def test_message_interrupts_are_those_of_the_queue() -> None:
    rig = NvmeRig()
    queue = rig.io(3)
    rig.interrupts.clear()
    queue.do(FLUSH, nsid=1)
    assert rig.interrupts == [3]
    rig.set(INTMS, ~0 & 0xFFFF_FFFF)
    queue.do(FLUSH, nsid=1)
    assert rig.interrupts == [3, 3], "the mask is the pin's"


def test_the_pin_can_be_masked() -> None:
    rig = NvmeRig()
    rig.nvme.pin_enabled = lambda: True
    rig.set(INTMS, 1)
    assert rig.get(INTMS) == rig.get(INTMC) == 1
    rig.admin.put(command(IDENTIFY, 1, prp1=DATA))
    rig.admin.ring()
    rig.drain()
    assert rig.interrupts == []
    rig.set(INTMC, 1)
    assert rig.interrupts == [0]


# Queues


@pytest.mark.parametrize(
    ("opcode", "dwords", "prp1", "status"),
    [
        (CREATE_CQ, (0 | 63 << 16, 3), DATA, 0x101),
        (CREATE_CQ, (17 | 63 << 16, 3), DATA, 0x101),
        (CREATE_CQ, (1 | 63 << 16, 3), DATA, 0x101),
        (CREATE_CQ, (2 | 0 << 16, 3), DATA, 0x102),
        (CREATE_CQ, (2 | 1024 << 16, 3), DATA, 0x102),
        (CREATE_CQ, (2 | 63 << 16, 3 | 17 << 16), DATA, 0x108),
        (CREATE_CQ, (2 | 63 << 16, 2), DATA, 0x002),
        (CREATE_CQ, (2 | 63 << 16, 3), DATA + 8, 0x013),
        (CREATE_SQ, (2 | 63 << 16, 1 | 0 << 16), DATA, 0x101),
        (CREATE_SQ, (2 | 63 << 16, 1 | 17 << 16), DATA, 0x101),
        (CREATE_SQ, (2 | 63 << 16, 1 | 5 << 16), DATA, 0x100),
        (CREATE_SQ, (1 | 63 << 16, 1 | 1 << 16), DATA, 0x101),
        (CREATE_SQ, (0 | 63 << 16, 1 | 1 << 16), DATA, 0x101),
        (CREATE_SQ, (2 | 1024 << 16, 1 | 1 << 16), DATA, 0x102),
        (CREATE_SQ, (2 | 63 << 16, 0 | 1 << 16), DATA, 0x002),
        (CREATE_SQ, (2 | 63 << 16, 1 | 1 << 16), DATA + 64, 0x013),
        (DELETE_CQ, (0,), 0, 0x101),
        (DELETE_CQ, (2,), 0, 0x101),
        (DELETE_CQ, (1,), 0, 0x10C),
        (DELETE_SQ, (0,), 0, 0x101),
        (DELETE_SQ, (2,), 0, 0x101),
    ],
)
def test_queues_that_cannot_be(
    opcode: int, dwords: tuple[int, ...], prp1: int, status: int
) -> None:
    rig = NvmeRig()
    queue = rig.io()
    completion = rig.admin.do(opcode, *dwords, prp1=prp1)
    assert (completion.status, completion.dnr) == (status, True)
    assert queue.do(FLUSH, nsid=1).status == 0


def test_sixteen_pairs_come_and_go() -> None:
    rig = NvmeRig()
    for _ in range(2):
        queues = [rig.io(number) for number in range(1, 17)]
        assert [queue.do(FLUSH, nsid=1).status for queue in queues] == [0] * 16
        for queue in queues:
            assert rig.admin.do(DELETE_SQ, queue.id).status == 0
            assert rig.admin.do(DELETE_CQ, queue.id).status == 0


def test_a_completion_queue_of_several() -> None:
    rig = NvmeRig()
    first = rig.io(1)
    done = rig.admin.do(CREATE_SQ, 2 | 63 << 16, 1 | 1 << 16, prp1=BASE + 0x7_0000)
    assert done.status == 0
    rig.write(BASE + 0x7_0000, command(FLUSH, nsid=1, cid=77))
    rig.doorbell(4, 1)
    rig.drain()
    (completion,) = first.completions()
    assert (completion.sq_id, completion.command_id, completion.sq_head) == (2, 77, 1)


def test_queues_wrap() -> None:
    rig = NvmeRig()
    queue = rig.io(entries=5)
    for _ in range(23):
        completion = queue.do(FLUSH, nsid=1)
        assert (completion.status, completion.sq_head) == (0, queue.tail)


def test_a_full_completion_queue_holds_what_comes_later() -> None:
    rig = NvmeRig()
    queue = rig.io(entries=64)
    rig.admin.do(CREATE_CQ, 2 | 2 << 16, 3 | 2 << 16, prp1=BASE + 0x7_0000)
    rig.admin.do(CREATE_SQ, 2 | 63 << 16, 1 | 2 << 16, prp1=BASE + 0x7_1000)
    for number in range(60):
        rig.write(BASE + 0x7_1000 + 64 * number, command(FLUSH, nsid=1, cid=number))
    rig.doorbell(4, 60)
    rig.drain()
    assert queue.do(FLUSH, nsid=1).status == 0, "others go on"
    seen = 0
    head = 0
    while seen < 60:
        entries = rig.read(BASE + 0x7_0000, 48)
        assert entries[16 * head + 12] | entries[16 * head + 13] << 8 == seen
        seen, head = seen + 1, (head + 1) % 3
        rig.doorbell(5, head)
        rig.drain()
    assert rig.get(CSTS) == RDY


def test_a_deleted_queue_ends_its_commands() -> None:
    rig = NvmeRig()
    queue = rig.io()
    cids = [queue.put(scattered(rig)) for _ in range(4)]
    queue.ring()
    for _ in range(5):
        rig.nvme.step()
    assert rig.port.in_flight
    completion = rig.admin.do(DELETE_SQ, 1)
    assert completion.status == 0
    ended = queue.completions()
    assert {each.command_id for each in ended} == set(cids)
    assert {each.status for each in ended} == {0x008}
    assert rig.port.in_flight == 0


def test_commands_are_aborted_where_they_are() -> None:
    rig = NvmeRig()
    queue = rig.io()
    cid = queue.put(scattered(rig))
    queue.ring()
    for _ in range(4):
        rig.nvme.step()
    rig.admin.put(command(ABORT, 1 | cid << 16))
    rig.admin.ring()
    while not (aborted := rig.admin.completions()):
        rig.nvme.step()
    rig.drain()
    assert aborted[0].result == 0
    assert [each.status for each in queue.completions()] == [0x007]
    assert rig.admin.do(ABORT, 1 | cid << 16).result == 1, "it is over"
    assert rig.admin.do(ABORT, 9 | cid << 16).result == 1, "there is no such queue"


def test_a_command_identifier_in_use() -> None:
    rig = NvmeRig()
    queue = rig.io()
    for place in range(2):
        entry = command(READ, 0, 0, 7, nsid=1, prp1=DATA, cid=5)
        rig.write(queue.sq + 64 * place, entry)
    queue.ring(2)
    rig.drain()
    assert sorted(each.status for each in queue.completions()) == [0, 0x003]


# Fatal


def test_a_command_that_cannot_be_fetched_is_fatal() -> None:
    rig = NvmeRig()
    queue = rig.io()
    rig.port.holes.add(queue.sq)
    queue.put(command(FLUSH, nsid=1))
    queue.ring()
    rig.drain()
    assert rig.get(CSTS) == RDY | CFS
    rig.admin.put(command(IDENTIFY, 1, prp1=DATA))
    rig.admin.ring()
    assert not rig.nvme.busy, "it does nothing any more"
    rig.port.holes.clear()
    rig.set(CC, 0)
    rig.enable()
    assert rig.admin.do(IDENTIFY, 1, prp1=DATA).status == 0


def test_a_completion_that_cannot_be_written_is_fatal() -> None:
    rig = NvmeRig()
    rig.port.holes.add(ACQ_AT)
    rig.admin.put(command(IDENTIFY, 1, prp1=DATA))
    rig.admin.ring()
    rig.drain()
    assert rig.get(CSTS) == RDY | CFS
    assert states(rig) == ["ready", "fatal"]


# Asynchronous events


@pytest.mark.parametrize(
    ("index", "value", "event"), [(40, 1, 0), (3, 64, 1), (3, 1, 1), (2, 64, 1)]
)
def test_wrong_doorbells_are_told(index: int, value: int, event: int) -> None:
    rig = NvmeRig()
    rig.io()
    cid = rig.admin.put(command(ASYNC_EVENT))
    rig.admin.ring()
    rig.drain()
    assert rig.admin.completions() == []
    rig.doorbell(index, value)
    rig.drain()
    (told,) = rig.admin.completions()
    assert (told.command_id, told.result) == (cid, event << 8 | 1 << 16)
    # The next one is told when the log page was read.
    rig.admin.put(command(ASYNC_EVENT))
    rig.admin.ring()
    rig.doorbell(index, value)
    rig.drain()
    assert rig.admin.completions() == []
    rig.admin.put(command(GET_LOG, 1 | 15 << 16, prp1=DATA))
    rig.admin.ring()
    rig.drain()
    assert sorted(each.result for each in rig.admin.completions()) == [0, event << 8 | 1 << 16]


def test_event_requests_are_limited_and_can_be_aborted() -> None:
    rig = NvmeRig()
    cids = [rig.admin.put(command(ASYNC_EVENT)) for _ in range(5)]
    rig.admin.ring()
    rig.drain()
    (refused,) = rig.admin.completions()
    assert (refused.command_id, refused.status) == (cids[4], 0x105)
    rig.admin.put(command(ABORT, 0 | cids[1] << 16))
    rig.admin.ring()
    rig.drain()
    ended = {each.command_id: each.status for each in rig.admin.completions()}
    assert ended.pop(cids[1]) == 0x007
    assert list(ended.values()) == [0]


def test_a_doorbell_of_more_than_the_ring_fetches_nothing() -> None:
    rig = NvmeRig()
    queue = rig.io()
    queue.ring(64)
    assert not rig.nvme.busy
    assert rig.read(DATA, BLOCK) == bytes(BLOCK)


def test_a_temperature_that_is_told_once() -> None:
    rig = NvmeRig()

    def request() -> list[int]:
        rig.admin.put(command(ASYNC_EVENT))
        rig.admin.ring()
        rig.drain()
        return [each.result for each in rig.admin.completions()]

    def warning() -> int:
        rig.admin.do(GET_LOG, 2 | 127 << 16, prp1=DATA)
        return rig.read(DATA, 1)[0]

    assert request() == []
    assert rig.admin.do(SET_FEATURES, 4, 290).status == 0
    assert warning() == 2, "300 K are more"
    rig.admin.put(command(SET_FEATURES, 11, 2))
    rig.admin.ring()
    rig.drain()
    assert sorted(each.result for each in rig.admin.completions()) == [0, 1 | 1 << 8 | 2 << 16]
    assert warning() == 2
    assert request() == [], "it was told"
    assert rig.admin.do(SET_FEATURES, 4, 301).status == 0
    assert warning() == 0
    rig.admin.put(command(SET_FEATURES, 4, 300 | 1 << 20))  # the least that it may be
    rig.admin.ring()
    rig.drain()
    assert len(rig.admin.completions()) == 2
    assert warning() == 2


def test_sizes_of_entries_may_come_after_the_enable() -> None:
    """They count when an I/O queue is created."""
    rig = NvmeRig(enable=False)
    rig.set(AQA, ADMIN_ENTRIES - 1 | ADMIN_ENTRIES - 1 << 16)
    rig.set(ASQ, ASQ_AT, 8)
    rig.set(ACQ, ACQ_AT, 8)
    rig.set(CC, 1)
    rig.admin = Queue(rig, 0, ASQ_AT, ACQ_AT, ADMIN_ENTRIES)
    assert rig.admin.do(CREATE_CQ, 1 | 1 << 16, 1, prp1=DATA).status == 0x002
    rig.set(CC, ENABLE)
    assert rig.admin.do(CREATE_CQ, 1 | 1 << 16, 1, prp1=DATA).status == 0
