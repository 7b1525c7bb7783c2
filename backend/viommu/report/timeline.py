"""A run as a time line: lanes by stream, by function and of the SMMU, with what happened in them.

    timeline = build(read_trace(path), evidence=(17, 23))

It reads event by event, and its size is bounded: where there are too many items, neighbours of the same sort become
one that says how many it stands for. Events that are evidence stay items of their own.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from viommu.report.commands import Commands
from viommu.report.context import Context, Handler
from viommu.report.domains import Domains
from viommu.report.functions import Functions
from viommu.report.model import Item, Lane, Lanes, Record
from viommu.report.stale import Stale
from viommu.report.transactions import Transactions

BUDGET = 8000
"""Items that a page carries and a browser draws without effort."""
_RECORDS = 400
_NESTED = "HostSmmuEvent"
_HIDDEN = {"ServerHolds"}
_ORDER = (
    "Domain",
    "DMA",
    "Faults",
    "Records",
    "Stale",
    "Injections",
    "Commands",
    "CMD_SYNC",
    "Errors",
)


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened, in `lanes`; times are seconds since the trace was begun.

    `counts` are all events by kind, `moved` bytes by direction and `faults` records by type. `records` are the first
    event records, each with its item. `evidence` has the item of each number that was asked for. `grain` is not 0 when
    items within so many seconds of each other have become one.
    """

    lanes: tuple[Lane, ...]
    begin: float
    end: float
    events: int
    counts: Mapping[str, int]
    moved: Mapping[str, int]
    faults: Mapping[str, int]
    records: tuple[tuple[Record, Item], ...]
    evidence: Mapping[int, Item]
    grain: float

    @property
    def items(self) -> Iterator[Item]:
        """Those of all lanes."""
        return (item for lane in self.lanes for item in lane.items)


class _Side:
    """The readers of one SMMU's events, the guest's or the host's."""

    def __init__(self, lanes: Lanes, prefix: str = "") -> None:
        self._context = Context(lanes, prefix)
        self._domains = Domains(self._context)
        self._functions = Functions(self._context)
        self._transactions = Transactions(self._context)
        self._commands = Commands(self._context, self._domains)
        self._stale = Stale(self._context)
        self._handlers: dict[str, Handler] = {
            **self._domains.handlers,
            **self._functions.handlers,
            **self._transactions.handlers,
            **self._commands.handlers,
            **self._stale.handlers,
        }

    def read(self, record: Record, time: float) -> Item | None:
        context = self._context
        context.now = time
        if record["kind"] in _HIDDEN:
            return None
        item = self._handlers.get(record["kind"], self._functions.other)(record)
        if item is not None:
            self._functions.after(item)
        context.last = item
        return item

    def finish(self, time: float) -> None:
        self._context.now = time
        self._domains.finish()
        self._functions.finish()
        self._transactions.finish()
        self._commands.finish()
        self._stale.finish()


def build(
    events: Iterable[Record], *, evidence: Iterable[int] = (), budget: int = BUDGET
) -> Timeline:
    """The time line of `events`, the lines of a trace; of at most `budget` items, and the `evidence`."""
    lanes = Lanes(budget)
    guest, host = _Side(lanes), _Side(lanes, "host ")
    wanted, found = frozenset(evidence), dict[int, Item]()
    counts, moved, faults = Counter[str](), Counter[str](), Counter[str]()
    records: list[tuple[Record, Item]] = []
    begin: float | None = None
    time = 0.0
    for record in events:
        time = record["time"]
        if begin is None:
            begin = time
        kind = record["kind"]
        counts[kind] += 1
        if kind == _NESTED:
            inner = {**record["event"], "seq": record["seq"], "time": time}
            item = host.read(inner, time)
        else:
            item = guest.read(record, time)
        if item is not None and record["seq"] in wanted:
            item.evidence = True
            found[record["seq"]] = item
        if kind == "DmaMoved":
            moved["write" if record["write"] else "read"] += record["size"]
        elif kind in ("EventRecorded", "EventLost"):
            faults[record["event"]] += 1
            if item is not None and len(records) < _RECORDS:
                records.append((record, item))
    for side in (guest, host):
        side.finish(time)
    return Timeline(
        lanes=tuple(sorted(lanes.packed(), key=_place)),
        begin=begin or 0.0,
        end=time,
        events=sum(counts.values()),
        counts=dict(counts.most_common()),
        moved=dict(moved),
        faults=dict(faults.most_common()),
        records=tuple((record, item.current()) for record, item in records),
        evidence={seq: item.current() for seq, item in found.items()},
        grain=lanes.grain,
    )


def _place(lane: Lane) -> tuple[int, str, int, str]:
    """Streams come first, then the SMMU, then functions; the host's after the guest's."""
    group = lane.group.removeprefix("host ")
    kind = 0 if group.startswith(("stream", "further")) else 1 if group == "SMMU" else 2
    order = _ORDER.index(lane.name) if lane.name in _ORDER else len(_ORDER)
    return kind + 3 * (group != lane.group), group, order, lane.name


def read_trace(path: Path) -> Iterator[Record]:
    """The events of a trace file. Raises `OSError`, and `ValueError` for what is no trace.

    The last line may be cut off: whoever wrote it may have been killed.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                record["seq"], record["time"], record["kind"]
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith("\n"):
                    return
                raise ValueError(f"{path}: line {number} is no event of a trace") from error
            yield record
