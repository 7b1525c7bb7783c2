"""The verdict of a run for other programs, as JSON and as JUnit: both say what the page says."""

import json
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as Xml

from viommu.report.html import plain
from viommu.report.run import Run
from viommu.report.timeline import Timeline

_NOT_XML = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CONSOLE = 2000  # lines in a JUnit file, the last ones


def as_json(run: Run, timeline: Timeline) -> str:
    """One object: `verdict` is `pass` or `fail`, `reasons` say why."""
    verdict = {
        "verdict": "pass" if run.passed else "fail",
        "reasons": list(run.reasons),
        "title": run.title,
        "facts": dict(run.facts),
        "status": run.status,
        "failure": run.failure,
        "ledger": run.ledger,
        "seconds": round(timeline.end - timeline.begin, 6),
        "events": dict(timeline.counts),
        "records": dict(timeline.faults),
        "dma_bytes": {name: timeline.moved.get(name, 0) for name in ("read", "write")},
    }
    return json.dumps(verdict, indent=2) + "\n"


def as_junit(run: Run, timeline: Timeline) -> str:
    """A test suite with a case for the run, for its command and for what the ledger looked at."""
    cases = list(_cases(run))
    failures = sum(problem is not None for _, problem in cases)
    suite = Xml.Element(
        "testsuite", name=_clean(run.title), tests=str(len(cases)), failures=str(failures),
        errors="0", skipped="0", time=f"{timeline.end - timeline.begin:.3f}",
    )  # fmt: skip
    properties = Xml.SubElement(suite, "properties")
    for name, value in run.facts.items():
        Xml.SubElement(properties, "property", name=_clean(name), value=_clean(value))
    for name, problem in cases:
        case = Xml.SubElement(suite, "testcase", classname="viommu.run", name=_clean(name))
        if problem is not None:
            Xml.SubElement(case, "failure", message=_clean(problem))
    console = "\n".join(line.text for line in run.console[-_CONSOLE:])
    Xml.SubElement(suite, "system-out").text = _clean(console)
    root = Xml.Element("testsuites")
    root.append(suite)
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _cases(run: Run) -> Iterator[tuple[str, str | None]]:
    """What was looked at, and what was wrong with it."""
    yield "run", run.failure
    if run.status is not None:
        bad = f"the command in the guest ended with status {run.status}" if run.status else None
        yield "command", bad
    if run.ledger is None:
        return
    broken: dict[str, Any] = {}
    for finding in run.violations:
        broken.setdefault(finding["rule"], []).append(finding["text"])
    for rule, texts in broken.items():
        yield f"ledger: {rule}", "; ".join(texts)
    if not broken:
        yield "ledger", None


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", plain(text))
