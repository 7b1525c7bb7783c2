"""The SMMU test engine: 64 frames that each fill, copy or add up memory by DMA.

It follows the register map and the rules of Arm's SMMUv3TestEngine as a PCI function, so that software
written for that drives it. Where Arm's description leaves something open or contradicts itself, this one
does the following.

Registers
    A frame is plain storage except for `cmd`, `pctrl.SSD_NS` and what the engine itself writes. `cmd` is
    written by one aligned 32-bit access; the bytes of any other write that fall on it are dropped. A write
    over several frames acts on each. While a frame runs, both its halves ignore writes; only a reset
    stops it. Every access through PCI is non-secure, so SSD_NS reads 1 and stays. Frames from 64 on read 0
    (ENGINE_NO_FRAME) and ignore writes. At reset a frame is 0 but for `cmd` = ENGINE_HALTED, SSD_NS, and
    `substreamid` = none. `streamid` and `msiattr` are kept and have no effect.
Misconfigured
    is also: a command that is none (ENGINE_ERROR and ENGINE_FRAME_MISCONFIGURED among them), a range that
    ends before it begins, a downstream port other than 0, more than 64 MiB to move, a destination past the
    end of the address space. Stride 0 is misconfigured and not an error, for all three commands.
Transactions
    Order and sizes are those of `pattern.transactions`; each frame has one in flight at a time. The two
    counts are of pieces of the range (in MEMCPY a read with its write is one), go on over commands, and
    differ by what is in flight. `uctrl.RATE`, when it is not 0, limits a transaction to RATE × 64 bytes:
    64 MiB at RATE 1 are a million of them. In `attributes` InD and PnU count, for the source and the
    destination alike; memory type, shareability and NS have no meaning here and are not checked.
Data
    RAND48 writes every byte of the range, `end_incl` too. With a stride of eights each word is a run of
    its own, seeded with its address. MEMCPY with such a stride copies the word at (begin & ~7) + n * stride
    to (udata0 & ~7) + n * stride, and where source and destination overlap, transaction by transaction.
    SUM64 writes udata1 only when it is complete.
Errors
    `udata2` gets the IOVA, in the source or the destination, of the first byte of the aborted transaction
    that was not moved; what lies before it in that transaction was. An abort ends the command. With Bus
    Master off the first transaction aborts.
ATS
    With ATS_ENABLE in the frame, and ATS Enable in the function's capability, transactions go out Translated, by
    translations that the function asks for and keeps. Without the second they go out untranslated. A request that is
    refused, for want of permission or with UR or CA, is an abort. With PRI_ENABLE too, and PRI enabled in the function,
    want of permission makes a page request of up to eight pages; the frame waits for the response and then tries again,
    but aborts when that is not Success, or no page may be asked for.
PASID
    With the capability, a transaction with a SubstreamID is an abort until PASID Enable is set, and its PnU and InD
    count when their enables are. Without it, every SubstreamID goes out.
Interrupts
    come at the end of a command, complete or aborted, when msiaddress is 1: MSI-X vector `msidata`, or INTx
    when that is in use. uctrl.MSI_ABORTED is set when nobody listens or the vector is not below 64, and
    stays until software clears it.
PCI
    The IDs, revision and class (0xFF0000, unassigned) are those of Arm's models. BAR0 holds one pair of
    pages. Those models keep the MSI-X table in BAR2; INTx is our addition.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random

from viommu.endpoints.base import Bar, Endpoint, ExtendedCapability, Identity
from viommu.endpoints.engine_work import EngineWork, misconfiguration
from viommu.endpoints.port import DmaFault, DmaPort
from viommu.layouts.bitfields import Bits
from viommu.layouts.test_engine import (
    BAR_SIZE,
    FRAME_COUNT,
    FRAME_SIZE,
    NO_SUBSTREAM_ID,
    PRIVILEGED_PAGE,
    EngineCommand,
    PrivilegedFrame,
    UserFrame,
    offset_of,
    privileged_frame,
    user_frame,
)
from viommu.trace import Event, Tracer


@dataclass(frozen=True, slots=True)
class EngineStarted(Event):
    """A frame begins a command; `destination` is udata0."""

    endpoint: str
    frame: int
    command: str
    begin: int
    end_incl: int
    destination: int


@dataclass(frozen=True, slots=True)
class EngineRefused(Event):
    """A frame was misconfigured, for `reason`."""

    endpoint: str
    frame: int
    reason: str


@dataclass(frozen=True, slots=True)
class EngineEnded(Event):
    """A frame's command is complete (`HALTED`), aborted (`ERROR`), or stopped by a reset (`NO_FRAME`)."""

    endpoint: str
    frame: int
    command: str
    status: str
    transactions: int
    error_address: int | None


class SmmuTestEngine(Endpoint):
    """The function: BAR0 with the frames, and `step` to carry out what they run."""

    identity = Identity(
        vendor_id=0x13B5,
        device_id=0xFF80,
        class_code=0xFF_0000,
        subsystem_vendor_id=0x13B5,
        revision=0xF,
    )
    bars = (Bar(0, BAR_SIZE),)
    msix_vectors = 64

    def __init__(
        self,
        port: DmaPort,
        *,
        name: str = "test-engine",
        order: Random | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Reach memory through `port`. Running frames take turns; `order` shuffles each round of them."""
        self.name = name
        self.interrupt: Callable[[int], bool] = lambda _vector: False
        self._port, self._order = port, order
        self._tracer = tracer if tracer is not None else Tracer()
        self._bar = bytearray()
        self._work: dict[int, EngineWork] = {}
        self._round: list[int] = []
        self.reset()

    @property
    def capabilities(self) -> tuple[ExtendedCapability, ...]:
        """ATS, PRI and PASID, where the SMMU and the profile have them."""
        return self._port.capabilities

    @property
    def busy(self) -> bool:
        """Whether a frame is running, and not merely stalled."""
        return any(not work.stalled for work in self._work.values())

    def reset(self) -> None:
        """Stop every frame, end transfers in flight without moving their bytes, reset the registers."""
        with ExitStack() as over:  # all of them, though the end of one fails
            over.callback(self._work.clear)
            for index, work in reversed(self._work.items()):
                over.callback(self._report, index, work, EngineCommand.NO_FRAME)
                over.callback(work.cancel)
        self._round.clear()
        self._port.reset()
        self._bar = bytearray(BAR_SIZE)
        user = UserFrame(cmd=EngineCommand.HALTED).to_bytes()
        privileged = PrivilegedFrame(ssd_ns=True, substreamid=NO_SUBSTREAM_ID).to_bytes()
        self._bar[: FRAME_COUNT * FRAME_SIZE] = user * FRAME_COUNT
        end = PRIVILEGED_PAGE + FRAME_COUNT * FRAME_SIZE
        self._bar[PRIVILEGED_PAGE:end] = privileged * FRAME_COUNT

    def read(self, bar: int, offset: int, size: int) -> int:
        """`size` bytes of a BAR, little-endian; 0 where there is nothing."""
        if bar != 0 or offset < 0 or size < 0:
            return 0
        return int.from_bytes(self._bar[offset : offset + size], "little")

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write `size` bytes of a BAR, little-endian. Writing a whole `cmd` starts the command.

        Whether it was misconfigured can be read from `cmd` at once.
        """
        end = min(offset + size, BAR_SIZE)
        if bar != 0 or offset < 0 or end <= offset:
            return
        size = end - offset
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        for frame in range(offset & -FRAME_SIZE, end, FRAME_SIZE):
            index = frame % PRIVILEGED_PAGE // FRAME_SIZE
            if index >= FRAME_COUNT or index in self._work:
                continue
            start, stop = max(offset, frame), min(end, frame + FRAME_SIZE)
            if frame < PRIVILEGED_PAGE:
                if (offset, size) == (frame, 4):
                    self._command(index, int.from_bytes(data, "little"))
                    return
                start = min(max(start, frame + 4), stop)
            self._bar[start:stop] = data[start - offset : stop - offset]
            if frame >= PRIVILEGED_PAGE:
                self._bar[frame] |= 1

    def _command(self, index: int, command: int) -> None:
        if command in (EngineCommand.NO_FRAME, EngineCommand.HALTED):
            self._put(index, UserFrame.cmd, EngineCommand.HALTED)
            return
        self._put(index, UserFrame.cmd, command)
        user = UserFrame.from_bytes(memoryview(self._bar)[user_frame(index) :])
        privileged = PrivilegedFrame.from_bytes(memoryview(self._bar)[privileged_frame(index) :])
        reason = misconfiguration(user, privileged)
        if reason is not None:
            self._put(index, UserFrame.cmd, EngineCommand.FRAME_MISCONFIGURED)
            if self._tracer:
                self._tracer.emit(EngineRefused(self.name, index, reason))
            return
        work = EngineWork(user, privileged, self._port)
        self._work[index] = work
        if self._tracer:
            self._tracer.emit(
                EngineStarted(
                    self.name, index, work.command.name, user.begin, user.end_incl, user.udata0
                )
            )

    def step(self) -> bool:
        """Let one running frame do one small thing. Returns whether one is still running, and not merely stalled."""
        if not self.busy:
            return False
        if not self._round:
            self._round = list(reversed(self._work))
            if self._order is not None:
                self._order.shuffle(self._round)
        index = self._round.pop()
        work = self._work[index]
        if work.stalled:
            return True
        fault: DmaFault | None = None
        try:
            more = work.step()
        except DmaFault as caught:
            more, fault = False, caught
        user = work.user
        launched = user.count_of_transactions_launched + work.launched
        returned = user.count_of_transactions_returned + work.returned
        self._put(index, UserFrame.count_of_transactions_launched, launched)
        self._put(index, UserFrame.count_of_transactions_returned, returned)
        if not more:
            self._end(index, work, fault)
        return self.busy

    def _end(self, index: int, work: EngineWork, fault: DmaFault | None) -> None:
        del self._work[index]
        if fault is not None:
            self._put(index, UserFrame.udata2, fault.address)
        elif work.command == EngineCommand.SUM64:
            self._put(index, UserFrame.udata1, work.sum)
        status = EngineCommand.HALTED if fault is None else EngineCommand.ERROR
        self._put(index, UserFrame.cmd, status)
        self._report(index, work, status, None if fault is None else fault.address)
        vector = work.user.msidata
        if work.user.msiaddress and not (vector < self.msix_vectors and self.interrupt(vector)):
            self._bar[user_frame(index) + offset_of(UserFrame.msi_aborted)] |= 1

    def _report(
        self, index: int, work: EngineWork, status: EngineCommand, error_address: int | None = None
    ) -> None:
        if self._tracer:
            command = work.command.name
            self._tracer.emit(
                EngineEnded(self.name, index, command, status.name, work.returned, error_address)
            )

    # For fields of whole bytes: the value goes in modulo their width.
    def _put(self, index: int, field: Bits[int] | Bits[EngineCommand], value: int) -> None:
        start = user_frame(index) + offset_of(field)
        size = field.mask.bit_length() // 8
        self._bar[start : start + size] = (value & field.mask).to_bytes(size, "little")
