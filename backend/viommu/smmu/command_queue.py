"""The command queue: fetch, decode, effect, completion, errors (IHI 0070, chapter 4 and 7.1)."""

from collections.abc import Callable

from viommu.layouts.commands import (
    COMMAND_SIZE,
    LAYOUTS,
    Command,
    CompletionSignal,
    SyncCommand,
)
from viommu.layouts.registers import COMMAND_ERROR_SHIFT, CommandError, GlobalError
from viommu.memory import BusError, GuestMemory
from viommu.smmu.ats_port import AtsPort
from viommu.smmu.barrier import InFlight
from viommu.smmu.command_effects import CommandEffects
from viommu.smmu.events import CommandConsumed, CommandFailed, SyncCompleted, SyncWaiting
from viommu.smmu.features import Features
from viommu.smmu.points import CommandCompleting, CommandFetched, SyncBarrier, SyncCompleting
from viommu.smmu.queues import Ring
from viommu.trace import Again, Defer, Hold, Refuse, Replace, Skip, Tracer, Wait

COMMANDS_PER_STEP = 256
"""How many commands are consumed before others get their turn."""


class CommandQueue:
    """Consumes commands in order. One CMD_SYNC at a time can hold it, or one CMD_ATC_INV that cannot be sent yet."""

    def __init__(
        self,
        memory: GuestMemory,
        features: Features,
        tracer: Tracer,
        effects: CommandEffects,
        in_flight: InFlight,
        ats_port: AtsPort,
        *,
        raise_error: Callable[[GlobalError], None],
        interrupt: Callable[[], None],
        settled: Callable[[], None],
    ) -> None:
        self.ring = Ring(COMMAND_SIZE, features.command_queue_log2)
        self.enabled = False
        self.stopped = False
        """An error is active: nothing is consumed until GERRORN acknowledges it."""
        self.waiting = False
        """A command waits for transactions in flight, or for functions."""
        self.failed = False
        """Service failure mode."""
        self._epoch = 0  # what was held back before a reset is nobody's business after it
        self._memory = memory
        self._sends_messages = features.msi
        self._output_mask = (1 << features.output_address_bits) - 1  # of an MSI's address (3.4.3)
        self._tracer = tracer
        self._effects = effects
        self._in_flight = in_flight
        self._ats_port = ats_port
        self._raise_error = raise_error
        self._interrupt = interrupt
        self._settled = settled

    def reset(self) -> None:
        """As after reset: nothing queued, nothing waiting."""
        self.ring.reset()
        self._epoch += 1
        self.enabled = self.stopped = self.waiting = self._effects.invalidated = False

    @property
    def active(self) -> bool:
        """CMDQEN is 1, or still acknowledged as 1: the queue's registers are read-only."""
        return self.enabled or self.waiting

    @property
    def busy(self) -> bool:
        """There is a command that can be consumed now."""
        return self.enabled and not (self.stopped or self.waiting or self.failed or self.ring.empty)

    def step(self) -> None:
        """Consume up to `COMMANDS_PER_STEP` commands."""
        for _ in range(COMMANDS_PER_STEP):
            if not self.busy:
                return
            self._consume()

    def _consume(self) -> None:
        ring = self.ring
        try:
            data = self._memory.read(ring.address(ring.cons), COMMAND_SIZE)
        except BusError:
            self._fail(CommandError.CERROR_ABT)
            return
        command = _decoded(data)
        if self._tracer.meddler is not None:
            self._consume_meddled(command)
        else:
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        if type(command) is SyncCommand:
            self._sync(command)
        elif self._effects.holds(command):
            self.waiting = True
            self._ats_port.when_done(self._resume)
        elif not self._effects.apply(command):
            self._fail(CommandError.CERROR_ILL)
        elif self._tracer.meddler is not None:
            self._complete_meddled(command)
        else:
            self._done(command)

    def _fail(self, error: CommandError) -> None:
        """Stop at this command (7.1). CONS keeps its index."""
        ring = self.ring
        ring.cons = ring.cons & ~(0x7F << COMMAND_ERROR_SHIFT) | error << COMMAND_ERROR_SHIFT
        self.stopped = True
        if self._tracer:
            self._tracer.emit(CommandFailed(error.name, self._index))
        self._raise_error(GlobalError.CMDQ_ERR)

    def _done(self, command: Command) -> None:
        if self._tracer:
            self._tracer.emit(
                CommandConsumed(_name(command), self._index, str(command), command.value)
            )
        self.ring.cons = self.ring.after(self.ring.cons)

    @property
    def _index(self) -> int:
        return self.ring.cons & self.ring.index_mask

    def _sync(self, command: SyncCommand) -> None:
        """Complete when all transactions that the invalidations before it concern are done (4.7.3, 3.21.3).

        The choice: it waits for every transaction in flight if anything was invalidated since the last CMD_SYNC, and
        for all functions that were told to invalidate. One that did not answer is an error, after which the CMD_SYNC
        can be tried again (3.9.1.4).
        """
        if command.cs > CompletionSignal.SIG_SEV:
            self._fail(CommandError.CERROR_ILL)
            return
        idle = not (len(self._in_flight) or len(self._ats_port) or self._ats_port.failed)
        if idle or not self._effects.invalidated:
            self._effects.invalidated = False
            self._complete(command)
            return
        transactions = len(self._in_flight) + len(self._ats_port)
        if self._tracer.meddler is not None and isinstance(
            self._tracer.meddler(SyncBarrier(self._index, transactions)), Skip
        ):
            self._complete(command)
            return
        self.waiting = True
        if transactions and self._tracer:
            self._tracer.emit(SyncWaiting(transactions))
        self._in_flight.when_done(lambda: self._wait_for_functions(command))

    def _wait_for_functions(self, command: SyncCommand) -> None:
        self._ats_port.when_done(lambda: self._release(command))

    def _release(self, command: SyncCommand) -> None:
        self.waiting = False
        if self._ats_port.failed:
            self._ats_port.failed = False
            self._fail(CommandError.CERROR_ATC_INV_SYNC)
        else:
            self._effects.invalidated = False
            self._complete(command)
        self._settled()

    def _resume(self) -> None:
        self.waiting = False
        self._settled()

    def _complete(self, command: SyncCommand) -> None:
        if self._tracer.meddler is not None:
            self._complete_sync_meddled(command)
            return
        self._done(command)
        self._signal(command, command.msi_data)

    def _signal(self, command: SyncCommand, data: int) -> None:
        # IDR0.SEV is 0: SIG_SEV completes like SIG_NONE (4.7.3).
        if command.cs == CompletionSignal.SIG_IRQ:
            if self._sends_messages and (address := command.msi_address):
                try:
                    self._memory.store_u32(address & self._output_mask, data)
                except BusError:
                    self._raise_error(GlobalError.MSI_CMDQ_ABT_ERR)
            else:
                self._interrupt()
        if self._tracer:
            self._tracer.emit(SyncCompleted(command.cs.name))

    # With a meddler

    def _consume_meddled(self, command: Command) -> None:
        assert self._tracer.meddler is not None
        stream_id = getattr(command, "stream_id", None)
        point = CommandFetched(_name(command), stream_id, self._index, command.value)
        match self._tracer.meddler(point):
            case Refuse(code):
                self._fail(CommandError(code or CommandError.CERROR_ILL))
            case Replace(value):
                self._carry_out(_decoded(value.to_bytes(COMMAND_SIZE, "little")))
            case Wait(hold):
                self._hold(hold, lambda: self._carry_out(command))
            case Skip():
                self._done(command)
            case Defer(hold):
                self._done(command)
                self._later(hold, lambda: self._effects.apply(command))
            case Again(count):
                for _ in range(count):
                    self._effects.apply(command)
                self._carry_out(command)
            case _:
                self._carry_out(command)

    def _complete_meddled(self, command: Command) -> None:
        assert self._tracer.meddler is not None
        stream_id = getattr(command, "stream_id", None)
        point = CommandCompleting(_name(command), stream_id, self._index)
        match self._tracer.meddler(point):
            case Wait(hold):
                self._hold(hold, lambda: self._done(command))
            case _:
                self._done(command)

    def _complete_sync_meddled(self, command: SyncCommand) -> None:
        assert self._tracer.meddler is not None
        data = command.msi_data

        def complete(times: int = 1) -> None:
            self._done(command)
            for _ in range(times):
                self._signal(command, data)

        match self._tracer.meddler(SyncCompleting(command.cs.name, self._index, data)):
            case Wait(hold):
                self._hold(hold, complete)
            case Skip():
                complete(0)
            case Again(count):
                complete(1 + count)
            case Replace(value):
                data = value & 0xFFFF_FFFF
                complete()
            case Defer(hold):
                complete(0)
                self._later(hold, lambda: self._signal(command, data))
            case _:
                complete()

    def _hold(self, hold: Hold, proceed: Callable[[], object]) -> None:
        """Consume nothing until `hold` is released, and then go on with `proceed`."""

        def resume() -> None:
            self.waiting = False
            proceed()
            self._settled()

        self.waiting = True
        self._later(hold, resume)

    def _later(self, hold: Hold, proceed: Callable[[], object]) -> None:
        epoch = self._epoch
        hold.then(lambda: proceed() if epoch == self._epoch else None)


def _decoded(data: bytes) -> Command:
    layout: type[Command] = LAYOUTS.get(data[0], Command)  # type: ignore[call-overload]
    return layout.from_bytes(data)


def _name(command: Command) -> str:
    return getattr(command.opcode, "name", hex(command.opcode))
