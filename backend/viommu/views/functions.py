"""The functions as QEMU has them, and what their DMA has under way."""

from collections.abc import Callable, Sequence

from viommu.control import Methods
from viommu.endpoints.port import DmaPort
from viommu.function import Function
from viommu.smmu import Translation
from viommu.views.tables import Limit, Row, StreamId

_REGIONS = 64


class FunctionViews:
    """Registers `function.list` and `dma.in_flight`."""

    def __init__(
        self, functions: Sequence[Function], clock: Callable[[], float], methods: Methods
    ) -> None:
        """`clock` is the one by which the ports of the functions keep time."""
        self._functions, self._clock = functions, clock
        methods.add("function.list", self.functions)
        methods.add("dma.in_flight", self.in_flight)

    def functions(self) -> list[Row]:
        """List the functions: whether a QEMU is attached, Bus Master, and the guest memory that it has mapped."""
        return [
            {
                "function": function.name,
                "stream_id": None if function.port is None else function.port.stream_id,
                "attached": function.device.attached,
                "bus_master": function.device.attached and function.device.bus_master,
                "dead": function.dead,
                "memory": [
                    {"address": base, "size": size, "accessible": accessible}
                    for base, size, accessible in function.memory.regions[:_REGIONS]
                ],
            }
            for function in self._functions
        ]

    def in_flight(self, stream_id: StreamId | None = None, limit: Limit = 64) -> Row:
        """List the DMA in flight, oldest first of each function: what, where to, and for how many seconds."""
        now = self._clock()
        rows = [
            _transaction(function.name, function.port, each, now)
            for function in self._functions
            if function.port is not None and stream_id in (None, function.port.stream_id)
            for each in function.port.transactions
        ]
        return {"transactions": rows[:limit], "more": len(rows) > limit}


def _transaction(name: str, port: DmaPort, translation: Translation, now: float) -> Row:
    access, since = translation.access, port.since(translation)
    return {
        "function": name,
        "stream_id": access.stream_id,
        "substream_id": access.substream_id,
        "iova": translation.iova,
        "size": translation.size,
        "direction": "write" if access.write else "read",
        "address": translation.runs[0],
        "seconds": None if since is None else round(now - since, 3),
    }
