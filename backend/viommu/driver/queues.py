"""The command queue and the event queue (IHI 0070, 3.5 and chapters 4 and 7)."""

from enum import Enum
from typing import NamedTuple

from viommu.driver.access import Memory, Poll, Registers
from viommu.driver.errors import CommandQueueError
from viommu.layouts.commands import (
    COMMAND_SIZE,
    Command,
    CompletionSignal,
    Opcode,
    SyncCommand,
)
from viommu.layouts.records import EVENT_RECORD_SIZE, EventRecord
from viommu.layouts.registers import (
    COMMAND_ERROR_SHIFT,
    QUEUE_OVERFLOW,
    CommandError,
    GlobalError,
    QueueBase,
    Register,
)

_QUEUE_ALIGNMENT = 32
_COMMAND_ERROR_MASK = 0x7F
_CACHED = 0xF
"""MSIAttr: Normal, write-back, cacheable."""
_INNER_SHAREABLE = 3
_WORD, _HALF = 0xFFFF_FFFF, 1 << 31
_MEMORY_LOOKS = 64
"""How often to look at a word in memory between two reads of GERROR, which are far dearer."""


class Completion(Enum):
    """How the driver learns that a CMD_SYNC completed (4.7.3)."""

    CONS = "cons"
    """CS = SIG_NONE: poll until CMDQ_CONS has passed it."""
    SEV = "sev"
    """CS = SIG_SEV: the event would end a WFE; a program without WFE polls CMDQ_CONS as well."""
    MSI = "msi"
    """CS = SIG_IRQ: the SMMU writes a word to memory, and that is polled."""


class PendingSync(NamedTuple):
    """A CMD_SYNC that was issued: PROD behind it, and with `Completion.MSI` the number that its message carries."""

    prod: int
    serial: int = 0


class Ring:
    """The arithmetic of PROD and CONS: an index of `log2size` bits with one wrap bit above it (3.5.1)."""

    __slots__ = ("entries", "log2size", "pointer_mask")

    def __init__(self, log2size: int) -> None:
        self.log2size = log2size
        self.entries = 1 << log2size
        self.pointer_mask = 2 * self.entries - 1

    def index(self, pointer: int) -> int:
        """The entry that `pointer` is at."""
        return pointer & self.entries - 1

    def used(self, prod: int, cons: int) -> int:
        """The entries between `cons` and `prod`: 0 is empty, `entries` is full."""
        return (prod - cons) & self.pointer_mask

    def advance(self, pointer: int, count: int = 1) -> int:
        """`pointer` moved by `count` entries, other bits dropped."""
        return (pointer + count) & self.pointer_mask


class CommandQueue:
    """Puts commands in memory, rings the SMMU, and waits for their completion.

    Call `program` while CR0.CMDQEN is 0, and issue once it is 1.
    """

    def __init__(
        self,
        registers: Registers,
        memory: Memory,
        log2size: int,
        poll: Poll,
        completion: Completion = Completion.CONS,
    ) -> None:
        self.ring = Ring(log2size)
        self.completion = completion
        self._registers, self._memory, self._poll = registers, memory, poll
        size = COMMAND_SIZE << log2size
        self.buffer = memory.allocate(size, max(size, _QUEUE_ALIGNMENT))
        self._message = memory.allocate(64, 64)
        self._prod = 0
        # As it was last seen: it only moves on, so there is at least the room that it says.
        self._cons = 0
        self._serial = 0
        # The CMD_SYNCs that somebody waits for, by their index, and the error at which each of them failed.
        self._awaited: dict[int, CommandQueueError | None] = {}

    def program(self) -> None:
        """Write CMDQ_BASE, PROD and CONS, which empties the queue (6.3.26)."""
        base = QueueBase(addr=self.buffer.address, log2size=self.ring.log2size, hint=True)
        self._prod = self._cons = 0
        self._registers.write64(Register.CMDQ_BASE, base.value)
        self._registers.write32(Register.CMDQ_PROD, 0)
        self._registers.write32(Register.CMDQ_CONS, 0)

    def issue(self, *commands: Command) -> None:
        """Hand the commands to the SMMU, which may carry them out at any later time.

        Raises `DriverTimeout` when the queue stays full, `CommandQueueError` when the SMMU stopped at a command.
        """
        words, ring = self.buffer.words, self.ring
        for command in commands:
            if ring.used(self._prod, self._cons) == ring.entries:
                self._ring_doorbell()
                self._poll.until(self._has_room, "room in the command queue")
            place = 2 * ring.index(self._prod)
            words[place], words[place + 1] = command.qwords()
            self._prod = ring.advance(self._prod)
        self._ring_doorbell()

    def sync(self) -> None:
        """Issue CMD_SYNC and return when every command before it is complete, with its effect (4.7.3).

        Raises `DriverTimeout`, or `CommandQueueError` when the SMMU stopped at a command.
        """
        self.finish(self.begin_sync())

    def begin_sync(self) -> PendingSync:
        """Issue CMD_SYNC, for `finish` to wait for."""
        if self.completion is Completion.MSI:
            self._serial = self._serial + 1 & _WORD
            self.issue(
                SyncCommand(
                    opcode=Opcode.CMD_SYNC,
                    cs=CompletionSignal.SIG_IRQ,
                    msh=_INNER_SHAREABLE,
                    msi_attr=_CACHED,
                    msi_data=self._serial,
                    msi_address=self._message.address,
                )
            )
            return PendingSync(self._prod, self._serial)
        sev = self.completion is Completion.SEV
        signal = CompletionSignal.SIG_SEV if sev else CompletionSignal.SIG_NONE
        self.issue(SyncCommand(opcode=Opcode.CMD_SYNC, cs=signal))
        return PendingSync(self._prod)

    def finish(self, sync: PendingSync) -> None:
        """Return when `sync` is complete; raises as `sync()` does.

        Others may have issued commands meanwhile: `relax` of the `Poll` may lead back here. Of a function that did not
        answer only the CMD_SYNC behind its own invalidation tells, which may be one that nobody waits for any more.
        """
        own = self.ring.index(sync.prod - 1)
        self._awaited[own] = None
        try:
            self._outlast(sync, {own})
        finally:
            failed = self._awaited.pop(own)
        if failed is not None:
            raise failed

    def _outlast(self, sync: PendingSync, told: set[int]) -> None:
        """Wait for `sync` though others before it fail, each of them once; those in `told` may not."""
        while True:
            try:
                return self._await(sync)
            except CommandQueueError as error:
                unanswered = error.code == CommandError.CERROR_ATC_INV_SYNC
                sync_of_another = error.entry & 0xFF == Opcode.CMD_SYNC and error.index not in told
                if not (unanswered and sync_of_another):
                    raise
                told.add(error.index)

    def _await(self, sync: PendingSync) -> None:
        if self.completion is Completion.MSI:
            self._await_message(sync)
            if self._behind(sync.prod) < self._behind(self._cons):
                self._cons = sync.prod
        else:
            self._poll.until(lambda: self._has_passed(sync.prod), "CMD_SYNC")

    def close(self) -> None:
        """Give the memory back. Only once CR0ACK.CMDQEN is 0."""
        self._memory.free(self.buffer)
        self._memory.free(self._message)

    def raise_error(self) -> None:
        """Raise `CommandQueueError` if GERROR says that consumption stopped, after starting it again.

        The command is replaced by a CMD_SYNC when it is the command itself that is at fault (CERROR_ILL): consumption
        goes on by fetching the same entry anew (7.1).
        """
        gerror, gerrorn = (self._registers.read32(r) for r in (Register.GERROR, Register.GERRORN))
        if not (gerror ^ gerrorn) & GlobalError.CMDQ_ERR:
            return
        cons = self._registers.read32(Register.CMDQ_CONS)
        code = cons >> COMMAND_ERROR_SHIFT & _COMMAND_ERROR_MASK
        index = self.ring.index(cons)
        words = self.buffer.words
        entry = words[2 * index + 1] << 64 | words[2 * index]
        if code == CommandError.CERROR_ILL:
            words[2 * index], words[2 * index + 1] = SyncCommand(opcode=Opcode.CMD_SYNC).qwords()
        self._registers.write32(Register.GERRORN, gerrorn ^ GlobalError.CMDQ_ERR)
        error = CommandQueueError(code, index, entry)
        if index in self._awaited:
            self._awaited[index] = error
        raise error

    def _await_message(self, sync: PendingSync) -> None:
        dwords = self._message.dwords

        def arrived() -> bool:
            # Numbers go up: that of a later CMD_SYNC will do, that of an earlier one which timed out will not.
            for _ in range(_MEMORY_LOOKS):
                if dwords[0] - sync.serial & _WORD < _HALF:
                    return True
            self.raise_error()
            return dwords[0] - sync.serial & _WORD < _HALF

        self._poll.until(arrived, "the message of CMD_SYNC")

    def _ring_doorbell(self) -> None:
        self._registers.write32(Register.CMDQ_PROD, self._prod)

    def _look(self) -> None:
        cons = self._registers.read32(Register.CMDQ_CONS)
        # ERR keeps its last value after an error was acknowledged: GERROR decides whether there is one (6.3.28).
        if cons >> COMMAND_ERROR_SHIFT & _COMMAND_ERROR_MASK:
            self.raise_error()
        self._cons = cons & self.ring.pointer_mask

    def _has_room(self) -> bool:
        self._look()
        return self.ring.used(self._prod, self._cons) < self.ring.entries

    def _has_passed(self, prod: int) -> bool:
        self._look()
        return self._behind(self._cons) <= self._behind(prod)

    def _behind(self, pointer: int) -> int:
        """The entries from `pointer` to the last command issued."""
        return self.ring.used(self._prod, pointer)


class EventQueue:
    """Takes event records out of memory. Call `program` while CR0.EVENTQEN is 0."""

    def __init__(self, registers: Registers, memory: Memory, log2size: int) -> None:
        self.ring = Ring(log2size)
        self.overflows = 0
        """How often the SMMU found the queue full and lost records."""
        self._registers, self._memory = registers, memory
        size = EVENT_RECORD_SIZE << log2size
        self.buffer = memory.allocate(size, max(size, _QUEUE_ALIGNMENT))
        self._cons = 0

    def program(self) -> None:
        """Write EVENTQ_BASE, PROD and CONS, which empties the queue (6.3.29)."""
        base = QueueBase(addr=self.buffer.address, log2size=self.ring.log2size, hint=True)
        self._cons = 0
        self._registers.write64(Register.EVENTQ_BASE, base.value)
        self._registers.write32(Register.EVENTQ_PROD, 0)
        self._registers.write32(Register.EVENTQ_CONS, 0)

    def read(self) -> list[EventRecord]:
        """Every record in the queue, oldest first; frees their places and acknowledges an overflow (7.4)."""
        prod = self._registers.read32(Register.EVENTQ_PROD)
        ring, view = self.ring, self.buffer.view
        records = []
        for step in range(ring.used(prod, self._cons)):
            place = EVENT_RECORD_SIZE * ring.index(self._cons + step)
            records.append(EventRecord.from_bytes(view[place : place + EVENT_RECORD_SIZE]))
        acknowledged = self._cons & QUEUE_OVERFLOW
        if prod & QUEUE_OVERFLOW != acknowledged:
            self.overflows += 1
        consumed = ring.advance(self._cons, len(records)) | prod & QUEUE_OVERFLOW
        if consumed != self._cons:
            self._cons = consumed
            self._registers.write32(Register.EVENTQ_CONS, consumed)
        return records

    def close(self) -> None:
        """Give the memory back. Only once CR0ACK.EVENTQEN is 0."""
        self._memory.free(self.buffer)
