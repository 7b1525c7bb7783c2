"""A test engine with ATS behind the raw SMMU of `ats_rig`."""

import struct

from tests import smmu_rig as hw
from tests.ats_rig import ATS, EATS_FULL, ON, AtsRig
from viommu.endpoints.port import DmaPort
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.layouts.test_engine import EngineCommand, UserFrame, user_frame
from viommu.smmu import Features

IOVA = 0x1234_5000
RAND48, SUM64 = EngineCommand.RAND48, EngineCommand.SUM64
HALTED, ERROR = EngineCommand.HALTED, EngineCommand.ERROR
CFGI_STE, TLBI = (0x03 | hw.STREAM << 32, 1), (0x30, 0)
ATC_INV, SYNC = (0x40 | hw.STREAM << 32, 52), (0x46, 0)
ATS_ON, PRI_ON = 1 << 8, 1 << 9


class Engine:
    """Four pages at `IOVA`, each somewhere else, and an engine whose ATS is enabled, with 4 KiB as its unit."""

    def __init__(self, features: Features = ATS, *, eats: int = EATS_FULL, on: int = ON) -> None:
        self.rig = AtsRig(features, eats=eats, on=on)
        port = DmaPort(self.rig.memory, hw.STREAM, self.rig.smmu)
        port.bus_master = True
        assert port.ats is not None
        self.port, self.ats = port, port.ats
        self.engine = SmmuTestEngine(port)
        self.enable()
        self.pages = [self.rig.alloc(4096) for _ in range(8)][::-2]
        for index in range(4):
            self.map(index)

    def map(self, index: int, flags: int = hw.PLAIN | hw.PAGE) -> None:
        self.rig.map(IOVA + 4096 * index, self.pages[index] | flags if flags & 1 else 0)

    def enable(self, on: bool = True, stu: int = 0) -> None:
        self.ats.capability.written(struct.pack("<HH", 0x60, on << 15 | stu))

    def start(
        self,
        command: EngineCommand,
        size: int,
        *,
        flags: int = ATS_ON,
        substream: int = -1,
        **fields: int,
    ) -> None:
        self.engine.write(0, 0x1_0000, 8, flags)
        self.engine.write(0, 0x1_000C, 4, substream & 0xFFFF_FFFF)
        user = UserFrame(**{"begin": IOVA, "end_incl": IOVA + size - 1, "stride": 1, **fields})
        self.engine.write(0, user_frame(0) + 4, 124, user.value >> 32)
        self.engine.write(0, user_frame(0), 4, command)

    def drain(self) -> int:
        for _ in range(10_000):
            if not self.engine.step():
                break
        return self.status

    def run(self, command: EngineCommand, size: int, **fields: int) -> int:
        self.start(command, size, **fields)
        return self.drain()

    @property
    def status(self) -> int:
        return self.engine.read(0, 0, 4)

    def content(self) -> list[bytes]:
        return [self.rig.memory.read(page, 4096) for page in self.pages]
