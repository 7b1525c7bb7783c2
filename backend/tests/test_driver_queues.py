"""The queues, with the test playing the hardware. Register offsets and command bits are spelled out from IHI 0070."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.driver.access import MappedRegisters, Poll
from viommu.driver.arena import Arena
from viommu.driver.errors import CommandQueueError, DriverTimeout
from viommu.driver.queues import CommandQueue, Completion, EventQueue, Ring
from viommu.layouts.commands import Opcode, StreamCommand, TlbiCommand
from viommu.layouts.records import EventType

RAM = 0x8000_0000
GERROR, GERRORN = 0x60, 0x64
CMDQ_BASE, CMDQ_PROD, CMDQ_CONS = 0x90, 0x98, 0x9C
EVENTQ_BASE, EVENTQ_PROD, EVENTQ_CONS = 0xA0, 0x1_00A8, 0x1_00AC


class Hardware:
    """A register file that only stores, memory, and what the test does while the driver polls."""

    def __init__(self) -> None:
        self.ram = memoryview(bytearray(1 << 20))
        self.arena = Arena([(RAM, self.ram)])
        self.frame = memoryview(bytearray(0x2_0000))
        self.registers = MappedRegisters(self.frame)
        self.act: Callable[[], None] = lambda: None
        self.poll = Poll(timeout=0.2, relax=lambda: self.act())

    def read(self, offset: int) -> int:
        return int.from_bytes(self.frame[offset : offset + 4], "little")

    def write(self, offset: int, value: int) -> None:
        self.frame[offset : offset + 4] = value.to_bytes(4, "little")

    def queue(self, log2size: int = 3, completion: Completion = Completion.CONS) -> CommandQueue:
        queue = CommandQueue(self.registers, self.arena, log2size, self.poll, completion)
        queue.program()
        return queue

    def command(self, index: int) -> tuple[int, int]:
        base = self.read(CMDQ_BASE) & ~0x1F
        words = self.ram[base - RAM + 16 * index :][:16].cast("Q")
        return words[0], words[1]

    def fail(self, code: int, index: int) -> None:
        """Stop at a command."""
        self.write(CMDQ_CONS, code << 24 | index)
        self.write(GERROR, self.read(GERRORN) ^ 1)

    def complete(self) -> None:
        """Consume everything, and signal the last CMD_SYNC. ERR stays as it was."""
        prod, cons = self.read(CMDQ_PROD), self.read(CMDQ_CONS)
        self.write(CMDQ_CONS, cons & 0x7F << 24 | prod)
        low, address = self.command(prod - 1)
        if address:
            self.ram[address - RAM : address - RAM + 4] = (low >> 32).to_bytes(4, "little")


@pytest.fixture
def hardware() -> Hardware:
    return Hardware()


@pytest.fixture(params=Completion)
def completion(request: pytest.FixtureRequest) -> Completion:
    found: Completion = request.param
    return found


def cfgi(stream_id: int) -> StreamCommand:
    return StreamCommand(opcode=Opcode.CMD_CFGI_STE, stream_id=stream_id, leaf_or_range=1)


def test_program_writes_base_and_empties(hardware: Hardware) -> None:
    hardware.write(CMDQ_PROD, 5)
    hardware.write(CMDQ_CONS, 5)
    queue = hardware.queue(log2size=8)
    base = int.from_bytes(hardware.frame[CMDQ_BASE : CMDQ_BASE + 8], "little")
    assert base == 1 << 62 | queue.buffer.address | 8
    assert queue.buffer.address % (16 << 8) == 0
    assert (hardware.read(CMDQ_PROD), hardware.read(CMDQ_CONS)) == (0, 0)


def test_commands_are_bit_exact(hardware: Hardware) -> None:
    queue = hardware.queue(log2size=4)
    queue.issue(
        cfgi(0x1234),
        StreamCommand(opcode=Opcode.CMD_CFGI_STE_RANGE, leaf_or_range=31),
        StreamCommand(
            opcode=Opcode.CMD_CFGI_CD, stream_id=0x10, substream_id=0x5_4321, leaf_or_range=1
        ),
        TlbiCommand(opcode=Opcode.CMD_TLBI_NH_ASID, asid=0xABCD),
        TlbiCommand(opcode=Opcode.CMD_TLBI_NH_VA, asid=7, leaf=True, address=0xFFFF_1234_5678_9000),
        TlbiCommand(opcode=Opcode.CMD_TLBI_NSNH_ALL),
    )
    assert hardware.read(CMDQ_PROD) == 6
    assert [hardware.command(n) for n in range(6)] == [
        (0x0000_1234_0000_0003, 1),
        (0x0000_0000_0000_0004, 31),
        (0x0000_0010_5432_1005, 1),
        (0xABCD_0000_0000_0011, 0),
        (0x0007_0000_0000_0012, 0xFFFF_1234_5678_9001),
        (0x0000_0000_0000_0030, 0),
    ]


@pytest.mark.parametrize(
    ("completion", "first_word"), [(Completion.CONS, 0x46), (Completion.SEV, 0x2046)]
)
def test_sync_by_polling_cons(hardware: Hardware, completion: Completion, first_word: int) -> None:
    queue = hardware.queue(completion=completion)
    polls = 0

    def consume() -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            hardware.write(CMDQ_CONS, 2)

    hardware.act = consume
    queue.issue(cfgi(1))
    queue.sync()
    assert polls == 3
    assert hardware.command(1) == (first_word, 0)


def test_sync_by_message_waits_for_its_own_number(hardware: Hardware) -> None:
    queue = hardware.queue(completion=Completion.MSI)
    seen: list[tuple[int, int]] = []

    def send() -> None:
        index = len(seen)
        low, address = hardware.command(index)
        seen.append((low, address))
        hardware.ram[address - RAM : address - RAM + 4] = (low >> 32).to_bytes(4, "little")

    hardware.act = send
    queue.sync()
    queue.sync()
    # CS = 1, MSH = inner shareable, MSIAttr = write-back, and a number that grows.
    assert [low for low, _ in seen] == [0x1_0FC0_1046, 0x2_0FC0_1046]
    assert all(RAM <= address < RAM + (1 << 20) and not address & 3 for _, address in seen)
    hardware.act = lambda: None
    with pytest.raises(DriverTimeout, match="CMD_SYNC"):
        queue.sync()  # the word in memory is the second number still


def test_wrap_and_full_queue(hardware: Hardware) -> None:
    queue = hardware.queue(log2size=2)
    consumed: list[int] = []

    def consume_one() -> None:
        prod, cons = hardware.read(CMDQ_PROD), hardware.read(CMDQ_CONS)
        if prod != cons:
            consumed.append(hardware.command(cons & 3)[0] >> 32)
            hardware.write(CMDQ_CONS, cons + 1 & 7)

    hardware.act = consume_one
    queue.issue(*(cfgi(n) for n in range(23)))
    assert hardware.read(CMDQ_PROD) == 23 & 7
    while hardware.read(CMDQ_CONS) != hardware.read(CMDQ_PROD):
        consume_one()
    assert consumed == list(range(23))


def test_a_queue_that_stays_full_times_out(hardware: Hardware) -> None:
    queue = hardware.queue(log2size=1)
    queue.issue(cfgi(0), cfgi(1))
    with pytest.raises(DriverTimeout, match="room in the command queue"):
        queue.issue(cfgi(2))
    assert hardware.read(CMDQ_PROD) == 2
    assert hardware.command(0) == (0x3, 1)  # nothing was overwritten


@pytest.mark.parametrize(("code", "name"), [(1, "CERROR_ILL"), (2, "CERROR_ABT")])
def test_an_error_is_raised_once_and_acknowledged(
    hardware: Hardware, completion: Completion, code: int, name: str
) -> None:
    queue = hardware.queue(completion=completion)

    hardware.act = lambda: hardware.fail(code, 1)
    queue.issue(cfgi(1), cfgi(2))
    with pytest.raises(CommandQueueError, match=f"{name} at command 1") as caught:
        queue.sync()
    assert (caught.value.code, caught.value.index) == (code, 1)
    assert caught.value.entry == 1 << 64 | 0x2_0000_0003
    assert hardware.read(GERRORN) == 1
    # Only the command that is itself at fault gives way to a CMD_SYNC.
    assert hardware.command(1) == ((0x46, 0) if code == 1 else (0x2_0000_0003, 1))

    hardware.act = hardware.complete
    queue.sync()


def test_an_invalidation_of_before_that_fails_is_not_that_of_the_next_sync(
    hardware: Hardware, completion: Completion
) -> None:
    queue = hardware.queue(completion=completion)
    queue.begin_sync()  # nobody waits for it any more

    def fail_once() -> None:
        hardware.fail(3, 0)
        hardware.act = hardware.complete

    hardware.act = fail_once
    queue.sync()
    assert hardware.read(GERRORN) == 1
    # Nor does one go on for ever.
    hardware.act = lambda: hardware.fail(3, 0)
    with pytest.raises(CommandQueueError, match="CERROR_ATC_INV_SYNC at command 0"):
        queue.sync()


def test_who_waits_for_a_sync_that_fails_hears_of_it_though_another_saw_it(
    hardware: Hardware, completion: Completion
) -> None:
    queue = hardware.queue(completion=completion)

    def fail_once() -> None:
        hardware.fail(3, 0)
        hardware.act = hardware.complete

    def meanwhile() -> None:
        hardware.act = fail_once
        queue.sync()

    hardware.act = meanwhile
    with pytest.raises(CommandQueueError, match="CERROR_ATC_INV_SYNC at command 0"):
        queue.sync()
    queue.sync()


def test_an_error_of_another_kind_is_left_alone(hardware: Hardware) -> None:
    queue = hardware.queue()
    hardware.write(GERROR, 4)
    hardware.act = lambda: hardware.write(CMDQ_CONS, hardware.read(CMDQ_PROD))
    queue.sync()
    assert hardware.read(GERRORN) == 0


@given(st.integers(0, 19), st.integers(0, 1 << 21), st.integers(0, 1 << 21))
def test_ring_arithmetic(log2size: int, start: int, count: int) -> None:
    ring = Ring(log2size)
    count %= ring.entries + 1
    cons = ring.advance(0, start)
    prod = ring.advance(cons, count)
    assert prod >> log2size <= 1
    assert ring.used(prod, cons) == count
    assert ring.index(cons) == start % (1 << log2size)


# The event queue


def put(hardware: Hardware, queue: EventQueue, index: int, record: bytes) -> None:
    place = queue.buffer.address - RAM + 32 * index
    hardware.ram[place : place + 32] = record


def event_queue(hardware: Hardware, log2size: int = 2) -> EventQueue:
    queue = EventQueue(hardware.registers, hardware.arena, log2size)
    queue.program()
    return queue


def test_records_are_decoded_and_their_places_freed(hardware: Hardware) -> None:
    queue = event_queue(hardware)
    base = int.from_bytes(hardware.frame[EVENTQ_BASE : EVENTQ_BASE + 8], "little")
    assert base == 1 << 62 | queue.buffer.address | 2
    words = (0x0000_0010_0000_0010, 0x0000_020A_0000_0000, 0xFFFF_8000_1234_5678, 0)
    put(hardware, queue, 0, b"".join(word.to_bytes(8, "little") for word in words))
    hardware.write(EVENTQ_PROD, 1)
    (record,) = queue.read()
    assert record.event is EventType.F_TRANSLATION
    assert (record.stream_id, record.address) == (0x10, 0xFFFF_8000_1234_5678)
    assert (record.rnw, record.pnu, record.fault_class) == (True, True, 2)
    assert hardware.read(EVENTQ_CONS) == 1
    assert queue.read() == []


def test_event_queue_wraps(hardware: Hardware) -> None:
    queue = event_queue(hardware)
    for number in range(11):
        put(hardware, queue, number % 4, bytes([2, 0, 0, 0, number]) + bytes(27))
        hardware.write(EVENTQ_PROD, number + 1 & 7)
        assert [record.stream_id for record in queue.read()] == [number]
        assert hardware.read(EVENTQ_CONS) == number + 1 & 7


def test_overflow_is_acknowledged_and_counted(hardware: Hardware) -> None:
    queue = event_queue(hardware)
    for index in range(4):
        put(hardware, queue, index, bytes([2, 0, 0, 0, index]) + bytes(27))
    hardware.write(EVENTQ_PROD, 1 << 31 | 4)
    assert [record.stream_id for record in queue.read()] == [0, 1, 2, 3]
    assert queue.overflows == 1
    assert hardware.read(EVENTQ_CONS) == 1 << 31 | 4
    assert queue.read() == []
    assert queue.overflows == 1
    put(hardware, queue, 0, bytes([2, 0, 0, 0, 9]) + bytes(27))
    hardware.write(EVENTQ_PROD, 5)  # a second overflow toggles the flag back
    assert [record.stream_id for record in queue.read()] == [9]
    assert queue.overflows == 2
    assert hardware.read(EVENTQ_CONS) == 5
