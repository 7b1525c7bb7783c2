"""The test engine asks software for pages (PCIe, 10.4), as software sees it in the PRI queue."""

import struct
from dataclasses import replace

import pytest

from tests import smmu_rig as hw
from tests.ats_engine_rig import ATS_ON, ERROR, HALTED, IOVA, PRI_ON, RAND48, SUM64, Engine
from tests.ats_rig import ATS, ON
from viommu.endpoints.engine_work import TRIES
from viommu.endpoints.pattern import rand48
from viommu.endpoints.pri import CAPACITY, PRI_ENABLE, PRI_RESET, PriService
from viommu.layouts.test_engine import UserFrame, offset_of
from viommu.smmu import Access

PRIQ_BASE, PRIQ_PROD, PRIQ_CONS = 0xC0, 0x1_00C8, 0x1_00CC
PRIQEN, OVERFLOW = 1 << 1, 1 << 31
LEAF = hw.PLAIN | hw.PAGE
OK, INVALID, FAILURE = 2 << 12, 1 << 12, 0
STOPPED, RF, UPRGI = 0x100, 1, 2


class Asking(Engine):
    """Nothing is mapped, and the engine may ask. The queue has room for 2^`log2` requests."""

    def __init__(self, *, on: int = PRIQEN, log2: int = 4, allocation: int = 64) -> None:
        super().__init__(replace(ATS, pri=True), on=0)
        self.queue = self.rig.alloc(4096)
        self.rig.write64(PRIQ_BASE, self.queue | log2)
        self.rig.write(hw.CR0, ON | on)
        assert self.ats.pri is not None
        self.pri: PriService = self.ats.pri
        self.pri.capability.publish = self.published
        self.config = bytearray(self.pri.capability.body)
        self.allow(allocation)
        for index in range(4):
            self.map(index, 0)
        self.seen = 0

    def published(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data

    def allow(self, allocation: int, enable: bool = True) -> None:
        struct.pack_into("<H", self.config, 0, enable)
        struct.pack_into("<I", self.config, 8, allocation)
        self.pri.capability.written(bytes(self.config))

    @property
    def flags(self) -> int:
        return int(struct.unpack_from("<H", self.config, 2)[0])

    def asked(self) -> list[tuple[int, int]]:
        """The new entries of the queue."""
        words = []
        while self.seen != self.rig.read(PRIQ_PROD) & 0xFF:
            at = self.queue + 16 * (self.seen & 15)
            words.append((self.rig.get(at), self.rig.get(at + 8)))
            self.seen = self.seen + 1 & 31
        self.rig.write(PRIQ_CONS, self.seen)
        return words

    def respond(self, index: int, response: int) -> None:
        self.rig.submit((0x41 | hw.STREAM << 32, index | response))

    def begin(self, size: int = 4 * 4096, **fields: int) -> None:
        self.start(RAND48, size, flags=ATS_ON | PRI_ON, seed=7, **fields)
        self.drain()


WRITE, LAST = 1 << 61 | hw.STREAM, 1 << 62


def test_a_frame_waits_for_its_pages_and_goes_on() -> None:
    engine = Asking()
    engine.begin()
    assert engine.asked() == [
        (WRITE, IOVA),
        (WRITE, IOVA + 0x1000),
        (WRITE, IOVA + 0x2000),
        (WRITE | LAST, IOVA + 0x3000),
    ]
    assert not engine.engine.busy
    assert engine.status == RAND48
    assert (engine.pri.outstanding, engine.flags) == (4, 0)
    for index in range(4):
        engine.map(index)
    engine.respond(0, OK)
    assert engine.engine.busy
    assert engine.drain() == HALTED
    assert b"".join(engine.content()) == rand48(7, IOVA, IOVA, 4 * 4096)
    assert engine.asked() == []
    assert engine.rig.events() == []
    assert engine.pri.outstanding == 0


def test_a_page_that_was_not_brought_is_asked_for_again() -> None:
    engine = Asking()
    engine.begin()
    engine.asked()
    engine.map(0)
    engine.map(1)
    engine.respond(0, OK)
    engine.drain()
    # What is there has moved; the rest is a group of its own, with an index of its own.
    assert engine.asked() == [(WRITE, IOVA + 0x2000 | 1), (WRITE | LAST, IOVA + 0x3000 | 1)]
    assert [any(page) for page in engine.content()] == [True, True, False, False]
    engine.respond(1, INVALID)
    assert engine.drain() == ERROR
    assert engine.engine.read(0, offset_of(UserFrame.udata2), 8) == IOVA + 0x2000
    assert engine.flags == 0


def test_reads_and_pasids_say_what_they_want() -> None:
    engine = Asking()
    table = engine.rig.alloc(128)
    for index in (0, 1):
        engine.rig.put(table + 64 * index, hw.CD_PLAIN, engine.rig.low, engine.rig.high)
    engine.rig.ste(hw.STE_S1 | table | 1 << 59, 1 << 28 | 2)
    engine.start(
        SUM64,
        4096,
        flags=ATS_ON | PRI_ON,
        substream=1,
        source_privileged=True,
        source_instruction=True,
    )
    engine.drain()
    wanted = 1 << 63 | LAST | 1 << 60 | 1 << 59 | 1 << 58 | 1 << 32 | hw.STREAM
    assert engine.asked() == [(wanted, IOVA)]
    engine.rig.submit((0x41 | 1 << 11 | 1 << 12 | hw.STREAM << 32, INVALID))
    assert engine.drain() == ERROR


@pytest.mark.parametrize("how", ["frame", "function", "allocation"])
def test_who_may_not_ask_has_an_error(how: str) -> None:
    engine = Asking(allocation=0 if how == "allocation" else 64)
    if how == "function":
        engine.allow(64, enable=False)
    engine.start(RAND48, 4096, flags=ATS_ON if how == "frame" else ATS_ON | PRI_ON)
    assert engine.drain() == ERROR
    assert engine.asked() == []


def test_no_more_is_outstanding_than_was_allocated() -> None:
    engine = Asking(allocation=3)
    engine.begin()
    assert [low for low, _ in engine.asked()] == [WRITE, WRITE, WRITE | LAST]
    # A second frame has to wait for the first one's answer.
    user = UserFrame(begin=IOVA, end_incl=IOVA + 4095, stride=1, seed=9)
    engine.engine.write(0, 0x1_0080, 8, ATS_ON | PRI_ON)
    engine.engine.write(0, 0x84, 124, user.value >> 32)
    engine.engine.write(0, 0x80, 4, RAND48)
    engine.drain()
    assert engine.asked() == []
    assert engine.pri.outstanding == 3
    engine.respond(0, INVALID)
    engine.drain()
    assert engine.status == ERROR
    assert engine.asked() == [(WRITE | LAST, IOVA | 1)]


def test_response_failure_ends_everything_until_pri_is_enabled_anew() -> None:
    engine = Asking()
    engine.begin()
    engine.respond(0, FAILURE)
    assert engine.drain() == ERROR
    assert engine.flags == RF
    engine.begin()
    assert engine.status == ERROR
    engine.respond(1, OK)  # ignored
    assert engine.flags == RF
    engine.allow(64, enable=False)
    assert engine.flags == RF | STOPPED
    engine.allow(64)
    assert engine.flags == 0
    engine.asked()
    engine.begin(4096)
    assert len(engine.asked()) == 1


def test_an_unexpected_response_is_noted() -> None:
    engine = Asking()
    engine.respond(5, OK)
    assert engine.flags == UPRGI
    engine.config[2] &= ~UPRGI  # software writes 1 to clear it
    engine.pri.capability.written(bytes(engine.config))
    assert engine.flags == 0


def test_it_stops_when_the_last_is_answered() -> None:
    engine = Asking()
    assert engine.flags == 0
    engine.begin()
    engine.allow(64, enable=False)
    assert engine.flags == 0
    engine.respond(0, OK)
    assert engine.flags == STOPPED
    assert engine.drain() == ERROR


def test_a_queue_that_is_off_is_an_error_at_once() -> None:
    engine = Asking(on=0)
    engine.begin()
    assert engine.status == ERROR
    assert engine.flags == RF


def test_an_overflow_is_tried_again_step_by_step_and_not_for_ever() -> None:
    engine = Asking(log2=0)
    engine.begin(4096)
    engine.start(RAND48, 4096, flags=0)  # ignored: the frame runs
    user = UserFrame(begin=IOVA, end_incl=IOVA + 4095, stride=1)
    engine.engine.write(0, 0x1_0080, 8, ATS_ON | PRI_ON)
    engine.engine.write(0, 0x84, 124, user.value >> 32)
    engine.engine.write(0, 0x80, 4, RAND48)
    steps = 0
    while engine.engine.step():
        steps += 1
    assert TRIES - 10 < steps < 5 * TRIES
    assert engine.engine.read(0, 0x80, 4) == ERROR
    assert engine.status == RAND48


def test_a_reset_forgets_what_was_asked() -> None:
    engine = Asking()
    engine.begin()
    engine.engine.reset()
    assert (engine.pri.outstanding, engine.pri.usable) == (0, False)
    engine.respond(0, OK)
    assert CAPACITY == 64


def test_the_control_register_resets_what_is_outstanding() -> None:
    """With Enable clear, or being cleared (PCIe, 10.5.2.2)."""
    asking = Asking()
    group = asking.pri.request(Access(hw.STREAM), [0x1000])
    assert group is not None

    def control(value: int) -> None:
        struct.pack_into("<H", asking.config, 0, value)
        asking.pri.capability.written(bytes(asking.config))

    control(PRI_ENABLE | PRI_RESET)
    assert (asking.pri.outstanding, group.resolution) == (1, None)
    assert asking.config[0] == PRI_ENABLE, "it reads as 0"
    control(PRI_RESET)
    assert (asking.pri.outstanding, group.resolution) == (0, "abort")
    assert asking.config[0] == 0
    assert asking.flags == STOPPED
