"""What the test engine moves, in which steps, as whom, and how it ends when it cannot."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine_rig import (
    BASE,
    ERROR,
    HALTED,
    MEMCPY,
    RAND48,
    SUM64,
    Machine,
    span,
)
from viommu.endpoints.pattern import PAGE, PIECE, rand48, transactions
from viommu.endpoints.port import DmaAttributes
from viommu.endpoints.test_engine import EngineEnded, SmmuTestEngine
from viommu.layouts.test_engine import (
    BAR_SIZE,
    NO_SUBSTREAM_ID,
    UserFrame,
    privileged_frame,
    user_frame,
)

# ---- the commands


@settings(deadline=None, max_examples=60)
@given(
    source=st.integers(0, 3 * PAGE),
    size=st.integers(1, 40 * PAGE),
    destination=st.integers(0, 3 * PAGE),
    seed=st.sampled_from([0, 0xFFFF_FFFF, 1, 77, 0x8000_0000]),
    rate=st.sampled_from([0, 0, 65535, 999, 64]),
)
def test_memcpy_copies_the_range_and_nothing_else(
    source: int, size: int, destination: int, seed: int, rate: int
) -> None:
    machine = Machine()
    machine.fill()
    expected = bytearray(machine.ram)
    place = (1 << 19) + destination
    expected[place : place + size] = machine.ram[source : source + size]
    status = machine.run(MEMCPY, udata0=BASE + place, seed=seed, rate=rate, **span(source, size))
    assert status == HALTED
    assert machine.ram == expected
    reads = [(iova, length) for iova, length, write, *_ in machine.port.seen if not write]
    begin = BASE + source
    limit = min(PIECE, rate * 64 or PIECE)
    assert reads == list(transactions(begin, begin + size - 1, 1, seed, limit))


def test_memcpy_with_a_stride_copies_single_words() -> None:
    machine = Machine()
    machine.fill()
    expected = bytearray(machine.ram)
    for n in range(0, 0x1000, 0x40):
        expected[0x8000 + n : 0x8008 + n] = expected[n : n + 8]
    # Neither begin nor destination are aligned: both are taken down to a word.
    fields = {"begin": BASE + 5, "end_incl": BASE + 0xFC1, "udata0": BASE + 0x8003}
    assert machine.run(MEMCPY, stride=0x40, seed=12345, udata1=7, **fields) == HALTED
    assert machine.ram == expected
    assert machine.get(UserFrame.udata1) == 7
    assert {size for _, size, *_ in machine.port.seen} == {8}


@settings(deadline=None, max_examples=60)
@given(
    start=st.integers(0, 2 * PAGE),
    size=st.integers(1, 20 * PAGE),
    seed=st.integers(0, 0xFFFF_FFFF),
    rate=st.sampled_from([0, 1000]),
)
def test_rand48_writes_the_pattern_whatever_the_order(
    start: int, size: int, seed: int, rate: int
) -> None:
    machine = Machine()
    expected = bytearray(machine.ram)
    expected[start : start + size] = rand48(seed, BASE + start, BASE + start, size)
    assert machine.run(RAND48, seed=seed, rate=rate, **span(start, size)) == HALTED
    assert machine.ram == expected


def test_rand48_with_a_stride_seeds_each_word_with_its_address() -> None:
    machine = Machine()
    expected = bytearray(machine.ram)
    for address in range(BASE + 0x100, BASE + 0x3000, 24):
        offset = address - BASE
        expected[offset : offset + 8] = rand48(3, address, address, 8)
    assert (
        machine.run(RAND48, seed=3, stride=24, begin=BASE + 0x101, end_incl=BASE + 0x2FFF) == HALTED
    )
    assert machine.ram == expected


@settings(deadline=None, max_examples=40)
@given(
    start=st.integers(0, 1000).map(lambda n: n * 8),
    words=st.integers(1, 80_000),
    stride=st.sampled_from([1, 1, 8 * 1001]),
    seed=st.sampled_from([0, 0xFFFF_FFFF, 5]),
)
def test_sum64_adds_up(start: int, words: int, stride: int, seed: int) -> None:
    machine = Machine()
    machine.fill()
    before = bytes(machine.ram)
    fields = span(start, words * 8)
    assert machine.run(SUM64, stride=stride, seed=seed, **fields) == HALTED
    step = 1 if stride == 1 else stride // 8
    values = memoryview(before)[start : start + words * 8].cast("Q")[::step]
    assert machine.get(UserFrame.udata1) == sum(values) % (1 << 64)
    assert machine.ram == before


# ---- transactions in flight


def test_a_transaction_is_in_flight_between_two_steps() -> None:
    machine = Machine()
    machine.fill()
    before = bytes(machine.ram)
    assert machine.start(MEMCPY, udata0=BASE + 0x8000, **span(0, 0x1000)) == MEMCPY
    in_flight = []
    while machine.engine.busy:
        assert machine.ram[0x8000:0x9000] == before[0x8000:0x9000]
        more = machine.engine.step()
        assert more == machine.engine.busy
        in_flight.append(machine.port.in_flight)
    # Read begun, read done, write begun, write done.
    assert in_flight == [1, 0, 1, 0]
    assert machine.ram[0x8000:0x9000] == before[0:0x1000]
    assert not machine.engine.step()


def test_the_counts_tell_how_far_a_command_is_and_go_on() -> None:
    machine = Machine(4 << 20)
    size = 4 * PIECE
    counts = []
    machine.start(RAND48, **span(0, size))
    while machine.engine.busy:
        machine.engine.step()
        launched = machine.get(UserFrame.count_of_transactions_launched)
        counts.append((launched, machine.get(UserFrame.count_of_transactions_returned)))
    assert counts == [(1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4)]
    machine.run(RAND48, **span(0, size))
    assert machine.get(UserFrame.count_of_transactions_returned) == 8
    machine.engine.write(0, user_frame(0) + 8, 8, 2**64 - 1)
    machine.run(RAND48, **span(0, 8))
    assert machine.get(UserFrame.count_of_transactions_launched) == 0


def test_the_rate_paces_a_command() -> None:
    machine = Machine()
    size = 64 * PAGE
    machine.start(RAND48, **span(0, size))
    assert machine.drain() == 2
    machine.start(RAND48, rate=4, **span(0, size))
    assert machine.drain() == 2 * size // 256


def test_a_running_frame_ignores_writes_to_both_halves() -> None:
    machine = Machine()
    machine.start(RAND48, 4, **span(0, 8 * PAGE), rate=PAGE // 64)
    machine.engine.step()
    halves = [user_frame(4), privileged_frame(4)]
    before = [machine.engine.read(0, half, 128) for half in halves]
    for half in halves:
        for offset in range(0, 128, 4):
            machine.engine.write(0, half + offset, 4, 1)
    machine.engine.write(0, 0, BAR_SIZE, int.from_bytes(b"\xaa" * BAR_SIZE, "little"))
    assert [machine.engine.read(0, half, 128) for half in halves] == before
    assert machine.engine.read(0, user_frame(3) + 8, 8) == 0xAAAA_AAAA_AAAA_AAAA
    machine.drain()
    assert machine.get(UserFrame.cmd, 4) == HALTED
    assert machine.ram[: 8 * PAGE] == rand48(0, BASE, BASE, 8 * PAGE)


def test_frames_take_turns_in_an_order_that_a_seed_repeats() -> None:
    def writes(order: random.Random | None) -> list[int]:
        machine = Machine(order=order)
        for frame in range(8):
            machine.start(RAND48, frame, **span(frame * 0x10000, 4 * PAGE), rate=64)
        machine.drain()
        return [(iova - BASE) >> 16 for iova, *_ in machine.port.seen]

    plain = writes(None)
    assert plain == list(range(8)) * 4
    shuffled = writes(random.Random(4))
    assert shuffled != plain
    assert all(sorted(shuffled[at : at + 8]) == list(range(8)) for at in range(0, 32, 8))
    assert shuffled == writes(random.Random(4)) != writes(random.Random(5))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_reset_ends_what_is_in_flight_and_moves_nothing_more(steps: int) -> None:
    machine = Machine()
    machine.fill()
    machine.start(MEMCPY, udata0=BASE + 0x8_0000, **span(0, 2 * PIECE), msiaddress=1)
    machine.start(RAND48, 1, **span(0x4_0000, 2 * PIECE), msiaddress=1)
    for _ in range(steps):
        machine.engine.step()
    before = bytes(machine.ram)
    machine.engine.reset()
    assert machine.port.in_flight == 0
    assert not machine.engine.busy
    assert not machine.engine.step()
    assert machine.ram == before
    assert machine.interrupts == []
    fresh = SmmuTestEngine(machine.port)
    assert machine.engine.read(0, 0, BAR_SIZE) == fresh.read(0, 0, BAR_SIZE)
    assert machine.run(RAND48, **span(0, 64)) == HALTED


# ---- who it is that asks


@pytest.mark.parametrize("substream_id", [None, 0, 1, 0xFFFFF])
def test_attributes_and_substream_of_each_direction(substream_id: int | None) -> None:
    machine = Machine()
    machine.run(
        MEMCPY,
        **span(0, 64),
        udata0=BASE + 0x1000,
        substreamid=NO_SUBSTREAM_ID if substream_id is None else substream_id,
        source_privileged=True,
        destination_instruction=True,
        source_non_secure=True,
        destination_memory_type=0xFF,
    )
    assert machine.port.seen == [
        (BASE, 64, False, substream_id, DmaAttributes(privileged=True, instruction=False)),
        (BASE + 0x1000, 64, True, substream_id, DmaAttributes(privileged=False, instruction=True)),
    ]


@pytest.mark.parametrize(
    ("attributes", "privileged", "instruction"), [(0x42FF_42FF, 0, 0), (0x0500_0100, 1, 1)]
)
def test_the_attributes_register_as_software_writes_it(
    attributes: int, privileged: int, instruction: int
) -> None:
    machine = Machine()
    machine.start(HALTED, **span(0, 8))
    machine.engine.write(0, 0x20, 4, attributes)
    machine.engine.write(0, 0, 4, RAND48)
    machine.drain()
    assert machine.port.seen[0][4] == DmaAttributes(bool(privileged), bool(instruction))


# ---- errors


@pytest.mark.parametrize("command", [RAND48, MEMCPY, SUM64])
def test_an_abort_gives_the_first_byte_that_did_not_move(command: int) -> None:
    machine = Machine()
    machine.fill()
    before = bytes(machine.ram)
    hole = BASE + 0x5000
    machine.port.holes = {hole}
    status = machine.run(
        command, **span(0x1008, 0x8000), udata0=BASE + 0x8_0000, udata1=5, msiaddress=1
    )
    assert status == ERROR
    assert machine.get(UserFrame.udata2) == hole
    assert machine.get(UserFrame.udata1) == 5
    assert machine.interrupts == [0]
    assert machine.get(UserFrame.count_of_transactions_launched) == 1
    assert machine.get(UserFrame.count_of_transactions_returned) == 1
    expected = bytearray(before)
    if command == RAND48:
        expected[0x1008:0x5000] = rand48(0, BASE + 0x1008, BASE + 0x1008, 0x3FF8)
    elif command == MEMCPY:
        expected[0x8_0000:0x8_3FF8] = before[0x1008:0x5000]
    assert machine.ram == expected
    assert isinstance(machine.events[-1], EngineEnded)
    assert machine.events[-1].error_address == hole


def test_an_abort_in_the_destination_gives_its_address() -> None:
    machine = Machine()
    machine.fill()
    before = bytes(machine.ram)
    machine.port.holes = {BASE + 0x8_2000, BASE + 0x6000}
    assert machine.run(MEMCPY, **span(0x10, 0x8000), udata0=BASE + 0x8_0000) == ERROR
    assert machine.get(UserFrame.udata2) == BASE + 0x8_2000
    assert machine.ram[0x8_0000:0x8_2000] == before[0x10:0x2010]
    assert machine.ram[0x8_2000:] == before[0x8_2000:]


def test_an_abort_leaves_other_frames_alone() -> None:
    machine = Machine()
    machine.port.holes = {BASE}
    machine.start(RAND48, 0, **span(0, 64))
    machine.start(RAND48, 1, **span(0x1000, 64))
    machine.drain()
    assert [machine.get(UserFrame.cmd, frame) for frame in (0, 1)] == [ERROR, HALTED]
    machine.port.holes = set()
    assert machine.run(RAND48, 0, **span(0, 64)) == HALTED


def test_outside_of_memory_and_with_bus_master_off() -> None:
    machine = Machine()
    assert machine.run(SUM64, begin=0x1000, end_incl=0x1FFF) == ERROR
    assert machine.get(UserFrame.udata2) == 0x1000
    # smmute provokes faults with the complement of a good address.
    assert (
        machine.run(RAND48, begin=~BASE & 2**64 - 1, end_incl=(~BASE & 2**64 - 1) + 0xFFF) == ERROR
    )
    assert machine.get(UserFrame.udata2) == ~BASE & 2**64 - 1
    machine.port.bus_master = False
    assert machine.run(RAND48, **span(0x40, 64)) == ERROR
    assert machine.get(UserFrame.udata2) == BASE + 0x40
    assert not any(machine.ram)


def test_what_was_read_before_a_bus_abort_is_still_written() -> None:
    machine = Machine()
    machine.fill()
    before = bytes(machine.ram)
    assert machine.run(MEMCPY, **span(0xF_F000, 0x3000), udata0=BASE + 0x100) == ERROR
    assert machine.get(UserFrame.udata2) == BASE + 0x10_0000
    assert machine.ram[0x100:0x1100] == before[0xF_F000:]
    assert machine.ram[0x1100:] == before[0x1100:]


def test_memory_that_goes_away_in_flight_is_an_error() -> None:
    machine = Machine()
    machine.start(RAND48, **span(0, 64))
    machine.engine.step()
    machine.memory.remove_region(BASE, 1 << 20)
    assert not machine.engine.step()
    assert machine.get(UserFrame.cmd) == ERROR
    assert machine.get(UserFrame.udata2) == BASE
    assert machine.port.in_flight == 0
