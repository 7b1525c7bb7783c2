"""The files that tell of a run: which were asked for, and how they are written."""

from dataclasses import dataclass, replace
from pathlib import Path

from viommu.lab.errors import LabError
from viommu.ledger import Ledger
from viommu.report import Run, build, perfetto
from viommu.report.html import page
from viommu.report.outcome import as_json, as_junit
from viommu.report.timeline import read_trace


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where to write what; None is not wanted."""

    page: Path | None = None
    perfetto: Path | None = None
    json: Path | None = None
    junit: Path | None = None

    def check(self) -> None:
        """Raises `LabError` for a file that cannot be written, before there is anything to write."""
        for path in (self.page, self.perfetto, self.json, self.junit):
            if path is None:
                continue
            if not path.parent.is_dir():
                raise LabError(f"{path} cannot be written: there is no directory {path.parent}")
            if path.is_dir():
                raise LabError(f"{path} cannot be written: it is a directory")


def write(run: Run, trace: Path, wanted: Wanted) -> Run:
    """Write what is wanted of a run and its trace. Returns the run with what the ledger says of it."""
    try:
        run = judged(run, trace)
        timeline = build(read_trace(trace), evidence=run.evidence)
        if wanted.perfetto is not None:
            with wanted.perfetto.open("wb") as file:
                perfetto.write(build(read_trace(trace), budget=perfetto.BUDGET), file)
    except ValueError as error:
        raise LabError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise LabError(f"{trace} is no trace that this version reads: {error!r}") from error
    for path, make in ((wanted.page, page), (wanted.json, as_json), (wanted.junit, as_junit)):
        if path is not None:
            path.write_text(make(run, timeline), encoding="utf-8")
    return run


def judged(run: Run, trace: Path) -> Run:
    """The run with the ledger's verdict, where the trace tells what a ledger needs."""
    ledger = Ledger()
    for record in read_trace(trace):
        ledger.read(record)
    verdict = ledger.verdict()
    return replace(run, ledger=verdict.as_dict()) if verdict.witnessed else run
