"""What is known of a run besides its trace."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from viommu.lab.recording import ConsoleLine


@dataclass(frozen=True, slots=True)
class Run:
    """A run of `title`.

    `facts` are for people, in their order: the seed, the machine and so on. `status` is the exit status of what ran in
    the guest, None when nothing did; `failure` is why the run could not come to its end. `ledger` is the ledger's
    verdict as plain values, None without a ledger.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    status: int | None = None
    failure: str | None = None
    ledger: Mapping[str, Any] | None = None
    console: tuple[ConsoleLine, ...] = ()

    @property
    def findings(self) -> tuple[Mapping[str, Any], ...]:
        """What the ledger found, the worst first."""
        return () if self.ledger is None else tuple(self.ledger["findings"])

    @property
    def violations(self) -> tuple[Mapping[str, Any], ...]:
        """The findings that break a rule."""
        return tuple(f for f in self.findings if f["severity"] == "violation")

    @property
    def evidence(self) -> frozenset[int]:
        """The numbers of the events that findings name."""
        return frozenset(seq for finding in self.findings for seq in finding["evidence"])

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the run did not pass; none when it did."""
        reasons = [] if self.failure is None else [self.failure]
        if self.status:
            reasons.append(f"the command in the guest ended with status {self.status}")
        reasons += [f"{finding['rule']}: {finding['text']}" for finding in self.violations]
        return tuple(reasons)

    @property
    def passed(self) -> bool:
        """Nothing failed, and the ledger found no violation."""
        return not self.reasons

    @property
    def exit_code(self) -> int:
        """For a shell: that of what ran in the guest, else 1 when anything else is wrong."""
        return self.status or (0 if self.passed else 1)
