"""Holds two verdicts against each other, and a run of many cases together."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from viommu.differential.abilities import Abilities, like_qemu
from viommu.differential.cases import Access, Case, Outcome, Verdict
from viommu.differential.circumstances import circumstances, determined
from viommu.differential.generate import generate
from viommu.differential.known import KNOWN, KNOWN_OF_QUEUE, KNOWN_OF_RECORDS, QEMU_ENDS
from viommu.differential.model_judge import ModelJudge
from viommu.differential.qemu_judge import QemuJudge
from viommu.differential.qtest import QtestError
from viommu.differential.sight import Sight
from viommu.memory import GuestMemory
from viommu.smmu import Features, Smmu

CHUNK = 1000
"""Cases that are sorted together: first those with linear stream tables, because QEMU restarts to go back to one."""


class Judge(Protocol):
    """One side."""

    def judge(self, case: Case) -> Verdict:
        """Run a case from a clean state."""


@dataclass(frozen=True)
class Finding:
    """One disagreement: `known` is the name of the known difference, None when nobody knows why."""

    access: Access | None
    ours: str
    theirs: str
    known: str | None
    kind: tuple[str, str]

    def __str__(self) -> str:
        what = "command queue" if self.access is None else str(self.access)
        why = f" ({self.known})" if self.known else ""
        return f"{what}{why}\n    ours:   {self.ours}\n    QEMU's: {self.theirs}"


def _kind(outcome: Outcome) -> str:
    return f"{outcome.reached is not None} {[event & 0xFF for event in outcome.events]}"


def compare(case: Case, ours: Verdict, theirs: Verdict) -> list[Finding]:
    """What the two disagree about."""
    findings = []
    met = circumstances(case)
    for our, their in zip(ours.outcomes, theirs.outcomes, strict=True):
        sight = Sight(next(met), our, their)
        if our == their:
            continue
        names, their = _without_record_differences(sight)
        if our != their:
            left = Sight(sight.met, our, their)
            names.append(next((known.name for known in KNOWN if known.applies(left)), None))
        kind = _kind(our), _kind(their)
        for name in names:
            findings.append(Finding(sight.met.access, str(our), str(sight.theirs), name, kind))
    queues = [
        f"CONS {verdict.consumed:#x}, GERROR {verdict.gerror:#x}" for verdict in (ours, theirs)
    ]
    if queues[0] != queues[1]:
        rules = KNOWN_OF_QUEUE.items()
        name = next((name for name, applies in rules if applies(case, ours, theirs)), None)
        findings.append(Finding(None, queues[0], queues[1], name, ("queue", "queue")))
    return findings


def _without_record_differences(sight: Sight) -> tuple[list[str | None], Outcome]:
    """What is known of QEMU's record, by name, and QEMU's outcome without it."""
    names: list[str | None] = []
    outcome = sight.theirs
    if len(outcome.events) == 1 and len(sight.ours.events) == 1:
        for name, rule in KNOWN_OF_RECORDS.items():
            corrected = rule(sight, outcome.events[0])
            if corrected is not None:
                names.append(name)
                outcome = Outcome(outcome.reached, (corrected,))
    return names, outcome


def findings_of(case: Case, ours: Judge, theirs: Judge) -> list[Finding]:
    """What comes out of `case`; that QEMU ended is a finding too."""
    ours_verdict = ours.judge(case)
    try:
        theirs_verdict = theirs.judge(case)
    except QtestError as error:
        text = str(error)
        name = next((name for name, word in QEMU_ENDS.items() if word in text), None)
        return [Finding(None, "survived", text, name, ("survived", "ended"))]
    return compare(case, ours_verdict, theirs_verdict)


@dataclass
class Result:
    """What a run found. `unexplained` holds the number of each case that is not explained, the case and why."""

    cases: int = 0
    accesses: int = 0
    agreed: int = 0
    seconds: float = 0.0
    explained: Counter[str] = field(default_factory=Counter)
    unexplained: list[tuple[int, Case, list[Finding]]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, case: Case, findings: list[Finding]) -> None:
        """Count one case."""
        self.cases += 1
        self.accesses += len(case.accesses)
        self.agreed += not findings
        self.explained.update(finding.known for finding in findings if finding.known)
        if any(not finding.known for finding in findings):
            self.unexplained.append((number, case, findings))


class Court:
    """Both judges, and what they have in common. `make_smmu` may make another model than ours: a broken one, say."""

    def __init__(
        self,
        qemu: QemuJudge,
        make_smmu: Callable[[GuestMemory, Features], Smmu] = Smmu,
        *,
        caching: str = "normal",
    ) -> None:
        features = like_qemu(qemu.idrs, caching)
        self.qemu = qemu
        self.model = ModelJudge(lambda memory: make_smmu(memory, features))
        self.abilities = Abilities.of(qemu.idrs).common(Abilities.of(self.model.idrs))

    def findings(self, case: Case) -> list[Finding]:
        """What comes out of `case`."""
        return findings_of(case, self.model, self.qemu)

    def differs(self, kind: tuple[str, str]) -> Callable[[Case], bool]:
        """Whether a case still has an unexplained finding of that kind: for `shrink`.

        One whose outcome is not determined has not.
        """

        def check(case: Case) -> bool:
            if not determined(case):
                return False
            return any(f.kind == kind and not f.known for f in self.findings(case))

        return check

    def run(
        self,
        seed: int,
        cases: int,
        *,
        stop_after: int = 0,
        progress: Callable[[Result], None] | None = None,
    ) -> Result:
        """Try cases 0 to `cases` - 1 of `seed`. With `stop_after`, stop at so many that are not explained."""
        result = Result()
        started = time.monotonic()
        for number, case in self._cases(seed, cases):
            result.add(number, case, self.findings(case))
            result.seconds = time.monotonic() - started
            if stop_after and len(result.unexplained) >= stop_after:
                break
            if progress:
                progress(result)
        return result

    def _cases(self, seed: int, cases: int) -> Iterator[tuple[int, Case]]:
        for first in range(0, cases, CHUNK):
            chunk: Iterable[tuple[int, Case]] = [
                (number, generate(seed, number, self.abilities))
                for number in range(first, min(first + CHUNK, cases))
            ]
            yield from sorted(chunk, key=lambda item: item[1].two_level)
