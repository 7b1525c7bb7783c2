"""The SMMU's registers, its queues, and the transactions that wait for software."""

from collections.abc import Callable

from viommu.control import Methods
from viommu.layouts.bitfields import Layout
from viommu.layouts.commands import LAYOUTS, Command
from viommu.layouts.records import (
    BadTranslationRequestRecord,
    EventRecord,
    EventType,
    PageRequestRecord,
)
from viommu.layouts.registers import (
    COMMAND_ERROR_SHIFT,
    QUEUE_OVERFLOW,
    REGISTER_LAYOUTS,
    CommandError,
    GlobalError,
    Register,
)
from viommu.memory import BusError
from viommu.smmu import Smmu, Stalled
from viommu.smmu.queues import Ring
from viommu.views.tables import Limit, Row

_ERRORS = (Register.GERROR, Register.GERRORN)


class RegisterViews:
    """Registers `smmu.registers`, `smmu.queues` and `smmu.stalls`."""

    def __init__(self, smmu: Smmu, methods: Methods) -> None:
        self._smmu = smmu
        methods.add("smmu.registers", self.registers)
        methods.add("smmu.queues", self.queues)
        methods.add("smmu.stalls", self.stalls)

    def registers(self) -> list[Row]:
        """List the registers, decoded; reading them here leaves no trace."""
        return [
            {
                "register": register.name,
                "offset": int(register),
                "value": (value := self._smmu.peek(register)),
                "fields": _fields(register, value),
            }
            for register in Register
            if register < self._smmu.features.frame_size
        ]

    def queues(self, limit: Limit = 8) -> list[Row]:
        """List the queues: their positions, and the first entries that are not consumed, as memory has them."""
        smmu = self._smmu
        found = [
            self._queue("command", smmu.commands.ring, smmu.commands.enabled, _command, limit),
            self._queue("event", smmu.events.ring, smmu.events.enabled, _event, limit),
        ]
        found[0]["state"] = _command_state(smmu)
        if smmu.features.pri:
            ring = smmu.page_requests.ring
            enabled = smmu.page_requests.enabled
            found.append(self._queue("PRI", ring, enabled, PageRequestRecord.from_bytes, limit))
        for queue, ring in zip(
            found[1:], (smmu.events.ring, smmu.page_requests.ring), strict=False
        ):
            overflowed = (ring.prod ^ ring.cons) & QUEUE_OVERFLOW
            queue["state"] = "overflowed" if overflowed else "full" if ring.full else "ready"
        return found

    def _queue(
        self,
        name: str,
        ring: Ring,
        enabled: bool,
        decode: Callable[[bytes], Layout],
        limit: int,
    ) -> Row:
        entries, position = [], ring.cons
        for _ in range(min(ring.pending, limit)):
            address = ring.address(position)
            row: Row = {"index": position & ring.index_mask, "address": address, "fields": None}
            try:
                row["fields"] = decode(self._smmu.memory.read(address, ring.entry_size)).as_dict()
            except BusError:
                row["fault"] = "no memory"
            entries.append(row)
            position = ring.after(position)
        return {
            "queue": name,
            "enabled": enabled,
            "state": None,
            "base": ring.base.addr,
            "slots": ring.index_mask + 1,
            "prod": ring.prod & ring.index_mask,
            "cons": ring.cons & ring.index_mask,
            "pending": ring.pending,
            "entries": entries,
        }

    def stalls(self, limit: Limit = 64) -> Row:
        """List the transactions that wait for software; without a STAG, for room to record them."""
        stalls = self._smmu.stalls
        waiting = [*stalls, *stalls.held]
        return {
            "stalls": [_stalled(each) for each in waiting[:limit]],
            "more": len(waiting) > limit,
        }


def _fields(register: Register, value: int) -> dict[str, int | str]:
    if register in _ERRORS:
        return {str(error.name): True for error in GlobalError if value & error}
    layout = REGISTER_LAYOUTS.get(register)
    return {} if layout is None else layout(value & (1 << 8 * layout.size) - 1).as_dict()


def _command(data: bytes) -> Layout:
    layout: type[Command] = LAYOUTS.get(data[0], Command)  # type: ignore[call-overload]
    return layout.from_bytes(data)


def _event(data: bytes) -> Layout:
    bad_request = data[0] == EventType.F_BAD_ATS_TREQ
    return (BadTranslationRequestRecord if bad_request else EventRecord).from_bytes(data)


def _command_state(smmu: Smmu) -> str:
    if smmu.commands.stopped:
        error = smmu.commands.ring.cons >> COMMAND_ERROR_SHIFT & 0x7F
        known = error in list(CommandError)
        return f"stopped by {CommandError(error).name if known else hex(error)}"
    return "waits for transactions" if smmu.commands.waiting else "ready"


def _stalled(stalled: Stalled) -> Row:
    access, record = stalled.access, stalled.record
    return {
        "stag": stalled.stag,
        "stream_id": access.stream_id,
        "substream_id": access.substream_id,
        "iova": stalled.address,
        "direction": "write" if access.write else "read",
        "event": getattr(record.event, "name", record.event),
    }
