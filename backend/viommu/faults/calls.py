"""What can be made to happen out of the blue: methods of the control socket, and so effects of a plan."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from viommu.control import Methods, Refused
from viommu.endpoints.port import DmaFault, DmaStalled
from viommu.function import Function
from viommu.layouts.records import EventRecord, EventType
from viommu.layouts.registers import GlobalError
from viommu.smmu import PageRequest, Smmu

Address = Annotated[int, Field(ge=0, lt=1 << 64)]
Times = Annotated[int, Field(ge=1, le=1 << 16)]


class SmmuCalls:
    """Registers `smmu.raise_error`, `smmu.service_failure`, `smmu.record` and `smmu.reset`."""

    def __init__(self, smmu: Smmu, methods: Methods) -> None:
        self._smmu = smmu
        methods.add("smmu.raise_error", self.raise_error)
        methods.add("smmu.service_failure", self.service_failure)
        methods.add("smmu.record", self.record)
        methods.add("smmu.reset", self.reset)

    def raise_error(self, error: str) -> None:
        """Make a bit of GERROR active: CMDQ_ERR, EVENTQ_ABT_ERR, …"""
        if error not in GlobalError.__members__:
            raise Refused(f"there is no {error!r}, but {', '.join(GlobalError.__members__)}")
        self._smmu.raise_error(GlobalError[error])

    def service_failure(self) -> None:
        """Enter service failure mode: nothing is translated, consumed or recorded until a reset."""
        self._smmu.enter_service_failure()

    def record(
        self, event: str, stream_id: Address = 0, address: Address = 0, times: Times = 1
    ) -> None:
        """Write records of an event that did not happen: one, a storm, or an overflow."""
        if event not in EventType.__members__:
            raise Refused(f"there is no {event!r}, but {', '.join(EventType.__members__)}")
        record = EventRecord(
            event=EventType[event], stream_id=stream_id & 0xFFFF_FFFF, address=address
        )
        for _ in range(times):
            self._smmu.events.record(record)

    def reset(self) -> None:
        """Reset the SMMU under the guest's feet: registers, queues and caches are as at power-on."""
        self._smmu.reset()


class FunctionCalls:
    """Registers `function.dma`, `function.interrupt`, `function.reset`, `function.page_request`, `server.hang_up`."""

    def __init__(self, functions: Callable[[], Mapping[str, Function]], methods: Methods) -> None:
        self._functions = functions
        methods.add("function.dma", self.dma)
        methods.add("function.interrupt", self.interrupt)
        methods.add("function.reset", self.reset)
        methods.add("function.page_request", self.page_request)
        methods.add("server.hang_up", self.hang_up)

    def _find(self, name: str) -> Function:
        found = self._functions().get(name)
        if found is None:
            raise Refused(f"there is no function {name!r}, but {', '.join(self._functions())}")
        return found

    def dma(
        self,
        function: str,
        iova: Address,
        size: Annotated[int, Field(ge=1, le=1 << 20)] = 8,
        write: bool = True,
        substream_id: Annotated[int, Field(ge=0, lt=1 << 20)] | None = None,
        byte: Annotated[int, Field(ge=0, le=255)] = 0xDB,
    ) -> dict[str, Any]:
        """Let a function do a DMA that nobody asked it for; returns what was moved, or why not."""
        port = self._find(function).port
        if port is None:
            raise Refused(f"{function!r} does no DMA")
        data, done = bytearray(bytes([byte]) * size), 0
        try:
            while done < size:
                with port.begin(
                    iova + done, size - done, write=write, substream_id=substream_id
                ) as transfer:
                    part = memoryview(data)[done : done + transfer.size]
                    if write:
                        transfer.write_from(part)
                    else:
                        transfer.read_into(part)
                    done += transfer.size
        except DmaFault as fault:
            return {"moved": done + fault.done, "why": fault.why}
        except DmaStalled as stalled:
            return {"moved": done, "why": str(stalled)}
        return {"moved": done, "data": bytes(data[:64]).hex()}

    def interrupt(
        self, function: str, vector: Annotated[int, Field(ge=0)] = 0, times: Times = 1
    ) -> bool:
        """Send interrupts for no reason; False when nobody listens."""
        found = self._find(function)
        return [found.trigger(vector) for _ in range(times)][-1]

    def reset(self, function: str) -> None:
        """Reset the model of a function, as a function level reset does, without the guest's knowledge."""
        self._find(function).reset_model()

    def page_request(
        self, function: str, address: Address, prg_index: int = 0, times: Times = 1
    ) -> None:
        """Let a function ask for a page that it does not need: once, or in a storm."""
        port = self._find(function).port
        if port is None or port.smmu is None:
            raise Refused(f"{function!r} is behind no SMMU")
        for number in range(times):
            port.smmu.page_request(
                PageRequest(
                    port.stream_id,
                    None,
                    address & -4096,
                    prg_index + number & 0x1FF,
                    last=True,
                    read=True,
                )
            )

    def hang_up(self, function: str) -> None:
        """Close the connection to QEMU: for the guest the function is dead."""
        self._find(function).device.hang_up()


class ServerCalls:
    """Registers `server.stall`, `server.die` and `server.invalidation_timeout`."""

    def __init__(self, methods: Methods, give_up: Callable[[], int]) -> None:
        methods.add("server.stall", self.stall)
        methods.add("server.die", self.die)
        methods.add("server.invalidation_timeout", give_up)

    def stall(self, ms: Annotated[float, Field(ge=0, le=60_000)]) -> None:
        """Do nothing at all for a while: who waits for an answer waits."""
        time.sleep(ms / 1000)

    def die(self) -> None:
        """Die at once, as if killed: every function reads all ones from here on."""
        os.kill(os.getpid(), signal.SIGKILL)
