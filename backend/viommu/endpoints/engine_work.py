"""One command of a test engine frame, from the check of its fields to its last transaction."""

from collections.abc import Generator, Iterator

from viommu.endpoints.pattern import PIECE, rand48, sum64, transaction_count, transactions
from viommu.endpoints.port import DmaAttributes, DmaFault, DmaPort, DmaStalled, Transfer
from viommu.layouts.test_engine import (
    NO_SUBSTREAM_ID,
    EngineCommand,
    PrivilegedFrame,
    UserFrame,
)

SIZE_LIMIT = 64 << 20
"""The most that one command moves, bytes."""
RATE_UNIT = 64
"""A transaction moves at most `uctrl.RATE` times this many bytes, when RATE is not 0."""
MSI_VECTORS = 2048
"""What `msidata` can name."""

TRIES = 1000
"""How often a transaction is begun again because software said that it may."""

_SPACE = 1 << 64


def misconfiguration(user: UserFrame, privileged: PrivilegedFrame) -> str | None:
    """Why the command in `user.cmd` cannot run, or None when it can."""
    if user.cmd not in (EngineCommand.MEMCPY, EngineCommand.RAND48, EngineCommand.SUM64):
        return f"{int(user.cmd):#x} is not a command"
    begin, end, stride = user.begin, user.end_incl, user.stride
    if user.msiaddress > 1:
        return f"msiaddress {user.msiaddress:#x} is neither 0 nor 1"
    if user.msiaddress and user.msidata >= MSI_VECTORS:
        return f"msidata {user.msidata} is not below {MSI_VECTORS}"
    if privileged.substreamid != NO_SUBSTREAM_ID and privileged.substreamid >> 20:
        return f"substreamid {privileged.substreamid:#x} has more than 20 bits"
    if privileged.downstream_port_index:
        return f"downstream port {privileged.downstream_port_index} does not exist"
    if stride != 1 and (stride == 0 or stride % 8):
        return f"stride {stride} is neither 1 nor a multiple of 8"
    if end < begin:
        return f"the range ends at {end:#x}, before its begin {begin:#x}"
    if begin & ~7 == 0 and end | 7 == _SPACE - 1:
        return "the range is the whole address space"
    size = end - begin + 1 if stride == 1 else 8 * transaction_count(begin, end, stride)
    if size > SIZE_LIMIT:
        return f"{size} bytes are more than {SIZE_LIMIT}"
    if user.cmd == EngineCommand.SUM64 and (begin & 7 or ~end & 7):
        return f"[{begin:#x}, {end:#x}] is not made of 64-bit words"
    if (
        user.cmd == EngineCommand.MEMCPY
        and _destination(user, end | (0 if stride == 1 else 7)) >= _SPACE
    ):
        return f"the destination {user.udata0:#x} passes the end of the address space"
    return None


def _destination(user: UserFrame, address: int) -> int:
    # Words of a stride lie in the destination as they do in the source: both from an aligned begin.
    align = 0 if user.stride == 1 else 7
    return (user.udata0 & ~align) + address - (user.begin & ~align)


class EngineWork:
    """A command that `misconfiguration` found nothing wrong with, being carried out.

    Each `step` begins one transfer, or moves its bytes and ends it; in between it is in flight. Where the
    port cuts a transfer short, its front moves and the rest is tried on its own.
    """

    def __init__(self, user: UserFrame, privileged: PrivilegedFrame, port: DmaPort) -> None:
        self.command = EngineCommand(user.cmd)
        self.launched = 0
        """Transactions begun; one is a piece of the range, in MEMCPY with both its read and its write."""
        self.returned = 0
        """Transactions that are over."""
        self.sum = 0
        """What SUM64 has added up so far."""
        self.user = user
        """The frame as it was when the command was written."""
        self._port = port
        self._held: DmaStalled | None = None
        self._transfer: Transfer | None = None  # that is in flight, and waits
        substream_id = privileged.substreamid
        self._substream_id = None if substream_id == NO_SUBSTREAM_ID else substream_id
        ats, pri = privileged.ats_enable, privileged.pri_enable
        self._source = DmaAttributes(user.source_privileged, user.source_instruction, ats, pri)
        self._sink = DmaAttributes(
            user.destination_privileged, user.destination_instruction, ats, pri
        )
        self._limit = min(PIECE, user.rate * RATE_UNIT or PIECE)
        longest = min(self._limit, user.end_incl - user.begin + 1) if user.stride == 1 else 8
        self._buffer = memoryview(bytearray(longest))
        self._steps: Generator[bool, None, None] = self._run()
        next(self._steps)

    @property
    def stalled(self) -> bool:
        """The SMMU holds the transaction, and software has not answered yet; or it waits in flight: nothing to do."""
        if self._transfer is not None:
            return self._transfer.waiting
        return self._held is not None and self._held.waiting

    def step(self) -> bool:
        """Do one small thing. False: the command is complete.

        Raises `DmaFault` when a transaction was aborted: the command is over.
        """
        try:
            return next(self._steps, False)
        except DmaFault:
            self.returned = self.launched
            raise

    def cancel(self) -> None:
        """End the transfer in flight, if any, without moving its bytes. The command is over."""
        self._steps.close()

    # Pauses come before each transfer and while it is in flight, none after the last.
    def _run(self) -> Generator[bool, None, None]:
        user = self.user
        for address, size in transactions(
            user.begin, user.end_incl, user.stride, user.seed, self._limit
        ):
            yield True
            self.launched += 1
            if self.command == EngineCommand.RAND48:
                begin = user.begin if user.stride == 1 else address
                data = rand48(user.seed, begin, address, size)
                yield from self._write(address, memoryview(data))
            else:
                yield from self._consume(address, size)
            self.returned += 1

    def _consume(self, address: int, size: int) -> Iterator[bool]:
        end = address + size
        while address < end:
            data, fault = yield from self._read(address, end - address)
            if self.command == EngineCommand.SUM64:
                self.sum += sum64(data) if fault is None else 0
            elif data:
                yield True
                yield from self._write(_destination(self.user, address), data)
            if fault is not None:
                raise fault
            address += len(data)
            if address < end:
                yield True

    # What one transfer reads, which is not all where a later page does not translate, and the fault that stopped it.
    def _read(
        self, iova: int, size: int
    ) -> Generator[bool, None, tuple[memoryview, DmaFault | None]]:
        with (yield from self._begin(iova, size, write=False)) as transfer:
            data = self._buffer[: transfer.size]
            yield True
            yield from self._released(transfer)
            try:
                transfer.read_into(data)
            except DmaFault as fault:
                return data[: fault.done], fault
            yield from self._released(transfer)
            return data, None

    def _begin(self, iova: int, size: int, *, write: bool) -> Generator[bool, None, Transfer]:
        for _ in range(TRIES):
            try:
                return self._port.begin(
                    iova,
                    size,
                    write=write,
                    substream_id=self._substream_id,
                    attributes=self._sink if write else self._source,
                )
            except DmaStalled as held:
                self._held = held
            yield True
            while self._held.waiting:
                yield True
            if self._held.aborted:
                raise DmaFault(iova, 0, "software aborted the stalled transaction")
            self._held = None
        raise DmaFault(iova, 0, "software said that the page is there, and it never was")

    def _write(self, iova: int, data: memoryview) -> Iterator[bool]:
        while data:
            with (yield from self._begin(iova, len(data), write=True)) as transfer:
                size = transfer.size
                yield True
                yield from self._released(transfer)
                transfer.write_from(data[:size])
                yield from self._released(transfer)
            iova, data = iova + size, data[size:]
            if data:
                yield True

    def _released(self, transfer: Transfer) -> Iterator[bool]:
        """Wait, in flight, as long as somebody holds the transfer."""
        while transfer.waiting:
            self._transfer = transfer
            yield True
        self._transfer = None
