"""A run as one page that needs nothing else: no network, no other file."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from viommu.report.decode import decode
from viommu.report.model import Item, Record
from viommu.report.run import Run
from viommu.report.timeline import Timeline

_SCRIPTS = ("scale.js", "view.js", "panes.js", "page.js")
_LINES = 5000  # of the console; the last ones
_WIDTH = 1000  # characters of a line
_EVIDENCE = 16
_COLUMNS = {
    "event",
    "stream_id",
    "· event",
    "· stream_id",
}  # of the table of records, by themselves
_CONTROL = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?|[\x00-\x08\x0b-\x1f\x7f]"
)


def page(run: Run, timeline: Timeline) -> str:
    """The whole page. Nothing that a guest has said is taken for markup: the script sets it as text."""
    parts = files("viommu.report") / "page"
    style = (parts / "page.css").read_text(encoding="utf-8")
    script = "".join((parts / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    filled = {
        "title": html.escape(run.title),
        "policy": f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": _embedded(_data(run, timeline)),
    }
    template = (parts / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: filled[name[1]], template)


def plain(text: str) -> str:
    """Text without what a terminal would obey."""
    return _CONTROL.sub("", text)


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: Any) -> str:
    """JSON that can stand in a script element, whatever is in it."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode(errors="replace").decode()


def _data(run: Run, timeline: Timeline) -> dict[str, Any]:
    numbers = {id(item): number for number, item in enumerate(timeline.items)}
    lines = [line for line in run.console if line.text.strip()]
    console = lines[-_LINES:]
    return {
        "title": run.title,
        "facts": list(run.facts.items()),
        "passed": run.passed,
        "reasons": run.reasons,
        "ledger": None if run.ledger is None else run.ledger["verdict"],
        "findings": [_finding(f, timeline, numbers) for f in run.findings],
        "stays": [] if run.ledger is None else run.ledger["streams"],
        "begin": timeline.begin,
        "end": timeline.end,
        "events": timeline.events,
        "counts": timeline.counts,
        "moved": timeline.moved,
        "faults": timeline.faults,
        "grain": timeline.grain,
        "lanes": [
            {
                "group": lane.group,
                "name": lane.name,
                "items": [_item(item, numbers) for item in lane.items],
            }
            for lane in timeline.lanes
        ],
        "records": [_record(record, numbers[id(item)]) for record, item in timeline.records],
        "console": [[line.time, plain(line.text)[:_WIDTH]] for line in console],
        "unshown": len(lines) - len(console),
    }


def _item(item: Item, numbers: dict[int, int]) -> list[Any]:
    return [
        item.kind, plain(item.title), round(item.begin, 6), round(item.end, 6), item.tone, item.row,
        item.count, item.size, _related(item, numbers), [_event(event) for event in item.events],
    ]  # fmt: skip


def _related(item: Item, numbers: dict[int, int]) -> list[int]:
    found: Iterable[int] = (numbers[id(other.current())] for other in item.related)
    return [number for number in dict.fromkeys(found) if number != numbers[id(item)]]


def _event(event: Record) -> list[Any]:
    pairs = [(name, plain(value)) for name, value in decode(event)]
    return [event["seq"], event["time"], event["kind"], pairs]


def _record(record: Record, item: int) -> list[Any]:
    pairs = [pair for pair in decode(record) if pair[0] not in _COLUMNS]
    return [record["seq"], record["time"], record["event"], record["stream_id"], pairs, item]


def _finding(finding: Any, timeline: Timeline, numbers: dict[int, int]) -> dict[str, Any]:
    evidence = [
        [seq, numbers[id(timeline.evidence[seq])] if seq in timeline.evidence else None]
        for seq in finding["evidence"][:_EVIDENCE]
    ]
    return {**finding, "evidence": evidence}
