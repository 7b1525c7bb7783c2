"""What fixtures show of the machine's devices: the SMMU, the ledger, plans of faults."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from viommu.closing import Closing
from viommu.control import ControlClient
from viommu.lab.config import Device
from viommu.ledger import Ledger, Verdict
from viommu.trace_file import TraceReader

_WIDTH = 120


class Smmu:
    """What the fixture `viommu_smmu` is: the SMMU from outside, as the trace tells of it."""

    def __init__(self, device: Device, trace: TraceReader) -> None:
        self.device = device
        """Its place: `slot` and `stream_id`."""
        self._trace = trace
        trace.skip()

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """What happened since the last call, or since the test had the guest, in order; of one kind, or all.

        The kinds are the types of `viommu.smmu.events`: "CommandConsumed", "Translated", …; the keys are their fields.
        """
        return [event for event in self._trace.read() if kind in ("", event["kind"])]


class Faults:
    """What the fixture `viommu_faults` is: plans of what goes wrong on purpose (docs/faults.md), until the test ends.

    A guest that was lied to is for no other test.
    """

    def __init__(self, control: ControlClient, dirty: Callable[[], None]) -> None:
        """`dirty` is called when there is a plan."""
        self._control, self._dirty = control, dirty

    def load(self, plan: str | Path) -> None:
        """Carry out a plan from here on, in place of the one before: TOML, or the path of a file.

        Raises `viommu.control.Refused` that says what is wrong with it, and where.
        """
        text = plan.read_text("utf-8") if isinstance(plan, Path) else plan
        self._dirty()
        self._control.call("faults.load", plan=text)

    def rules(self) -> list[dict[str, Any]]:
        """The rules of the plan: where they are, what they do, how often they did."""
        found: list[dict[str, Any]] = self._control.call("faults.list")
        return found


class Account(Closing):
    """What the fixture `viommu_ledger` is: the ledger over what happens from here on."""

    def __init__(self, trace: TraceReader) -> None:
        self._trace = trace
        self._ledger = Ledger()
        trace.skip()

    def verdict(self) -> Verdict:
        """What it amounts to so far: `violations`, `findings`, and each stream's `stays` in its domains."""
        for event in self._trace.read():
            self._ledger.read(event)
        return self._ledger.verdict()

    def text(self) -> str:
        """The same for people."""
        console = Console(file=StringIO(), width=_WIDTH)
        self.verdict().print(console)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()

    def close(self) -> None:
        """Read no more."""
        self._trace.close()
