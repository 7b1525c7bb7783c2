"""Detaches that race DMA at random points: once one is complete no byte lands. A seed tells the whole story."""

import struct
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from tests.domain_rig import IOVA, DomainRig
from tests.driver_rig import DATA, PAGE, RAM
from viommu.driver.domains import DmaDevice, IdMapping, NtStatus
from viommu.endpoints.port import DmaMoved, DmaPort
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.layouts.test_engine import (
    EngineCommand,
    PrivilegedFrame,
    UserFrame,
    privileged_frame,
    user_frame,
)
from viommu.trace import Event

PAGES = 4
SIZE = PAGES * PAGE
FRAMES = 3
BLANK = b"\xa5" * SIZE
ROUNDS = 100


class Race:
    """Two engines of one device; they, the SMMU and the driver take their turns as `seed` says.

    Half of the devices have ATS on, half can stall.
    """

    def __init__(self, seed: int, *, log: list[Any] | None = None) -> None:
        self.random = Random(seed)
        self.rig = rig = DomainRig(timeout=30)
        ats, stalls = self.random.random() < 0.5, self.random.random() < 0.5
        self.device = DmaDevice("pair", id_mappings=[IdMapping(0, 2, 0x20)], ats=ats, stalls=stalls)
        if log is not None:
            rig.smmu.tracer.subscribe(log.append)
            rig.seen = log
        self.engines = [self._engine(stream_id) for stream_id in (0x20, 0x21)]
        self.window = rig.ram[DATA - RAM : DATA - RAM + SIZE]
        rig.while_polling = self.turn
        self.raced = self.late = 0

    def _engine(self, stream_id: int) -> SmmuTestEngine:
        port = DmaPort(self.rig.memory, stream_id, self.rig.smmu, self.rig.smmu.tracer)
        port.bus_master = True
        if port.ats is not None:
            port.ats.capability.written(struct.pack("<HH", 0, self.device.ats << 15))
        return SmmuTestEngine(port, order=self.random, tracer=self.rig.smmu.tracer)

    def turn(self) -> None:
        """Somebody does one small thing."""
        self.random.choice((self.rig.smmu.step, *(engine.step for engine in self.engines)))()

    def start(self, engine: SmmuTestEngine) -> None:
        """Frames that write all the pages, each in transactions of its own size."""
        flags = PrivilegedFrame.ats_enable.mask << PrivilegedFrame.ats_enable.low
        for index in range(FRAMES):
            engine.write(0, privileged_frame(index), 8, flags if self.device.ats else 0)
            engine.write(0, privileged_frame(index) + 12, 4, 0xFFFF_FFFF)
            user = UserFrame(
                begin=IOVA,
                end_incl=IOVA + SIZE - 1,
                stride=1,
                rate=self.random.choice((8, 16, 64)),
                seed=self.random.getrandbits(32),
            )
            engine.write(0, user_frame(index) + 4, 124, user.value >> 32)
            engine.write(0, user_frame(index), 4, EngineCommand.RAND48)

    def round(self, *, complete: bool = True) -> None:
        """Attach, DMA, detach in its midst, and look at what lands afterwards."""
        rig, remapping = self.rig, self.rig.remapping
        # What is not mapped faults, and stalls where that is possible.
        mapped = self.random.randint(1, PAGES)
        domain = rig.domain()
        rig.map(domain, IOVA, DATA, mapped * PAGE)
        rig.attach(domain, self.device, 0, 2)
        for engine in self.engines:
            self.start(engine)
        for _ in range(self.random.randrange(60)):
            self.turn()
        self.raced += bool(len(rig.smmu.in_flight))
        if complete:
            assert remapping.detach_device(domain, self.device) is NtStatus.SUCCESS
            assert len(rig.smmu.in_flight) == 0
        else:
            rig.driver.block(0x20)
            rig.driver.block(0x21)
        self.window[:] = BLANK
        while any(engine.busy for engine in self.engines):
            self.turn()
        self.late += bytes(self.window) != BLANK
        if not complete:
            rig.detach(domain, self.device)
        remapping.service_faults()
        assert remapping.delete_domain(domain) is NtStatus.SUCCESS
        assert len(rig.smmu.stalls) == len(rig.smmu.tlb) == 0


@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_detaches(part: int) -> None:
    raced = 0
    for seed in range(10 * part, 10 * part + 10):
        race = Race(seed)
        for _ in range(ROUNDS):
            race.round()
            assert race.late == 0, f"seed {seed}"
        raced += race.raced
    # Most of them had something in flight.
    assert raced > 5 * ROUNDS


def test_a_detach_without_its_commands_is_caught() -> None:
    late = 0
    for seed in range(10):
        race = Race(seed)
        for _ in range(10):
            race.round(complete=False)
        late += race.late
    assert late > 10


def story(seed: int) -> list[Any]:
    log: list[Any] = []
    race = Race(seed, log=log)
    for _ in range(10):
        race.round()
    return log


def test_a_seed_reproduces_its_run_exactly() -> None:
    stories = [story(seed) for seed in range(8)]
    assert stories == [story(seed) for seed in range(8)]
    assert all(one != other for one, other in pairwise(stories))
    for log in stories:
        assert sum(isinstance(event, DmaMoved) for event in log) > 20
        assert sum(isinstance(event, Event) for event in log) < len(log)
