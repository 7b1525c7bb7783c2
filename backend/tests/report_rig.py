"""Traces of the model itself: what a guest's driver does to a stream, in process."""

from collections.abc import Callable
from pathlib import Path

from tests.smmu_rig import CMDQ_PROD, COMMANDS, PAGE, PLAIN, STE_ABORT, STREAM, STRTAB, Rig
from viommu.endpoints.port import DmaFault, DmaPort
from viommu.ledger import Witness
from viommu.report.model import Item
from viommu.report.timeline import BUDGET, Timeline, build, read_trace
from viommu.trace import Tracer
from viommu.trace_file import TraceFile

IOVA = 0x10000
CFGI_STE, SYNC = (0x03 | STREAM << 32, 1), (0x46, 0)
TLBI_NH_ALL = (0x10, 0)


class Stage:
    """The SMMU of `Rig` with one mapped page at `IOVA`, and a port behind it; the trace goes to `path`.

    With `witnessed` a witness looks on.
    """

    def __init__(self, path: Path, *, witnessed: bool = False) -> None:
        self.path = path
        self._tracer = Tracer()
        self._file = TraceFile(self._tracer, path)
        self.rig = Rig(tracer=self._tracer)
        self._witness = Witness(self.rig.smmu) if witnessed else None
        self._entry = self.rig.map(IOVA, self.rig.alloc(4096) | PAGE | PLAIN)
        self.port = DmaPort(self.rig.memory, STREAM, self.rig.smmu, self._tracer)
        self.port.bus_master = True

    def write(self, iova: int = IOVA, size: int = 64) -> bool:
        """A DMA; whether it went through."""
        try:
            with self.port.begin(iova, size, write=True) as transfer:
                transfer.write_from(bytes(size))
        except DmaFault:
            return False
        return True

    def detach_in_flight(self) -> None:
        """The STE turns to abort while a DMA is in flight; the CMD_SYNC has to wait for it."""
        transfer = self.port.begin(IOVA, 64, write=True)
        self.rig.put(STRTAB + 64 * STREAM, STE_ABORT)
        self.rig.submit(CFGI_STE, SYNC)
        transfer.write_from(bytes(64))
        transfer.done()
        self.rig.run()

    def unmap(self, *commands: tuple[int, int]) -> None:
        """Take the page away, and issue the commands."""
        self.rig.put(self._entry, 0)
        self.rig.submit(*commands)

    def bad_command(self) -> None:
        """One that there is not: consumption stops."""
        position = self.rig.read(CMDQ_PROD)
        self.rig.put(COMMANDS + position * 16, 0xFF, 0)
        self.rig.write(CMDQ_PROD, position + 1)
        self.rig.run()

    def timeline(self, *, evidence: tuple[int, ...] = (), budget: int = BUDGET) -> Timeline:
        """What has been traced so far."""
        return build(read_trace(self.path), evidence=evidence, budget=budget)

    def close(self) -> None:
        if self._witness is not None:
            self._witness.close()
        self._file.close()


def attach_fault_detach(path: Path) -> Stage:
    """A DMA that goes through, one that faults, a detach in flight, and a DMA after it. The trace is complete."""
    stage = Stage(path)
    assert stage.write()
    assert not stage.write(IOVA + 0x1000)
    stage.detach_in_flight()
    assert not stage.write()
    stage.close()
    return stage


def items(
    timeline: Timeline, kind: str, matching: Callable[[Item], bool] = lambda _: True
) -> list[Item]:
    """Those of one kind, in the order of time."""
    found = [item for item in timeline.items if item.kind == kind and matching(item)]
    return sorted(found, key=lambda item: item.begin)
