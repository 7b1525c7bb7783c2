"""What the ledger finds, and its verdict: as plain values, and as a table."""

from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


class Severity(IntEnum):
    """How bad a finding is."""

    NOTE = 0
    """Worth knowing; nothing could go wrong by it alone."""
    EXPOSURE = 1
    """Within what drivers may do, yet DMA reached, or could reach, what it should no longer reach."""
    VIOLATION = 2
    """A rule of the architecture was broken, by the driver or by the SMMU."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`rule` is its kind, `command` the command that was missing or late, `evidence` the numbers of events."""

    severity: Severity
    rule: str
    text: str
    command: str | None = None
    stream_id: int | None = None
    evidence: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "severity": self.severity.name.lower()}


@dataclass(slots=True)
class Stay:
    """A stream in a domain, from attach to detach. Numbers of events are None for what has not happened.

    `read` and `written` are bytes; `window` those of them that moved by the old translation while the detach was
    under way, which is legitimate, and `late` those that did so after it was complete. `syncs` are the CMD_SYNCs that
    went by between the change and its invalidation.
    """

    stream_id: int
    substream_id: int | None
    domain: str
    attached: int
    changed: int | None = None
    structure: str | None = None
    invalidated: int | None = None
    completed: int | None = None
    syncs: int = 0
    read: int = 0
    written: int = 0
    window: int = 0
    late: int = 0
    silent_aborts: int = 0
    faults: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the ledger says of a run. It is clean when nothing is a violation or an exposure.

    `witnessed`: a witness had seen a stream; without one nothing can be said.
    """

    findings: tuple[Finding, ...]
    stays: tuple[Stay, ...]
    events: int
    witnessed: bool

    @property
    def violations(self) -> tuple[Finding, ...]:
        """The findings that break a rule."""
        return tuple(f for f in self.findings if f.severity is Severity.VIOLATION)

    @property
    def clean(self) -> bool:
        """Neither a violation nor an exposure."""
        return all(finding.severity is Severity.NOTE for finding in self.findings)

    @property
    def word(self) -> str:
        """`clean`, `exposed` or `violated`."""
        return "clean" if self.clean else "violated" if self.violations else "exposed"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "verdict": self.word,
            "events": self.events,
            "findings": [finding.as_dict() for finding in self.findings],
            "streams": [asdict(stay) for stay in self.stays],
        }

    def print(self, console: Console) -> None:
        """For people."""
        if self.stays:
            console.print(self._stays())
        if self.findings:
            console.print(self._findings())
        style = _STYLES[max((f.severity for f in self.findings), default=Severity.NOTE)]
        counts = ", ".join(
            f"{count} {severity.name.lower()}{'s' * (count != 1)}"
            for severity in reversed(Severity)
            if (count := sum(f.severity is severity for f in self.findings))
        )
        tail = f": {counts}" if counts else ""
        console.print(Text(f"{self.word}{tail}, {self.events:,} events", style=style))

    def _stays(self) -> Table:
        table = Table(
            "stream", "domain", "attached", "detached", "complete", title="Streams and domains"
        )
        for title in ("read", "written", "in the window", "after it"):
            table.add_column(title, justify="right")
        for stay in self.stays:
            substream = "" if stay.substream_id is None else f".{stay.substream_id:#x}"
            table.add_row(
                f"{stay.stream_id:#x}{substream}",
                stay.domain,
                *(_event(n) for n in (stay.attached, stay.changed, stay.completed)),
                *(f"{n:,}" for n in (stay.read, stay.written, stay.window)),
                Text(f"{stay.late:,}", style="red" if stay.late else "green"),
            )
        return table

    def _findings(self) -> Table:
        table = Table("severity", "rule", "command", "what", "events", title="Findings")
        for finding in self.findings:
            table.add_row(
                Text(finding.severity.name.lower(), style=_STYLES[finding.severity]),
                finding.rule,
                finding.command or "",
                finding.text,
                " ".join(f"#{number}" for number in finding.evidence[:4]),
            )
        return table


_STYLES = {Severity.NOTE: "green", Severity.EXPOSURE: "yellow", Severity.VIOLATION: "bold red"}


def _event(number: int | None) -> str:
    return "—" if number is None else f"#{number}"
