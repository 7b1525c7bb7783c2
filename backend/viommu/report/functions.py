"""Reads what happens to functions, what is injected, and every event that nobody else knows."""

import re

from viommu.report.context import Context, Handler
from viommu.report.model import Item, Record

_LANE = "Function"
_NAMES = ("function", "endpoint", "device", "driver", "domain")
_STREAM = re.compile(r"\bstream_id=(\d+)")
_FUNCTION = re.compile(r"\bfunction='([^']+)'")


class Functions:
    """Clients and the commands of engines are spans, all else is an instant."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._clients: dict[str, Item] = {}
        self._frames: dict[tuple[str, int], Item] = {}
        self._injected: Item | None = None
        self.handlers: dict[str, Handler] = {
            "ClientAttached": self._client,
            "ClientDetached": self._client_gone,
            "FunctionReset": self._reset,
            "BusMasterChanged": self._bus_master,
            "FunctionFailed": self._failed,
            "EngineStarted": self._started,
            "EngineRefused": self._refused,
            "EngineEnded": self._ended,
            "FaultInjected": self._injection,
            "EffectCalled": self._effect,
        }

    def _client(self, record: Record) -> Item:
        item = self._open(record, "client attached", "clients")
        self._clients[record["function"]] = item
        return item

    def _client_gone(self, record: Record) -> Item:
        item = self._clients.pop(record["function"], None)
        if item is not None:
            return self._context.close(item, record)
        return self._instant(record, "client detached")

    def _reset(self, record: Record) -> Item:
        return self._instant(record, f"reset {record['reset']}", "warn")

    def _bus_master(self, record: Record) -> Item:
        return self._instant(record, f"Bus Master {'on' if record['enabled'] else 'off'}")

    def _failed(self, record: Record) -> Item:
        return self._instant(record, f"failed: {record['error']}", "bad", kind="error")

    def _open(self, record: Record, title: str, sort: str) -> Item:
        group = self._context.group(record["function"])
        return self._context.open(record, group, "Client", "function", title, sort=sort)

    def _instant(self, record: Record, title: str, tone: str = "", kind: str = "function") -> Item:
        group = self._context.group(record["function"])
        return self._context.item(record, group, _LANE, kind, title, tone=tone)

    # Engines

    def _started(self, record: Record) -> Item:
        context = self._context
        item = context.open(
            record, context.group(record["endpoint"]), "Engine", "engine",
            f"frame {record['frame']}: {record['command']}", sort=record["command"],
        )  # fmt: skip
        if (before := self._frames.pop((record["endpoint"], record["frame"]), None)) is not None:
            context.close(before)
        self._frames[record["endpoint"], record["frame"]] = item
        return item

    def _refused(self, record: Record) -> Item:
        context = self._context
        return context.item(
            record, context.group(record["endpoint"]), "Engine", "engine",
            f"frame {record['frame']} is misconfigured: {record['reason']}",
            sort="misconfigured frames", tone="bad",
        )  # fmt: skip

    def _ended(self, record: Record) -> Item | None:
        item = self._frames.pop((record["endpoint"], record["frame"]), None)
        if item is None:
            return None
        item.title += f" → {record['status']}"
        return self._context.close(item, record, "good" if record["status"] == "HALTED" else "bad")

    # Injections

    def _injection(self, record: Record) -> Item:
        context = self._context
        if named := _STREAM.search(record["where"]):
            group = context.stream({"stream_id": int(named[1])})
        elif named := _FUNCTION.search(record["where"]):
            group = context.group(named[1])
        else:
            group = context.smmu
        self._injected = context.item(
            record, group, "Injections", "injection",
            f"{record['rule']}: {record['action']} at {record['point']}",
            sort=f"{record['action']} at {record['point']}", tone="warn",
        )  # fmt: skip
        return self._injected

    def _effect(self, record: Record) -> Item:
        context = self._context
        self._injected = context.item(
            record, context.smmu, "Injections", "injection",
            f"{record['rule']}: {record['method']}: {record['outcome']}",
            sort=f"calls of {record['method']}", tone="warn",
        )  # fmt: skip
        return self._injected

    def after(self, item: Item) -> None:
        """What comes next is what the injection has led to."""
        if self._injected is not None and item is not self._injected:
            self._injected.current().relate(item)
            self._injected = None

    def other(self, record: Record) -> Item:
        """An instant at the best place that the record names."""
        context = self._context
        inner = record.get("event")
        about = inner if isinstance(inner, dict) else record
        if isinstance(about.get("stream_id"), int):
            group = context.stream(about)
        else:
            names = (about.get(key) for key in _NAMES)
            name = next((each for each in names if isinstance(each, str)), None)
            group = context.smmu if name is None else context.group(name)
        return context.item(record, group, "Other", "other", str(about.get("kind")))

    def finish(self) -> None:
        """What runs now runs to the end."""
        for item in (*self._clients.values(), *self._frames.values()):
            self._context.close(item)
