"""The way of an endpoint's DMA through the filters of its stack, down to the port."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from viommu.endpoints.port import (
    DmaAttributes,
    DmaFault,
    DmaPort,
    DmaRefused,
    DmaStalled,
    Transfer,
)
from viommu.memory import Buffer
from viommu.smmu import Access, Translation
from viommu.stack.filters import Abort, Diverted, FilterDevice, Outcome, Request
from viommu.trace import Tracer

_ADDRESSES = (1 << 64) - 1


class FilteredPath:
    """What a port asks for its transactions while there are `devices` above it, the topmost first."""

    def __init__(self, port: DmaPort, devices: Sequence[FilterDevice], tracer: Tracer) -> None:
        self._port, self._devices, self._tracer = port, tuple(devices), tracer

    def begin(self, access: Access, iova: int, size: int, attributes: DmaAttributes) -> Transfer:
        """As `DmaPort.begin`."""
        passage = Passage(self._devices, Request(access, iova, size, attributes), self._tracer)
        try:
            return FilteredTransfer(passage, passage.translate(self._port))
        except DmaFault:
            passage.over(Outcome.ABORTED)
            raise
        except DmaStalled:
            passage.over(Outcome.STALLED)
            raise
        except BaseException:
            passage.over(Outcome.ENDED)
            raise


class Passage:
    """One transaction on its way. It holds the devices that it has passed until it is over."""

    def __init__(self, devices: Sequence[FilterDevice], request: Request, tracer: Tracer) -> None:
        self.request = request
        self.iova = request.iova
        """Where the device itself said that it starts."""
        self._devices, self._tracer = devices, tracer
        self._passed: list[FilterDevice] = []

    def translate(self, port: DmaPort) -> Transfer:
        """Ask the filters, the port, and the filters again."""
        request, limit = self.request, self.request.size
        with self.seen_from_above():
            for device in self._devices:
                device.in_flight += 1
                self._passed.append(device)
                device.filter.before_translation(request)
                request.size = min(request.size, limit)
                request.iova &= _ADDRESSES
                if request.size <= 0:
                    raise ValueError(f"{device.name} made a transaction of {request.size} bytes")
            transfer = port.issue(request.access, request.iova, request.size, request.attributes)
            try:
                for device in self._devices:
                    device.filter.after_translation(request, transfer.translation)
            except BaseException:
                transfer.done()
                raise
        return transfer

    def data(self, data: memoryview) -> None:
        """Show the filters the bytes: those of a write on their way down, those of a read on their way up."""
        write = self.request.access.write
        for device in self._devices if write else reversed(self._devices):
            device.filter.data(self.request, data)

    def moved(self) -> None:
        """Tell the filters."""
        for device in reversed(self._devices):
            device.filter.moved(self.request)

    @property
    def waiting(self) -> bool:
        """A filter holds it."""
        return any(device.filter.holds(self.request) for device in self._devices)

    def over(self, outcome: Outcome) -> None:
        """Tell the filters, and let go of them. Being over twice does nothing."""
        if not self._passed:
            return
        device = self._passed.pop()
        device.in_flight -= 1
        try:
            device.filter.completed(self.request, outcome)
        finally:  # one that fails is not the last that is told
            self.over(outcome)

    @contextmanager
    def seen_from_above(self) -> Iterator[None]:
        """What goes wrong is an abort at the address that the device itself sent."""
        request = self.request
        try:
            yield
        except Abort as abort:
            request.why = str(abort)
            if self._tracer:
                access = request.access
                self._tracer.emit(
                    DmaRefused(access.stream_id, request.iova, access.write, request.why)
                )
            raise DmaFault(self.iova, 0, request.why) from None
        except DmaFault as fault:
            request.why = fault.why
            raise DmaFault(
                self.iova + fault.address - request.iova, fault.done, fault.why
            ) from None


class FilteredTransfer(Transfer):
    """A transfer whose bytes the filters see."""

    __slots__ = ("_outcome", "_passage", "_transfer")

    def __init__(self, passage: Passage, transfer: Transfer) -> None:
        # The port counts, and ends, the transfer that is wrapped.
        self._passage, self._transfer = passage, transfer
        self._outcome = Outcome.ENDED

    @property
    def iova(self) -> int:
        """Where it starts, as the device said it."""
        return self._passage.iova

    @property
    def translation(self) -> Translation:
        """How it was translated."""
        return self._transfer.translation

    def read_into(self, buffer: bytearray | memoryview) -> None:
        """Move the bytes from guest RAM, past the filters, to `buffer`. Raises `DmaFault`."""
        self._outcome = Outcome.ABORTED
        with self._passage.seen_from_above():
            self._transfer.read_into(buffer)
            self._passage.data(memoryview(buffer)[: self.size])
        self._moved()

    def write_from(self, buffer: Buffer) -> None:
        """Move the first `size` bytes of `buffer` past the filters to guest RAM. Raises `DmaFault`."""
        self._outcome = Outcome.ABORTED
        with self._passage.seen_from_above():
            data = memoryview(bytearray(memoryview(buffer)[: self.size]))
            try:
                self._passage.data(data)
                self._transfer.write_from(data)
            except Diverted:
                pass
        self._moved()

    def _moved(self) -> None:
        self._outcome = Outcome.MOVED
        self._passage.moved()

    @property
    def waiting(self) -> bool:
        """It has to wait, in flight."""
        return self._passage.waiting

    def done(self) -> None:
        """End the transaction. Ending it twice does nothing."""
        self._transfer.done()
        self._passage.over(self._outcome)
