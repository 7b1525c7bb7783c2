"""The only way by which an endpoint reaches guest RAM: a port with a StreamID, behind the SMMU.

    transfer = port.begin(iova, size, write=True)     # translated; in flight from here
    transfer.write_from(data)                         # bytes move
    transfer.done()                                   # no longer in flight

What an endpoint holds between two of its steps is truly in flight: a CMD_SYNC after an invalidation waits for it.
While a host domain concerns the stream, what the guest's SMMU made of a transaction passes the host SMMU too.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol

from viommu.endpoints.ats import AtsLate, AtsRefused, AtsService
from viommu.endpoints.base import ExtendedCapability
from viommu.endpoints.host_path import HostPath
from viommu.endpoints.pasid import PasidService
from viommu.endpoints.points import BusMasterOff
from viommu.memory import Buffer, BusError, GuestMemory
from viommu.smmu import (
    Access,
    AtsStatus,
    Smmu,
    TransactionAborted,
    TransactionStalled,
    Translation,
)
from viommu.smmu.barrier import InFlight
from viommu.smmu.translation import MAX_RANGE as PORT_CHUNK
from viommu.trace import Event, Hold, Skip, Tracer

__all__ = ["PORT_CHUNK", "DmaAttributes", "DmaFault", "DmaPort", "DmaStalled", "Transfer"]


@dataclass(frozen=True, slots=True)
class DmaMoved(Event):
    """`size` bytes moved between the endpoint and guest RAM; `first` is the first physical address.

    `transaction` is the SMMU's number of it; 0 where none is in the way.
    """

    stream_id: int
    substream_id: int | None
    iova: int
    size: int
    write: bool
    first: int
    transaction: int


@dataclass(frozen=True, slots=True)
class DmaRefused(Event):
    """A DMA did not go through: no Bus Master, an abort by the SMMU, or no memory behind the address."""

    stream_id: int
    iova: int
    write: bool
    why: str


class DmaAttributes(NamedTuple):
    """What a transaction says of itself: privileged (PnU) and instruction (InD).

    With `ats` it goes out Translated, if ATS is enabled in the function, else as ever. With `page_requests` too, what
    has no access is asked for by PRI, if that is enabled.
    """

    privileged: bool = False
    instruction: bool = False
    ats: bool = False
    page_requests: bool = False


UNPRIVILEGED_DATA = DmaAttributes()


class DmaFault(Exception):
    """The device sees an abort. `address` is the IOVA of the first byte not moved, `done` the bytes moved before it."""

    def __init__(self, address: int, done: int, why: str) -> None:
        super().__init__(f"DMA aborted at {address:#x}: {why}")
        self.address, self.done, self.why = address, done, why


class Held(Protocol):
    """A transaction that waits for software: `resolution` is None, then `retry` or `abort`."""

    @property
    def address(self) -> int: ...
    @property
    def resolution(self) -> str | None: ...


class HeldUntil:
    """A transaction that goes on when `hold` is released."""

    def __init__(self, address: int, hold: Hold) -> None:
        self.address, self._hold = address, hold

    @property
    def resolution(self) -> str | None:
        """`retry`, once it is released."""
        return "retry" if self._hold.released else None


class DmaStalled(Exception):
    """Begin the transaction again once it is no longer `waiting`, unless it was `aborted`.

    The SMMU stalled it; or, with `page_request`, the function asked for the page.
    """

    def __init__(self, held: Held, *, page_request: bool = False) -> None:
        super().__init__(f"DMA stalled at {held.address:#x}")
        self._held = held
        self.page_request = page_request

    @property
    def waiting(self) -> bool:
        """Software has not answered yet."""
        return self._held.resolution is None

    @property
    def aborted(self) -> bool:
        """Software's answer was to abort."""
        return self._held.resolution == "abort"


class Transfer:
    """One transaction: `size` bytes from `iova`, already translated. Move them once, then `done`."""

    __slots__ = ("_port", "_translation")

    def __init__(self, port: "DmaPort", translation: Translation) -> None:
        self._port = port
        self._translation: Translation | None = translation

    @property
    def size(self) -> int:
        """Bytes of this transaction: what was asked for, or less."""
        return self.translation.size

    @property
    def iova(self) -> int:
        """Where it starts."""
        return self.translation.iova

    @property
    def translation(self) -> Translation:
        """How it was translated."""
        if self._translation is None:
            raise ValueError("the transfer is done")
        return self._translation

    @property
    def waiting(self) -> bool:
        """It has to wait, in flight, before its bytes move, or before it is done."""
        return False

    def read_into(self, buffer: bytearray | memoryview) -> None:
        """Move the bytes from guest RAM to `buffer`, of at least `size` bytes. Raises `DmaFault`."""
        self._move(buffer, to_guest=False)

    def write_from(self, buffer: Buffer) -> None:
        """Move the first `size` bytes of `buffer` to guest RAM. Raises `DmaFault`."""
        self._move(buffer, to_guest=True)

    def _move(self, buffer: Buffer, *, to_guest: bool) -> None:
        translation = self.translation
        if to_guest != translation.access.write:
            raise ValueError("the transfer was begun in the other direction")
        self._port.move(translation, buffer)

    def done(self) -> None:
        """End the transaction. Ending it twice does nothing."""
        if self._translation is not None:
            self._port.end(self._translation)
            self._translation = None

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.done()


class Path(Protocol):
    """What leads transactions through the filters above a port; it calls `DmaPort.issue` for what reaches it."""

    def begin(
        self, access: Access, iova: int, size: int, attributes: DmaAttributes
    ) -> Transfer: ...


class DmaPort:
    """An endpoint's port: its StreamID, its SMMU if it has one, and the memory that its transactions reach.

    `bus_master` is PCI_COMMAND.BusMaster of the function: while it is clear nothing goes out, and the SMMU sees
    nothing.
    """

    def __init__(
        self,
        memory: GuestMemory,
        stream_id: int,
        smmu: Smmu | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.memory = memory
        self.stream_id = stream_id
        self.bus_master = False
        self.closed: str | None = None
        """Why it takes no transactions any more."""
        self.path: Path | None = None
        """The filters of the function's stack, if it has any."""
        self.ats = None if smmu is None or not smmu.features.ats else AtsService(smmu, stream_id)
        """The function's ATS, where the SMMU has it too."""
        self.pasid: PasidService | None = None
        """The function's PASID capability; without one every SubstreamID goes out."""
        self.host: HostPath | None = None
        """The way through the host SMMU, while a host domain concerns the stream."""
        self.smmu = smmu
        self._in_flight = InFlight() if smmu is None else smmu.in_flight
        # The port's own of them, by id: a filter may have sent one out as another stream's.
        self._own: dict[int, Translation] = {}
        self._tracer = tracer if tracer is not None else Tracer()

    def begin(
        self,
        iova: int,
        size: int,
        *,
        write: bool,
        substream_id: int | None = None,
        attributes: DmaAttributes = UNPRIVILEGED_DATA,
    ) -> Transfer:
        """Start a transaction of at most `PORT_CHUNK` bytes; `size` of the result says how many it has.

        It is shorter than asked for when a later page does not translate: the fault comes when that page is asked for.
        Raises `DmaFault` when nothing goes through, `DmaStalled` when software has to decide.
        """
        if size <= 0:
            raise ValueError(f"a transaction of {size} bytes")
        access = Access(
            self.stream_id, substream_id, write, attributes.privileged, attributes.instruction
        )
        if self.path is not None:
            return self.path.begin(access, iova, size, attributes)
        return self.issue(access, iova, size, attributes)

    def issue(self, access: Access, iova: int, size: int, attributes: DmaAttributes) -> Transfer:
        """`begin` below the filters."""
        write, substream_id = access.write, access.substream_id
        if iova >> 64:
            raise self._refused(iova, write, "there are 64 bits of address")
        if not self.bus_master and not self._goes_out(access, iova, size):
            raise self._refused(iova, write, self.closed or "Bus Master is off")
        if self.pasid is not None and substream_id is not None:
            refusal = self.pasid.refusal(substream_id)
            if refusal is not None:
                raise self._refused(iova, write, refusal)
            access = access._replace(
                privileged=access.privileged and self.pasid.privileged,
                instruction=access.instruction and self.pasid.execute,
            )
        try:
            if self.smmu is None:
                translation = self._untranslated(access, iova, size)
            elif attributes.ats and self.ats is not None and self.ats.enabled:
                translation = self._translated(self.smmu, self.ats, access, iova, size)
            else:
                translation = self.smmu.translate(access, iova, size)
        except AtsRefused as refused:
            if attributes.page_requests and refused.status is AtsStatus.SUCCESS:
                self._ask_for_pages(access, iova, size)
            raise self._refused(iova, write, str(refused)) from None
        except AtsLate as late:
            raise DmaStalled(HeldUntil(iova, late.hold)) from None
        except TransactionStalled as held:
            raise DmaStalled(held.stalled) from None
        except TransactionAborted as aborted:
            raise self._refused(iova, write, str(aborted)) from None
        if self.host is not None:
            self._enter(self.host, translation)
        self._own[id(translation)] = translation
        return Transfer(self, translation)

    def _untranslated(self, access: Access, iova: int, size: int) -> Translation:
        """A transaction that no SMMU of the guest stands before."""
        size = min(size, PORT_CHUNK)
        translation = Translation(access, iova, array("Q", (iova, size)), size)
        self._in_flight.add(translation)
        return translation

    def _enter(self, host: HostPath, translation: Translation) -> None:
        """Raises `DmaFault` when the host SMMU lets nothing of it pass."""
        try:
            host.enter(translation)
        except TransactionAborted as aborted:
            self.end(translation)
            raise self._refused(
                translation.iova, translation.access.write, f"host SMMU, {aborted}"
            ) from None

    def _goes_out(self, access: Access, iova: int, size: int) -> bool:
        """Although Bus Master is off, because a meddler wants it."""
        if self.closed or self._tracer.meddler is None:
            return False
        point = BusMasterOff(access.stream_id, access.substream_id, iova, size, access.write)
        return isinstance(self._tracer.meddler(point), Skip)

    def _translated(
        self, smmu: Smmu, ats: AtsService, access: Access, iova: int, size: int
    ) -> Translation:
        """A Translated transaction, by what the function's cache has or gets."""
        ranges = ats.resolve(access, iova, min(size, PORT_CHUNK))
        translation = smmu.translated(access, ranges)
        translation.access, translation.iova = access, iova
        ats.hold(translation, iova)
        return translation

    def _ask_for_pages(self, access: Access, iova: int, size: int) -> None:
        """Raises `DmaStalled` when software was asked for the pages."""
        group = None if self.ats is None else self.ats.ask_for_pages(access, iova, size)
        if group is not None:
            raise DmaStalled(group, page_request=True)

    def move(self, translation: Translation, buffer: Buffer) -> None:
        """Move the bytes of one transaction; `Transfer` is how endpoints say it."""
        access, window = translation.access, memoryview(buffer)[: translation.size]
        try:
            if access.write:
                self.memory.scatter(translation.runs, window)
            else:
                self.memory.gather(translation.runs, window)
        except BusError as error:
            raise self._refused(
                translation.iova + error.done, access.write, str(error), error.done
            ) from None
        if self._tracer:
            self._tracer.emit(
                DmaMoved(
                    access.stream_id,
                    access.substream_id,
                    translation.iova,
                    translation.size,
                    access.write,
                    translation.runs[0],
                    translation.number,
                )
            )

    def end(self, translation: Translation) -> None:
        """The transaction is no longer in flight."""
        self._own.pop(id(translation), None)
        self._in_flight.retire(translation)
        if self.ats is not None:
            self.ats.release(translation)
        if self.host is not None:
            self.host.leave(translation)

    @property
    def transactions(self) -> list[Translation]:
        """The port's transactions that are in flight, oldest first."""
        return list(self._own.values())

    @property
    def in_flight(self) -> int:
        """How many there are of them."""
        return len(self._own)

    def keep_time(self, clock: Callable[[], float]) -> None:
        """From here on note when a transaction begins."""
        self._in_flight.clock = clock

    def since(self, translation: Translation) -> float | None:
        """When a transaction in flight began, by that clock; None if it began before there was one."""
        return self._in_flight.since(translation)

    def close(self, why: str) -> None:
        """Take no more transactions, as if Bus Master was off for good. Those in flight end as ever."""
        self.bus_master, self.closed = False, why

    def reset(self) -> None:
        """Function level reset, after the function's transfers have ended."""
        if self.ats is not None:
            self.ats.reset()
        if self.pasid is not None:
            self.pasid.reset()

    @property
    def capabilities(self) -> tuple[ExtendedCapability, ...]:
        """What the function's config space has for its DMA."""
        of_ats = () if self.ats is None else self.ats.capabilities
        return of_ats if self.pasid is None else (*of_ats, self.pasid.capability)

    def _refused(self, iova: int, write: bool, why: str, done: int = 0) -> DmaFault:
        if self._tracer:
            self._tracer.emit(DmaRefused(self.stream_id, iova, write, why))
        return DmaFault(iova, done, why)
