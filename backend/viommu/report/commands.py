"""Reads the SMMU's side: commands and their CMD_SYNC, registers, errors."""

from viommu.report.context import Context, Handler
from viommu.report.domains import Domains
from viommu.report.model import Item, Record

_UNSYNCED = 32  # commands that one CMD_SYNC is shown to complete


class Commands:
    """A CMD_SYNC is a span from where it began to wait, and belongs to the invalidations before it."""

    def __init__(self, context: Context, domains: Domains) -> None:
        self._context, self._domains = context, domains
        self._unsynced: list[Item] = []
        self._sync: Item | None = None
        self.handlers: dict[str, Handler] = {
            "CommandConsumed": self._consumed,
            "CommandFailed": self._failed,
            "SyncWaiting": self._waiting,
            "SyncCompleted": self._completed,
            "GlobalErrorRaised": self._global_error,
            "RegisterAccess": self._register,
            "AtcInvalidationSent": self._sent,
            "AtcInvalidationGivenUp": self._given_up,
        }

    def _consumed(self, record: Record) -> Item:
        opcode = record["opcode"]
        if opcode == "CMD_SYNC":
            sync = self._sync or self._begin(record, opcode)
            sync.add(record)
            return sync
        context = self._context
        item = context.item(record, context.smmu, "Commands", "command", opcode)
        if opcode.startswith(("CMD_CFGI", "CMD_TLBI", "CMD_ATC_INV")):
            del self._unsynced[: len(self._unsynced) - _UNSYNCED + 1]
            self._unsynced.append(item)
        self._domains.consumed(record, item)
        return item

    def _begin(self, record: Record, title: str) -> Item:
        context = self._context
        self._sync = context.open(
            record, context.smmu, "CMD_SYNC", "sync", title, sort="CMD_SYNC", tone="good"
        )
        return self._sync

    def _waiting(self, record: Record) -> Item:
        return self._begin(record, f"CMD_SYNC waits for {record['transactions']:,} in flight")

    def _completed(self, record: Record) -> Item:
        sync = self._sync or self._begin(record, "CMD_SYNC")
        self._context.close(sync, record)
        for command in self._unsynced:
            sync.relate(command)
        self._unsynced.clear()
        self._sync = None
        return sync

    def _failed(self, record: Record) -> Item:
        if self._sync is not None:
            self._context.close(self._sync, record, "bad")
            self._sync = None
        return self._error(record, f"commands stop: {record['error']}")

    def _global_error(self, record: Record) -> Item:
        return self._error(record, f"GERROR {record['error']}")

    def _error(self, record: Record, title: str) -> Item:
        context = self._context
        item = context.item(record, context.smmu, "Errors", "error", title, tone="bad")
        if context.last is not None and context.last.kind == "error":
            item.relate(context.last)
        return item

    def _register(self, record: Record) -> Item:
        context = self._context
        verb = "=" if record["write"] else "is"
        return context.item(
            record, context.smmu, "Registers", "register",
            f"{record['name']} {verb} {record['value']:#x}",
            sort=f"{'write' if record['write'] else 'read'} of {record['name']}",
        )  # fmt: skip

    def _sent(self, record: Record) -> Item:
        context = self._context
        return context.item(
            record, context.stream(record), "ATS", "command",
            f"invalidate {record['size']:,} bytes at {record['address']:#x}", sort="invalidations",
        )  # fmt: skip

    def _given_up(self, record: Record) -> Item:
        context = self._context
        title = "invalidation not answered"
        return context.item(record, context.stream(record), "ATS", "error", title, tone="bad")

    def finish(self) -> None:
        """A CMD_SYNC that waits now never completes."""
        if self._sync is not None:
            self._sync.title += " (never completed)"
            self._context.close(self._sync, tone="bad")
