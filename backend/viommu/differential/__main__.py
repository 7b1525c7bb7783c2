"""`scripts/differential`: our SMMU and QEMU's before the same random cases."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from viommu.differential.cases import Case
from viommu.differential.compare import Court, Finding, Result
from viommu.differential.qemu_judge import QemuJudge
from viommu.differential.shrink import shrink
from viommu.lab.assets import Assets
from viommu.lab.errors import LabError

_SHOWN = 5  # unexplained differences that are minimised and printed


def main(
    cases: Annotated[int, typer.Option(min=1, help="How many cases.")] = 300,
    seed: Annotated[int, typer.Option(help="Which cases: the same seed makes the same.")] = 1,
    replay: Annotated[
        Path | None, typer.Option(help="Run the case in this file, as printed, and nothing else.")
    ] = None,
) -> None:
    """Run random stream tables, contexts, page tables and accesses through QEMU's SMMUv3 and through ours.

    The exit status is 0 when every difference is one that docs/differences.md explains.
    """
    try:
        with QemuJudge(Assets.load().qemu_for("aarch64").argv) as qemu:
            court = Court(qemu)
            failed = _replay(court, replay) if replay else _run(court, seed, cases)
    except (LabError, OSError) as error:
        print(f"scripts/differential: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    raise typer.Exit(failed)


def _run(court: Court, seed: int, cases: int) -> int:
    print(f"Common to both sides: {court.abilities}")
    result = court.run(seed, cases, progress=_progress if sys.stderr.isatty() else None)
    for number, case, findings in result.unexplained[:_SHOWN]:
        _show(court, number, case, findings)
    _summary(result, seed)
    return 1 if result.unexplained else 0


def _replay(court: Court, path: Path) -> int:
    case = Case.from_json(path.read_text())
    findings = court.findings(case)
    print(case)
    _print(findings)
    return 1 if any(not finding.known for finding in findings) else 0


def _show(court: Court, number: int, case: Case, findings: list[Finding]) -> None:
    """One unexplained difference, as small as it gets."""
    kind = next(finding.kind for finding in findings if not finding.known)
    smallest = shrink(case, court.differs(kind))
    print(f"\nCase {number} is not explained. The smallest like it:")
    print(smallest)
    _print(court.findings(smallest))
    print(f"To replay it: {smallest.to_json()}")


def _print(findings: list[Finding]) -> None:
    for finding in findings:
        print(f"  {finding}")
    if not findings:
        print("  no difference")


def _summary(result: Result, seed: int) -> None:
    rate = result.cases / result.seconds if result.seconds else 0
    print(
        f"\n{result.cases} cases of seed {seed}, {result.accesses} accesses in {result.seconds:.1f} s"
        f" ({rate:.0f} cases/s)"
    )
    print(f"  {result.agreed} cases agree in everything")
    for name, count in result.explained.most_common():
        print(f"  {count:6} times {name}")
    print(f"  {len(result.unexplained)} cases with a difference that nothing explains")


def _progress(result: Result) -> None:
    if result.cases % 100 == 0:
        unexplained = len(result.unexplained)
        print(f"\r{result.cases} cases, {unexplained} unexplained", end="", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
