"""The verdict as JSON and as JUnit, and a page's size."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from tests.report_rig import attach_fault_detach
from viommu.lab.recording import ConsoleLine
from viommu.report import Run
from viommu.report.html import page, plain
from viommu.report.outcome import as_json, as_junit
from viommu.report.timeline import Timeline, build

VIOLATION = {
    "severity": "violation", "rule": "missing-sync", "text": "no CMD_SYNC", "command": "CMD_SYNC",
    "stream_id": None, "evidence": [3],
}  # fmt: skip
EXPOSURE = {**VIOLATION, "severity": "exposure", "rule": "stale-use"}


def ledger(*findings: dict[str, Any]) -> dict[str, Any]:
    return {"verdict": "violated", "findings": list(findings), "streams": [], "events": 9}


RUNS = {
    "fine": (Run("a", status=0), 0, []),
    "status": (Run("a", status=3), 3, ["the command in the guest ended with status 3"]),
    "panic": (Run("a", failure="the guest kernel panicked: Oops"), 1, ["the guest kernel panicked: Oops"]),
    "violation": (Run("a", status=0, ledger=ledger(VIOLATION)), 1, ["missing-sync: no CMD_SYNC"]),
    "exposure": (Run("a", status=0, ledger=ledger(EXPOSURE)), 0, []),
    "both": (
        Run("a", status=4, ledger=ledger(VIOLATION)), 4,
        ["the command in the guest ended with status 4", "missing-sync: no CMD_SYNC"],
    ),
}  # fmt: skip


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    return attach_fault_detach(tmp_path / "trace.jsonl").timeline()


@pytest.mark.parametrize("name", RUNS)
def test_all_say_the_same(name: str, timeline: Timeline) -> None:
    run, exit_code, reasons = RUNS[name]
    assert (run.exit_code, list(run.reasons)) == (exit_code, reasons)
    verdict = json.loads(as_json(run, timeline))
    assert (verdict["verdict"], verdict["reasons"]) == ("fail" if reasons else "pass", reasons)
    (suite,) = Xml.fromstring(as_junit(run, timeline))
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure")) == len(reasons)
    assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
    embedded = page(run, timeline)
    assert f'"passed":{json.dumps(not reasons)}' in embedded
    for reason in reasons:
        assert json.dumps(reason) in embedded


def test_json_has_what_happened(timeline: Timeline) -> None:
    verdict = json.loads(as_json(Run("a", {"seed": "7"}), timeline))
    assert verdict["records"] == {"F_TRANSLATION": 1}
    assert verdict["dma_bytes"] == {"read": 0, "write": 128}
    assert verdict["events"]["DmaRefused"] == 2
    assert verdict["facts"] == {"seed": "7"}


def test_junit_survives_what_no_xml_may_have(timeline: Timeline) -> None:
    line = ConsoleLine("]]> <a> & \x00\x01\x1b[1mbold\ufffe\ud800")
    (suite,) = Xml.fromstring(as_junit(Run("<a>", {"k": "\x02"}, console=(line,)), timeline))
    assert suite.findtext("system-out") == "]]> <a> & bold\ufffd\ufffd"
    assert suite.attrib["name"] == "<a>"


def test_a_terminal_is_not_obeyed() -> None:
    assert plain("\x1b[2J\x1b]0;title\x07a\x1b[38;5;1mb\x00\x7f\tc") == "ab\tc"


def test_a_page_of_very_many_events_has_a_few_megabytes() -> None:
    dma = {"stream_id": 16, "substream_id": None, "size": 4096, "write": True, "first": 1 << 40}

    def events() -> Any:
        for n in range(1, 200_001):
            kind = "DmaMoved" if n % 2 == 0 else "Translated"
            yield {
                "seq": n,
                "time": n / 100_000,
                "kind": kind,
                **dma,
                "iova": (n - 1) // 2 << 12,
                "runs": 1,
            }

    text = page(Run("many"), build(events()))
    assert len(text) < 6 << 20
    assert '"DmaMoved":100000' in text
