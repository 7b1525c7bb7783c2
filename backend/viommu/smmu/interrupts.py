"""Global errors, and the interrupts of the queues: by MSI or by wire (IHI 0070, 3.18, 6.3.18 and 7.5)."""

from collections.abc import Callable

from viommu.layouts.registers import PRIQ_LAST_ONLY, GlobalError, IrqCtrl, Register
from viommu.memory import BusError, GuestMemory
from viommu.smmu.events import GlobalErrorRaised
from viommu.smmu.features import Features
from viommu.smmu.points import InterruptRaised
from viommu.trace import Again, Defer, Skip, Tracer

_CAUSES = {
    int(Register.GERROR_IRQ_CFG0): "GERROR",
    int(Register.EVENTQ_IRQ_CFG0): "EVENTQ",
    int(Register.PRIQ_IRQ_CFG0): "PRIQ",
}


class Interrupts:
    """Raises errors and interrupts as the registers, which it shares with the model, say."""

    def __init__(
        self,
        registers: dict[int, int],
        memory: GuestMemory,
        features: Features,
        tracer: Tracer,
        *,
        pulse: Callable[[], object],
    ) -> None:
        self._registers = registers
        self._memory = memory
        self._features = features
        self._tracer = tracer
        self._pulse = pulse

    def error_active(self, error: GlobalError) -> bool:
        """GERROR and GERRORN differ in it."""
        registers = self._registers
        return bool(
            (registers.get(Register.GERROR, 0) ^ registers.get(Register.GERRORN, 0)) & error
        )

    def raise_error(self, error: GlobalError) -> None:
        """Make `error` active, if it is not."""
        registers = self._registers
        if self.error_active(error):
            return
        registers[Register.GERROR] = registers.get(Register.GERROR, 0) ^ error
        if self._tracer:
            self._tracer.emit(GlobalErrorRaised(str(error.name)))
        # That a GERROR MSI aborted is not told by another one (7.5.1).
        if error != GlobalError.MSI_GERROR_ABT_ERR and self._control.gerror_irqen:
            self._signal(Register.GERROR_IRQ_CFG0, GlobalError.MSI_GERROR_ABT_ERR)

    @property
    def _control(self) -> IrqCtrl:
        return IrqCtrl(self._registers.get(Register.IRQ_CTRL, 0))

    def pulse(self) -> None:
        """The wired interrupt of a CMD_SYNC."""
        self._raise("CMD_SYNC", self._pulse)

    def _raise(self, cause: str, send: Callable[[], object]) -> None:
        if self._tracer.meddler is None:
            send()
            return
        match self._tracer.meddler(InterruptRaised(cause)):
            case Skip():
                pass
            case Again(count):
                for _ in range(1 + count):
                    send()
            case Defer(hold):
                hold.then(send)
            case _:
                send()

    def of_event(self) -> None:
        """A record was written to the event queue."""
        if self._control.eventq_irqen:
            self._signal(Register.EVENTQ_IRQ_CFG0, GlobalError.MSI_EVENTQ_ABT_ERR)

    def of_page_request(self, last: bool, lost: bool) -> None:
        """A page request, the last of its group or not, was written or, in an overflow, lost (6.3.36)."""
        last_only = bool(self._registers.get(Register.PRIQ_IRQ_CFG2, 0) & PRIQ_LAST_ONLY)
        if self._control.priq_irqen and (last if last_only else not lost):
            self._signal(Register.PRIQ_IRQ_CFG0, GlobalError.MSI_PRIQ_ABT_ERR)

    def _signal(self, cfg0: int, on_abort: GlobalError) -> None:
        self._raise(_CAUSES[cfg0], lambda: self._send(cfg0, on_abort))

    def _send(self, cfg0: int, on_abort: GlobalError) -> None:
        """The MSI that is configured at `cfg0`, or else the wired interrupt."""
        address = self._registers.get(cfg0, 0)
        if not address or not self._features.msi:
            self._pulse()
            return
        try:
            self._memory.store_u32(address, self._registers.get(cfg0 + 8, 0))
        except BusError:
            self.raise_error(on_abort)
