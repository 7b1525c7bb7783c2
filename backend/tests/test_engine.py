"""The test engine's registers, what they refuse, its interrupts and its events."""

import random

import pytest

from tests.engine_rig import (
    BASE,
    ERROR,
    HALTED,
    MEMCPY,
    MISCONFIGURED,
    RAND48,
    SUM64,
    Machine,
    span,
)
from viommu.endpoints.base import Bar, Endpoint
from viommu.endpoints.engine_work import SIZE_LIMIT
from viommu.endpoints.pattern import PIECE
from viommu.endpoints.test_engine import EngineEnded, EngineRefused, EngineStarted, SmmuTestEngine
from viommu.layouts.test_engine import (
    BAR_SIZE,
    FRAME_COUNT,
    NO_SUBSTREAM_ID,
    PrivilegedFrame,
    UserFrame,
    privileged_frame,
    user_frame,
)


def test_it_is_an_endpoint_with_the_ids_that_drivers_bind_to() -> None:
    engine: Endpoint = Machine().engine
    assert (engine.identity.vendor_id, engine.identity.device_id) == (0x13B5, 0xFF80)
    assert engine.bars == (Bar(0, BAR_SIZE, prefetchable=False),)
    assert not SmmuTestEngine(Machine().port).interrupt(0)


# ---- registers


def test_reset_values_and_what_is_not_there() -> None:
    machine = Machine()
    engine = machine.engine
    for frame in range(FRAME_COUNT):
        assert engine.read(0, user_frame(frame), 8) == HALTED
        assert engine.read(0, privileged_frame(frame), 4) == 1
        assert machine.get(PrivilegedFrame.substreamid, frame) == NO_SUBSTREAM_ID
    for frame in (FRAME_COUNT, 511):
        for page in (user_frame(frame), privileged_frame(frame)):
            engine.write(0, page, 4, 1)
            engine.write(0, page + 8, 8, 2**64 - 1)
            assert engine.read(0, page, 128) == 0
    for bar, offset in ((0, BAR_SIZE), (0, -8), (1, 0), (0, 1 << 70)):
        engine.write(bar, offset, 8, 2**64 - 1)
        assert engine.read(bar, offset, 8) == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 3])
def test_fields_take_any_size_of_access(size: int) -> None:
    engine = Machine().engine
    start = user_frame(5) + 0x28
    data = random.Random(size).randbytes(48)
    for offset in range(0, 48, size):
        engine.write(
            0, start + offset, size, int.from_bytes(data[offset : offset + size], "little")
        )
    assert engine.read(0, start, 48).to_bytes(48, "little") == data
    assert engine.read(0, start + 7, 9).to_bytes(9, "little") == data[7:16]
    assert engine.read(0, user_frame(4), 128) == HALTED
    assert engine.read(0, user_frame(6), 128) == HALTED


def test_cmd_takes_only_a_whole_access() -> None:
    machine = Machine()
    engine, frame = machine.engine, user_frame(3)
    machine.start(HALTED, 3, **span(0, 16))
    for offset, size in ((0, 1), (0, 2), (1, 4), (2, 2), (0, 8), (3, 1), (-4, 8)):
        engine.write(0, frame + offset, size, int.from_bytes(b"\3\0\0\0\0\0\0\0" * 2, "little"))
        assert machine.get(UserFrame.cmd, 3) == HALTED
        assert not engine.busy
    engine.write(0, frame, 8, 0x0005_0000_0000_0003)
    assert machine.get(UserFrame.rate, 3) == 5
    engine.write(0, user_frame(2) + 120, 24, (7 << 64) + 9 + (0xAB << 128))
    assert machine.get(UserFrame.udata7, 2) == 9
    assert (machine.get(UserFrame.cmd, 3), machine.get(UserFrame.rate, 3)) == (HALTED, 0)
    assert engine.read(0, frame + 8, 1) == 0xAB


def test_no_access_through_pci_makes_a_frame_secure() -> None:
    machine = Machine()
    for value, expected in ((0, 1), (0x300, 0x301), (2**32 - 1, 2**32 - 1)):
        machine.engine.write(0, privileged_frame(7), 4, value)
        assert machine.engine.read(0, privileged_frame(7), 4) == expected
    machine.engine.write(0, privileged_frame(7) + 8, 4, 0x1234)
    assert machine.get(PrivilegedFrame.streamid, 7) == 0x1234


@pytest.mark.parametrize("command", [0, 1])
def test_no_frame_and_halted_both_halt(command: int) -> None:
    machine = Machine()
    assert machine.start(99) == MISCONFIGURED
    assert machine.start(command) == HALTED
    assert not machine.engine.busy


# ---- what is misconfigured

WORDS = {"begin": BASE, "end_incl": BASE + 63}


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        (5, WORDS),
        (0x8000_0002, WORDS),
        (MISCONFIGURED, WORDS),
        (ERROR, WORDS),
        (MEMCPY, {**WORDS, "stride": 0}),
        (RAND48, {**WORDS, "stride": 0}),
        (SUM64, {**WORDS, "stride": 0}),
        (RAND48, {**WORDS, "stride": 2}),
        (RAND48, {**WORDS, "stride": 12}),
        (RAND48, {**WORDS, "stride": 2**64 - 1}),
        (RAND48, {"begin": 7, "end_incl": 2**64 - 8, "stride": 2**63}),
        (RAND48, {"begin": 0, "end_incl": 2**64 - 1}),
        (RAND48, {"begin": BASE, "end_incl": BASE - 1}),
        (RAND48, {"begin": 0, "end_incl": SIZE_LIMIT}),
        (RAND48, {"begin": 0, "end_incl": SIZE_LIMIT, "stride": 8}),
        (SUM64, {"begin": BASE + 4, "end_incl": BASE + 63}),
        (SUM64, {"begin": BASE, "end_incl": BASE + 64}),
        (SUM64, {"begin": BASE + 1, "end_incl": BASE + 62, "stride": 8}),
        (MEMCPY, {**WORDS, "udata0": 2**64 - 63}),
        (MEMCPY, {**WORDS, "udata0": 2**64 - 1, "stride": 8}),
        (RAND48, {**WORDS, "msiaddress": 2}),
        (RAND48, {**WORDS, "msiaddress": 0x802_0040}),
        (RAND48, {**WORDS, "msiaddress": 1, "msidata": 2048}),
        (RAND48, {**WORDS, "substreamid": 1 << 20}),
        (RAND48, {**WORDS, "substreamid": 0xFFFF_FFFE}),
        (RAND48, {**WORDS, "downstream_port_index": 1}),
    ],
)
def test_misconfigured_is_read_at_once_and_does_nothing(
    command: int, fields: dict[str, int]
) -> None:
    machine = Machine()
    assert machine.start(command, 9, **fields) == MISCONFIGURED
    assert not machine.engine.busy
    assert not machine.engine.step()
    assert machine.port.seen == []
    assert machine.interrupts == []
    assert not any(machine.ram)
    assert [type(event) for event in machine.events] == [EngineRefused]
    # It is as good as halted: the frame can be set up again.
    assert (
        machine.run(RAND48, 9, **WORDS, substreamid=NO_SUBSTREAM_ID, downstream_port_index=0)
        == HALTED
    )


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        (RAND48, {"begin": 8, "end_incl": 2**64 - 1, "stride": 2**63}),
        (RAND48, {"begin": 0, "end_incl": SIZE_LIMIT - 1}),
        (RAND48, {"begin": 0, "end_incl": SIZE_LIMIT - 1, "stride": 8}),
        (RAND48, {"begin": 1 << 40, "end_incl": 1 << 50, "stride": 1 << 30}),
        (MEMCPY, {**WORDS, "udata0": 2**64 - 64}),
        (RAND48, {**WORDS, "msiaddress": 1, "msidata": 2047}),
        (RAND48, {**WORDS, "msiaddress": 0, "msidata": 2048}),
        (RAND48, {**WORDS, "substreamid": (1 << 20) - 1}),
        (RAND48, {**WORDS, "streamid": 0xFFFF_FFFF}),
    ],
)
def test_the_last_value_that_is_allowed(command: int, fields: dict[str, int]) -> None:
    machine = Machine()
    assert machine.start(command, **fields) == command
    machine.engine.reset()


# ---- interrupts


def test_interrupts_come_at_the_end_and_only_when_asked_for() -> None:
    machine = Machine()
    machine.run(RAND48, **span(0, 64), msidata=3)
    assert machine.interrupts == []
    machine.start(RAND48, 2, **span(0, 64), msiaddress=1, msidata=63)
    machine.engine.step()
    assert machine.interrupts == []
    statuses: list[int] = []

    def record(vector: int) -> bool:
        statuses.append(machine.get(UserFrame.cmd, 2))
        return True

    machine.engine.interrupt = record
    machine.drain()
    assert statuses == [HALTED]
    assert machine.get(UserFrame.msi_aborted, 2) == 0


@pytest.mark.parametrize(("vector", "asked"), [(63, [63]), (64, []), (2047, [])])
def test_an_interrupt_that_nobody_gets_is_noted_until_cleared(
    vector: int, asked: list[int]
) -> None:
    machine = Machine()
    machine.connected = False
    machine.run(RAND48, **span(0, 64), msiaddress=1, msidata=vector, rate=9)
    assert machine.interrupts == asked
    assert machine.get(UserFrame.msi_aborted) == 1
    assert machine.get(UserFrame.rate) == 9
    machine.engine.write(0, 4, 4, 0)
    assert machine.get(UserFrame.msi_aborted) == 0


def test_events_tell_what_each_frame_did() -> None:
    machine = Machine()
    machine.run(RAND48, 6, **span(0, 2 * PIECE))
    machine.start(RAND48, 6, **span(0, 2 * PIECE))
    machine.engine.reset()
    name, end = machine.engine.name, BASE + 2 * PIECE - 1
    started = EngineStarted(name, 6, "RAND48", BASE, end, 0)
    assert machine.events == [
        started,
        EngineEnded(name, 6, "RAND48", "HALTED", 2, None),
        started,
        EngineEnded(name, 6, "RAND48", "NO_FRAME", 0, None),
    ]
