"""The test engine behind the real SMMU: one event a fault, and a sync that waits for what it has in flight."""

import pytest

from tests import smmu_rig
from tests.smmu_rig import CD_PLAIN, PLAIN, READ_ONLY, STREAM, Rig
from viommu.endpoints.pattern import rand48
from viommu.endpoints.port import DmaPort
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.layouts.test_engine import EngineCommand, UserFrame, offset_of, user_frame

IOVA = 0x1234_5000
TLBI_NSNH_ALL, SYNC = (0x30, 0), (0x46, 0)


class Behind:
    """Four pages at `IOVA`, each somewhere else, and an engine that may use them."""

    def __init__(self) -> None:
        self.rig = Rig(cd=CD_PLAIN)
        port = DmaPort(self.rig.memory, STREAM, self.rig.smmu)
        port.bus_master = True
        self.engine = SmmuTestEngine(port)
        self.pages = [self.rig.alloc(4096) for _ in range(8)][::-2]
        for index, page in enumerate(self.pages):
            self.rig.map(IOVA + 4096 * index, page | smmu_rig.PAGE | PLAIN)

    def start(self, command: EngineCommand, size: int, frame: int = 0, **fields: int) -> None:
        user = UserFrame(begin=IOVA, end_incl=IOVA + size - 1, stride=1, **fields)
        self.engine.write(0, user_frame(frame) + 4, 124, user.value >> 32)
        self.engine.write(0, user_frame(frame), 4, command)

    def drain(self) -> None:
        while self.engine.step():
            pass

    def get(self, field: int) -> int:
        return self.engine.read(0, user_frame(0) + field, 8)

    def synced(self) -> bool:
        return self.rig.consumed

    def content(self, index: int) -> bytes:
        return self.rig.memory.read(self.pages[index], 4096)


def test_scattered_pages_are_one_range() -> None:
    behind = Behind()
    behind.start(EngineCommand.RAND48, 4 * 4096, seed=7)
    behind.drain()
    expected = rand48(7, IOVA, IOVA, 4 * 4096)
    assert b"".join(behind.content(index) for index in range(4)) == expected
    assert behind.rig.events() == []


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("seed", [0, 0xFFFF_FFFF])
def test_a_fault_in_the_middle_is_one_event_and_the_front_has_moved(
    read_only: bool, seed: int
) -> None:
    behind = Behind()
    hole = behind.pages[2] | smmu_rig.PAGE | PLAIN | READ_ONLY if read_only else 0
    behind.rig.map(IOVA + 2 * 4096, hole)
    behind.rig.forget()
    behind.start(EngineCommand.RAND48, 4 * 4096, seed=seed)
    behind.drain()
    assert behind.engine.read(0, 0, 4) == EngineCommand.ERROR
    assert behind.get(offset_of(UserFrame.udata2)) == IOVA + 2 * 4096
    (record,) = behind.rig.events()
    assert record[0] == (0x13 if read_only else 0x10)
    assert int.from_bytes(record[16:24], "little") == IOVA + 2 * 4096
    pattern = rand48(seed, IOVA, IOVA, 4 * 4096)
    assert [behind.content(index) for index in (0, 1)] == [pattern[:4096], pattern[4096:8192]]
    assert not any(behind.content(2))
    assert not any(behind.content(3))


@pytest.mark.parametrize("ended_by", ["step", "reset"])
def test_a_sync_waits_for_the_transfer_in_flight(ended_by: str) -> None:
    behind = Behind()
    behind.start(EngineCommand.RAND48, 4 * 4096, seed=7)
    behind.engine.step()
    for index in range(4):
        behind.rig.map(IOVA + 4096 * index, 0)
    behind.rig.submit(TLBI_NSNH_ALL, SYNC)
    assert not behind.synced()
    if ended_by == "step":
        behind.drain()
        assert any(behind.content(0))
    else:
        behind.engine.reset()
        assert not any(behind.content(0))
    behind.rig.run()
    assert behind.synced()
    # What comes after the sync does not get through.
    before = [behind.content(index) for index in range(4)]
    behind.start(EngineCommand.RAND48, 4 * 4096, seed=8)
    behind.drain()
    assert behind.engine.read(0, 0, 4) == EngineCommand.ERROR
    assert [behind.content(index) for index in range(4)] == before


def test_bus_master_off_is_an_error_that_the_smmu_does_not_see() -> None:
    behind = Behind()
    behind.engine = SmmuTestEngine(DmaPort(behind.rig.memory, STREAM, behind.rig.smmu))
    behind.start(EngineCommand.RAND48, 4096)
    behind.drain()
    assert behind.engine.read(0, 0, 4) == EngineCommand.ERROR
    assert behind.rig.events() == []


@pytest.mark.parametrize("privileged", [False, True])
def test_pages_of_the_privileged_are_for_the_privileged(privileged: bool) -> None:
    behind = Behind()
    behind.rig.map(IOVA, behind.pages[0] | smmu_rig.PAGE | PLAIN & ~smmu_rig.USER)
    behind.rig.forget()
    behind.start(EngineCommand.RAND48, 4096, destination_privileged=privileged)
    behind.drain()
    status = behind.engine.read(0, 0, 4)
    assert status == (EngineCommand.HALTED if privileged else EngineCommand.ERROR)
    assert [record[0] for record in behind.rig.events()] == ([] if privileged else [0x13])
    assert any(behind.content(0)) == privileged
