"""The driver on the model, a witness beside it and a ledger that reads along; what the driver is to omit, it does."""

from typing import Any

from tests.driver_rig import DATA, PAGE, STREAM, Rig
from viommu.driver.domain import Domain
from viommu.endpoints.port import DmaPort, Transfer
from viommu.layouts.commands import Command
from viommu.ledger import DetachDeclared, Ledger, Severity, Verdict, Witness
from viommu.smmu import Features
from viommu.trace import Event

IOVA = 0x1_0000


class LedgerRig(Rig):
    """`port` does DMA as `STREAM`; what is in `omit` the driver does not issue."""

    def __init__(self, features: Features | None = None) -> None:
        super().__init__(features)
        tracer = self.smmu.tracer
        self.events: list[Event] = []
        self.ledger = Ledger()
        self.ledger.follow(tracer)
        tracer.subscribe(self.events.append)
        self.witness = Witness(self.smmu)
        self.port = self.new_port(STREAM)
        self.driver.reset()
        self.omit: set[str] = set()
        commands = self.driver.commands
        issue, sync = commands.issue, commands.sync

        def issue_less(*wanted: Command) -> None:
            issue(*(each for each in wanted if each.opcode.name not in self.omit))

        commands.issue = issue_less  # type: ignore[method-assign]
        commands.sync = lambda: None if "CMD_SYNC" in self.omit else sync()  # type: ignore[method-assign]

    def new_port(self, stream_id: int) -> DmaPort:
        port = DmaPort(self.memory, stream_id, self.smmu, self.smmu.tracer)
        port.bus_master = True
        return port

    def attached(self, pages: int = 2, **options: Any) -> Domain:
        """A domain that `STREAM` is attached to, with `pages` pages from `IOVA` on."""
        domain = self.driver.create_domain(**options)
        domain.map(IOVA, DATA, pages * PAGE, pages_only=True)
        self.driver.attach(STREAM, domain)
        return domain

    def ends_meanwhile(self, transfer: Transfer) -> None:
        """`transfer` moves its bytes when the driver waits, or at the latest at the next call of `go_on`."""
        moves = [lambda: transfer.write_from(bytes(transfer.size)), transfer.done]

        def go_on() -> None:
            while moves:
                moves.pop(0)()
            self.smmu.step()

        self.go_on = self.while_polling = go_on

    def begin(self, iova: int = IOVA, size: int = 64, *, port: DmaPort | None = None) -> Transfer:
        return (port or self.port).begin(iova, size, write=True)

    def write(self, iova: int = IOVA, size: int = 64, *, port: DmaPort | None = None) -> None:
        """DMA writes `size` bytes."""
        with self.begin(iova, size, port=port) as transfer:
            transfer.write_from(bytes(size))

    def declare(self) -> None:
        """The driver says that the stream's detach is complete."""
        self.smmu.tracer.emit(DetachDeclared(STREAM))

    def verdict(self) -> Verdict:
        return self.ledger.verdict()

    def found(self, least: Severity = Severity.EXPOSURE) -> list[tuple[str, str | None]]:
        """Rule and missing command of the findings that are at least so severe, at the end of the run."""
        self.witness.close()
        return [
            (finding.rule, finding.command)
            for finding in self.verdict().findings
            if finding.severity >= least
        ]

    def kinds(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]
