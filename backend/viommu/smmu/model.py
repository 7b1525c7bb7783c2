"""The SMMU as software sees it: two register pages, and what each register does (IHI 0070, chapter 6)."""

from collections.abc import Callable

from viommu.layouts.bitfields import Layout
from viommu.layouts.registers import (
    COMMAND_ERROR_SHIFT,
    PAGE_1,
    QUEUE_OVERFLOW,
    REGISTER_FRAME_SIZE,
    WIDE_REGISTERS,
    Cr0,
    Cr2,
    Gbpa,
    GlobalError,
    IrqCfg0,
    IrqCtrl,
    QueueBase,
    Register,
    StrtabBase,
    StrtabBaseCfg,
)
from viommu.memory import BusError, GuestMemory
from viommu.smmu.barrier import InFlight
from viommu.smmu.command_effects import CommandEffects
from viommu.smmu.command_queue import CommandQueue
from viommu.smmu.configuration import Configuration
from viommu.smmu.event_queue import EventQueue
from viommu.smmu.events import GlobalErrorRaised, RegisterAccess
from viommu.smmu.faults import Access
from viommu.smmu.features import Features
from viommu.smmu.stall import StallTable
from viommu.smmu.tlb import Tlb
from viommu.smmu.transactions import Transactions
from viommu.smmu.translation import Translation, Translator
from viommu.smmu.walk import Walker
from viommu.trace import Tracer

_WORD = 0xFFFF_FFFF
_ERRORS = int(GlobalError.CMDQ_ERR | GlobalError.EVENTQ_ABT_ERR)
_MSI_ERRORS = int(
    GlobalError.MSI_CMDQ_ABT_ERR | GlobalError.MSI_EVENTQ_ABT_ERR | GlobalError.MSI_GERROR_ABT_ERR
)
# Writable bits of each layout: its fields, less those whose feature is absent.
_CR0 = Cr0(smmuen=True, eventqen=True, cmdqen=True).value
_CR1 = 0xFFF
_CR1_QUEUE = 0x3F
_CR2 = Cr2(recinvsid=True, ptm=True).value
_IRQ_CTRL = IrqCtrl(gerror_irqen=True, eventq_irqen=True).value
_GBPA = Gbpa(memattr=15, mtcfg=True, alloccfg=15, shcfg=3, abort=True).value
_GBPA_PERMISSIONS = Gbpa(privcfg=3, instcfg=3).value
_GBPA_RESET = Gbpa(shcfg=1).value


def _field_mask(layout: type[Layout]) -> int:
    return sum(field.mask << field.low for field in layout.fields.values())


class Smmu:
    """One SMMUv3 over one guest's memory.

    `interrupt` is called to pulse the combined wired interrupt. Nothing here runs by itself: MMIO, transactions and
    `step` drive it.
    """

    def __init__(
        self,
        memory: GuestMemory,
        features: Features | None = None,
        tracer: Tracer | None = None,
        interrupt: Callable[[], object] = lambda: None,
    ) -> None:
        self.features = features = features or Features()
        self.tracer = tracer = tracer if tracer is not None else Tracer()
        self.in_flight = InFlight()
        self.tlb = Tlb()
        self.stalls = StallTable(features.stall_max)
        walker = Walker(
            memory,
            self.tlb,
            wide=features.output_address_bits == 52,
            execute_never_2=features.stage_2_execute,
        )
        self.configuration = Configuration(memory, features, walker)
        self._memory = memory
        self.interrupt = interrupt
        self.events = EventQueue(
            memory,
            features,
            tracer,
            raise_error=self._raise_error,
            error_active=self._error_active,
            interrupt=self._event_interrupt,
        )
        translator = Translator(memory, self.configuration, self.tlb, walker, features)
        self.transactions = Transactions(
            self.configuration,
            translator,
            self.events,
            self.in_flight,
            self.stalls,
            tracer,
            records_bad_stream=lambda: Cr2(self._registers.get(Register.CR2, 0)).recinvsid,
        )
        effects = CommandEffects(
            features,
            self.configuration,
            self.tlb,
            self.stalls,
            prefetch=self.transactions.prefetch,
            answered=self._admit_stalls,
        )
        self.commands = CommandQueue(
            memory,
            features,
            tracer,
            effects,
            self.in_flight,
            raise_error=self._raise_error,
            interrupt=self._pulse,
            settled=self._settle_cr0,
        )
        self.reset()

    def reset(self) -> None:
        """All registers at their reset values, all caches empty. Transactions in flight go on to their end."""
        self._registers: dict[int, int] = {
            Register.IDR0: self.features.idr0().value,
            Register.IDR1: self.features.idr1().value,
            Register.IDR3: self.features.idr3().value,
            Register.IDR5: self.features.idr5().value,
            Register.AIDR: self.features.minor_revision,
            Register.GBPA: _GBPA_RESET,
        }
        self.in_flight.forget_waiters()
        self.tlb.invalidate_all()
        self.configuration.invalidate_all()
        self.configuration.e2h = False
        self.configuration.base = StrtabBase()
        self.configuration.base_cfg = StrtabBaseCfg()
        self.commands.reset()
        self.events.reset()
        self.stalls.terminate_all()
        self.transactions.enabled = self.transactions.global_abort = False
        self._draining = self._drain_again = False

    # Registers

    def read(self, offset: int, size: int) -> int:
        """Read `size` bytes at `offset` from page 0.

        What is no aligned access of 32 or 64 bits reads as 0 (6.2: a choice).
        """
        value = self._registers.get(offset) if size == 4 else None
        if value is not None:
            value &= _WORD  # what drivers poll ends here
        elif not self._reachable(offset, size):
            value = 0
        else:
            value = self._read_word(offset)
            if size == 8:
                value |= self._read_word(offset + 4) << 32
        if self.tracer:
            self.tracer.emit(RegisterAccess(_register_name(offset), False, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes at `offset` from page 0.

        What is no aligned access of 32 or 64 bits is ignored (6.2: a choice).
        """
        if self.tracer:
            self.tracer.emit(RegisterAccess(_register_name(offset), True, size, value))
        if not self._reachable(offset, size):
            return
        if size == 8 and offset not in WIDE_REGISTERS:
            self._write_word(offset, value & _WORD)
            self._write_word(offset + 4, value >> 32 & _WORD)
        elif size == 8:
            self._write_register(offset, value)
        else:
            self._write_word(offset, value)

    @staticmethod
    def _reachable(offset: int, size: int) -> bool:
        return size in (4, 8) and not offset % size and 0 <= offset < REGISTER_FRAME_SIZE

    def _read_word(self, offset: int) -> int:
        if offset & 4 and offset - 4 in WIDE_REGISTERS:
            return self._read_register(offset - 4) >> 32
        return self._read_register(offset) & _WORD

    def _write_word(self, offset: int, value: int) -> None:
        wide = offset & ~7
        if wide in WIDE_REGISTERS:
            # Half of a 64-bit register: the other half stays.
            old = self._read_register(wide)
            shift = offset * 8 & 32
            value = old & ~(_WORD << shift) | (value & _WORD) << shift
            offset = wide
        self._write_register(offset, value)

    def _read_register(self, offset: int) -> int:
        # Page 0 aliases the two event queue registers of page 1 (6.1: a choice).
        match offset | PAGE_1 if offset in (0xA8, 0xAC) else offset:
            case Register.CMDQ_BASE:
                return self.commands.ring.base.value
            case Register.CMDQ_PROD:
                return self.commands.ring.prod
            case Register.CMDQ_CONS:
                return self.commands.ring.visible(self.commands.ring.cons)
            case Register.EVENTQ_BASE:
                return self.events.ring.base.value
            case Register.EVENTQ_PROD:
                return self.events.ring.visible(self.events.ring.prod)
            case Register.EVENTQ_CONS:
                return self.events.ring.cons
            case Register.STRTAB_BASE:
                return self.configuration.base.value
            case Register.STRTAB_BASE_CFG:
                return self.configuration.base_cfg.value
            case register:
                return self._registers.get(register, 0)

    def _write_register(self, offset: int, value: int) -> None:
        """One whole register. Writes that the text forbids in the present state are ignored: a choice (6.3)."""
        registers = self._registers
        cr0 = self._requested(Cr0.smmuen.mask << Cr0.smmuen.low)
        match offset | PAGE_1 if offset in (0xA8, 0xAC) else offset:
            case Register.CR0:
                self._write_cr0(value & _CR0)
            case Register.CR1:
                keep = _CR1_QUEUE if self.commands.active or self.events.enabled else 0
                keep |= _CR1 & ~_CR1_QUEUE if cr0 else 0
                old = registers.get(Register.CR1, 0)
                registers[Register.CR1] = value & _CR1 & ~keep | old & keep
            case Register.CR2 if not cr0:
                registers[Register.CR2] = value & (_CR2 | int(self.features.el2))
                self.configuration.e2h = Cr2(registers[Register.CR2]).e2h
            case Register.GBPA:
                self._write_gbpa(value)
            case Register.IRQ_CTRL:
                registers[Register.IRQ_CTRL] = registers[Register.IRQ_CTRLACK] = value & _IRQ_CTRL
            case Register.GERRORN:
                self._write_gerrorn(value)
            case Register.GERROR_IRQ_CFG0 | Register.EVENTQ_IRQ_CFG0 if self._irq_configurable(
                offset
            ):
                registers[offset] = value & self._stored(IrqCfg0)
            case Register.GERROR_IRQ_CFG1 | Register.EVENTQ_IRQ_CFG1 if self._irq_configurable(
                offset
            ):
                registers[offset] = value & _WORD
            case Register.GERROR_IRQ_CFG2 | Register.EVENTQ_IRQ_CFG2 if self._irq_configurable(
                offset
            ):
                registers[offset] = value & 0x3F
            case Register.STRTAB_BASE if not cr0:
                self.configuration.base = StrtabBase(value & self._stored(StrtabBase))
            case Register.STRTAB_BASE_CFG if not cr0:
                self.configuration.base_cfg = StrtabBaseCfg(value & _field_mask(StrtabBaseCfg))
            case Register.CMDQ_BASE if not self.commands.active:
                self.commands.ring.base = QueueBase(value & self._stored(QueueBase))
            case Register.CMDQ_PROD:
                self.commands.ring.prod = value & 0xF_FFFF
                self.step()
            case Register.CMDQ_CONS if not self.commands.active:
                self.commands.ring.cons = value & (0xF_FFFF | 0x7F << COMMAND_ERROR_SHIFT)
            case Register.EVENTQ_BASE if not self.events.enabled:
                self.events.ring.base = QueueBase(value & self._stored(QueueBase))
            case Register.EVENTQ_PROD if not self.events.enabled:
                self.events.ring.prod = value & (0xF_FFFF | QUEUE_OVERFLOW)
            case Register.EVENTQ_CONS:
                self.events.ring.cons = value & (0xF_FFFF | QUEUE_OVERFLOW)
                self._admit_stalls()
            case _:
                pass  # read-only, reserved or not writable now

    def _stored(self, layout: type[Layout]) -> int:
        """The writable bits of a 64-bit register: of an address, none above the OAS (3.4.3)."""
        above = (1 << 52) - (1 << self.features.output_address_bits)
        return _field_mask(layout) & ~above

    def _requested(self, mask: int) -> int:
        """Bits of CR0 or of its acknowledgement: either one guards a register."""
        registers = self._registers
        return (registers.get(Register.CR0, 0) | registers.get(Register.CR0ACK, 0)) & mask

    def _irq_configurable(self, offset: int) -> bool:
        """Not while it is enabled, and RES0 without MSIs (6.3.19, 6.3.29)."""
        if not self.features.msi:
            return False
        control = IrqCtrl(self._registers.get(Register.IRQ_CTRL, 0))
        return not (control.gerror_irqen if offset < Register.STRTAB_BASE else control.eventq_irqen)

    # Enables (6.3.9, 6.3.14)

    def _write_cr0(self, value: int) -> None:
        self._registers[Register.CR0] = value
        cr0 = Cr0(value)
        self.events.enabled = cr0.eventqen
        self.commands.enabled = cr0.cmdqen
        if self.transactions.enabled and not cr0.smmuen:
            # What is stalled ends in an abort: nobody can answer it any more (6.3.9.6).
            self.stalls.terminate_all()
            # The acknowledgement comes when the transactions that were translated are done. One waiter is enough,
            # however often software changes its mind.
            self._drain_again = self._draining
            if not self._draining:
                self._draining = True
                self.in_flight.when_done(self._drained)
        self.transactions.enabled = cr0.smmuen
        self._admit_stalls()
        self._settle_cr0()
        self.step()

    def _drained(self) -> None:
        if self._drain_again:
            self._drain_again = False
            self.in_flight.when_done(self._drained)
            return
        self._draining = False
        self._settle_cr0()

    def _settle_cr0(self) -> None:
        """CR0ACK follows CR0, less what still waits for transactions in flight."""
        acknowledged = Cr0(self._registers.get(Register.CR0, 0))
        if self._draining:
            acknowledged.smmuen = True
        if self.commands.waiting:
            acknowledged.cmdqen = True
        self._registers[Register.CR0ACK] = acknowledged.value

    def _write_gbpa(self, value: int) -> None:
        """Only a write with UPDATE counts, and none while an update is under way (6.3.14)."""
        registers = self._registers
        update = Gbpa.update.mask << Gbpa.update.low
        if not value & update or registers[Register.GBPA] & update:
            return
        stored = _GBPA | (_GBPA_PERMISSIONS if self.features.permission_overrides else 0)
        registers[Register.GBPA] = value & stored | update
        self.transactions.global_abort = Gbpa(value & _GBPA).abort

        def updated() -> None:
            registers[Register.GBPA] &= ~update

        self.in_flight.when_done(updated)

    # Errors and interrupts (6.3.18, 3.18)

    def _error_active(self, error: GlobalError) -> bool:
        registers = self._registers
        return bool(
            (registers.get(Register.GERROR, 0) ^ registers.get(Register.GERRORN, 0)) & error
        )

    def _raise_error(self, error: GlobalError) -> None:
        registers = self._registers
        if self._error_active(error):
            return
        registers[Register.GERROR] = registers.get(Register.GERROR, 0) ^ error
        if self.tracer:
            self.tracer.emit(GlobalErrorRaised(str(error.name)))
        # That a GERROR MSI aborted is not told by another one (7.5.1).
        if (
            error != GlobalError.MSI_GERROR_ABT_ERR
            and IrqCtrl(registers.get(Register.IRQ_CTRL, 0)).gerror_irqen
        ):
            self._signal(Register.GERROR_IRQ_CFG0, GlobalError.MSI_GERROR_ABT_ERR)

    def _write_gerrorn(self, value: int) -> None:
        errors = _ERRORS | (_MSI_ERRORS if self.features.msi else 0)
        self._registers[Register.GERRORN] = value & errors
        if self.commands.stopped and not self._error_active(GlobalError.CMDQ_ERR):
            self.commands.stopped = False
            self.step()
        self._admit_stalls()

    def _admit_stalls(self) -> None:
        """What faulted while the event queue was not writable, or too many were stalled, tries again (7.2.1)."""
        if self.events.writable and not self.stalls.full:
            self.stalls.admit()

    def _pulse(self) -> None:
        self.interrupt()

    def _event_interrupt(self) -> None:
        if IrqCtrl(self._registers.get(Register.IRQ_CTRL, 0)).eventq_irqen:
            self._signal(Register.EVENTQ_IRQ_CFG0, GlobalError.MSI_EVENTQ_ABT_ERR)

    def _signal(self, cfg0: int, on_abort: GlobalError) -> None:
        """The MSI that is configured at `cfg0`, or else the wired interrupt."""
        address = self._registers.get(cfg0, 0)
        if not address or not self.features.msi:
            self.interrupt()
            return
        try:
            self._memory.store_u32(address, self._registers.get(cfg0 + 8, 0))
        except BusError:
            self._raise_error(on_abort)

    # Work

    @property
    def busy(self) -> bool:
        """`step` has something to do."""
        return self.commands.busy

    def step(self) -> bool:
        """Consume some commands; True when more can be consumed."""
        self.commands.step()
        self._settle_cr0()
        return self.commands.busy

    def translate(self, access: Access, iova: int, size: int) -> Translation:
        """See `Transactions.translate`."""
        return self.transactions.translate(access, iova, size)

    def retire(self, translation: Translation) -> None:
        """The transaction is done: its bytes moved, or it was given up."""
        self.in_flight.retire(translation)


def _register_name(offset: int) -> str:
    try:
        return Register(offset).name
    except ValueError:
        return hex(offset)
