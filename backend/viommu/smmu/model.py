"""The SMMU as software sees it: its register pages, and what each register does (IHI 0070, chapter 6)."""

from array import array
from collections.abc import Callable

from viommu.layouts.bitfields import Layout
from viommu.layouts.registers import (
    COMMAND_ERROR_SHIFT,
    PAGE_1,
    PRIQ_LAST_ONLY,
    QUEUE_OVERFLOW,
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
    register_name,
)
from viommu.memory import GuestMemory
from viommu.smmu.atos import ATOS_REGISTERS, Atos
from viommu.smmu.ats import Ats, TranslationCompletion
from viommu.smmu.ats_port import AtsFunction, AtsPort
from viommu.smmu.barrier import InFlight
from viommu.smmu.command_effects import CommandEffects
from viommu.smmu.command_queue import CommandQueue
from viommu.smmu.configuration import Configuration
from viommu.smmu.event_queue import EventQueue
from viommu.smmu.events import RegisterAccess
from viommu.smmu.faults import Access
from viommu.smmu.features import Features
from viommu.smmu.interrupts import Interrupts
from viommu.smmu.pri_queue import PageRequest, PageRequestQueue
from viommu.smmu.stall import StallTable
from viommu.smmu.tlb import Tlb
from viommu.smmu.transactions import Transactions
from viommu.smmu.translation import Translation, Translator
from viommu.smmu.walk import Walker
from viommu.trace import Tracer

_WORD = 0xFFFF_FFFF
_DOORBELL = int(Register.CMDQ_PROD)
_ERRORS = int(GlobalError.CMDQ_ERR | GlobalError.EVENTQ_ABT_ERR | GlobalError.SFM_ERR)
_ERRORS_MSI = int(
    GlobalError.MSI_CMDQ_ABT_ERR | GlobalError.MSI_EVENTQ_ABT_ERR | GlobalError.MSI_GERROR_ABT_ERR
)
_ERRORS_PRI = int(GlobalError.PRIQ_ABT_ERR)
_ERRORS_PRI_MSI = int(GlobalError.MSI_PRIQ_ABT_ERR)
# Writable bits of each layout: its fields, less those whose feature is absent.
_CR0 = Cr0(smmuen=True, eventqen=True, cmdqen=True).value
_CR0_ATS, _CR0_PRI = Cr0(atschk=True).value, Cr0(priqen=True).value
_CR1 = 0xFFF
_CR1_QUEUE = 0x3F
_CR2 = Cr2(recinvsid=True, ptm=True).value
_CR2_ATS = Cr2(rec_cfg_ats=True).value
_IRQ_CTRL = IrqCtrl(gerror_irqen=True, eventq_irqen=True).value
_IRQ_CTRL_PRI = IrqCtrl(priq_irqen=True).value
_ALIASED = (0xA8, 0xAC, 0xC8, 0xCC)
_GBPA = Gbpa(memattr=15, mtcfg=True, alloccfg=15, shcfg=3, abort=True).value
_GBPA_PERMISSIONS = Gbpa(privcfg=3, instcfg=3).value
_GBPA_RESET = Gbpa(shcfg=1).value


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
        self.memory, self.interrupt = memory, interrupt
        self.features = features = features or Features()
        ats, pri = features.ats, features.pri
        self._writable_cr0 = _CR0 | (_CR0_ATS if ats else 0) | (_CR0_PRI if pri else 0)
        self._writable_irq_ctrl = _IRQ_CTRL | (_IRQ_CTRL_PRI if pri else 0)
        self._errors = _ERRORS | (_ERRORS_PRI if pri else 0)
        if features.msi:
            self._errors |= _ERRORS_MSI | (_ERRORS_PRI_MSI if pri else 0)
        self.tracer = tracer = tracer if tracer is not None else Tracer()
        self.in_flight = InFlight()
        self.tlb = Tlb()
        self.stalls = StallTable(features.stall_max)
        walker = Walker(memory, self.tlb, tracer, features)
        self.configuration = Configuration(memory, features, walker, tracer)
        self._registers: dict[int, int] = {}
        self._interrupts = Interrupts(
            self._registers, memory, features, tracer, pulse=lambda: self.interrupt()
        )
        self.events = EventQueue(
            memory,
            features,
            tracer,
            raise_error=self._interrupts.raise_error,
            error_active=self._interrupts.error_active,
            interrupt=self._interrupts.of_event,
        )
        translator = Translator(memory, self.configuration, self.tlb, walker, features, tracer)
        self.transactions = Transactions(
            self.configuration,
            translator,
            self.events,
            self.in_flight,
            self.stalls,
            tracer,
            records_bad_stream=lambda: Cr2(self._registers.get(Register.CR2, 0)).recinvsid,
        )
        self.ats = Ats(
            features, self.configuration, translator, self.events, self.in_flight, tracer
        )
        self.ats_port = AtsPort(tracer)
        self.atos = Atos(memory, features, self.configuration, translator)
        self.page_requests = PageRequestQueue(
            memory,
            features,
            self.configuration,
            tracer,
            raise_error=self._interrupts.raise_error,
            error_active=self._interrupts.error_active,
            interrupt=self._interrupts.of_page_request,
            respond=self.ats_port.respond,
            record_error=self.ats.record_error,
        )
        effects = CommandEffects(
            features,
            self.configuration,
            self.tlb,
            self.stalls,
            self.ats_port,
            self.page_requests,
            prefetch=self.transactions.prefetch,
            enabled=lambda: self.transactions.enabled,
            answered=self._admit_stalls,
        )
        self.commands = CommandQueue(
            memory,
            features,
            tracer,
            effects,
            self.in_flight,
            self.ats_port,
            raise_error=self._interrupts.raise_error,
            interrupt=self._interrupts.pulse,
            settled=self._settle_cr0,
        )
        self.reset()

    def reset(self) -> None:
        """All registers at their reset values, all caches empty. Transactions in flight go on to their end."""
        self._registers.clear()
        self._registers |= {
            Register.IDR0: self.features.idr0().value,
            Register.IDR1: self.features.idr1().value,
            Register.IDR2: self.features.idr2().value,
            Register.IDR3: self.features.idr3().value,
            Register.IDR5: self.features.idr5().value,
            Register.AIDR: self.features.minor_revision,
            Register.GBPA: _GBPA_RESET,
        }
        self.in_flight.forget_waiters()
        self.ats_port.forget()
        self.tlb.invalidate_all()
        self.configuration.invalidate_all()
        self.configuration.e2h = False
        self.configuration.base = StrtabBase()
        self.configuration.base_cfg = StrtabBaseCfg()
        self.commands.reset()
        self.events.reset()
        self.page_requests.reset()
        self.atos.reset()
        self.stalls.terminate_all()
        self.transactions.reset()
        self._set_failed(False)
        self.ats.enabled = self.ats.checks = False
        self.ats.records_errors = self.ats.records_bad_stream = False
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
            self.tracer.emit(RegisterAccess(register_name(offset), False, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes at `offset` from page 0.

        What is no aligned access of 32 or 64 bits is ignored (6.2: a choice).
        """
        if self.tracer:
            self.tracer.emit(RegisterAccess(register_name(offset), True, size, value))
        if offset == _DOORBELL and size == 4:  # what drivers write most often ends here
            self.commands.ring.prod = value & 0xF_FFFF
            self.commands.step()
            return
        if not self._reachable(offset, size):
            return
        if size == 8 and offset not in WIDE_REGISTERS:
            self._write_word(offset, value & _WORD)
            self._write_word(offset + 4, value >> 32 & _WORD)
        elif size == 8:
            self._write_register(offset, value)
        else:
            self._write_word(offset, value)

    def _reachable(self, offset: int, size: int) -> bool:
        return size in (4, 8) and not offset % size and 0 <= offset < self.features.frame_size

    def _read_word(self, offset: int) -> int:
        if offset & 4 and offset - 4 in WIDE_REGISTERS:
            return self.peek(offset - 4) >> 32
        return self.peek(offset) & _WORD

    def _write_word(self, offset: int, value: int) -> None:
        wide = offset & ~7
        if wide in WIDE_REGISTERS:
            # Half of a 64-bit register: the other half stays.
            old = self.peek(wide)
            shift = offset * 8 & 32
            value = old & ~(_WORD << shift) | (value & _WORD) << shift
            offset = wide
        self._write_register(offset, value)

    def peek(self, offset: int) -> int:
        """A whole register, and no event. Page 0 aliases the queue registers of page 1 (6.1: a choice)."""
        match offset | PAGE_1 if offset in _ALIASED else offset:
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
            case Register.PRIQ_BASE | Register.PRIQ_PROD | Register.PRIQ_CONS as register:
                return self.page_requests.read(register)
            case Register.STRTAB_BASE:
                return self.configuration.base.value
            case Register.STRTAB_BASE_CFG:
                return self.configuration.base_cfg.value
            case register if register in ATOS_REGISTERS:
                return self.atos.read(register)
            case register:
                return self._registers.get(register, 0)

    def _write_register(self, offset: int, value: int) -> None:
        """One whole register. Writes that the text forbids in the present state are ignored: a choice (6.3)."""
        registers = self._registers
        cr0 = self._requested(Cr0.smmuen.mask << Cr0.smmuen.low)
        match offset | PAGE_1 if offset in _ALIASED else offset:
            case Register.CR0:
                self._write_cr0(value & self._writable_cr0)
            case Register.CR1:
                queues = self.commands.active or self.events.enabled or self._requested(_CR0_PRI)
                keep = _CR1_QUEUE if queues else 0
                keep |= _CR1 & ~_CR1_QUEUE if cr0 else 0
                old = registers.get(Register.CR1, 0)
                registers[Register.CR1] = value & _CR1 & ~keep | old & keep
            case Register.CR2 if not cr0:
                self._write_cr2(value)
            case Register.GBPA:
                self._write_gbpa(value)
            case Register.IRQ_CTRL:
                value &= self._writable_irq_ctrl
                registers[Register.IRQ_CTRL] = registers[Register.IRQ_CTRLACK] = value
            case Register.GERRORN:
                self._write_gerrorn(value)
            case Register.GERROR_IRQ_CFG0 | Register.EVENTQ_IRQ_CFG0 | Register.PRIQ_IRQ_CFG0 if (
                self._irq_configurable(offset)
            ):
                registers[offset] = value & self._stored(IrqCfg0)
            case Register.GERROR_IRQ_CFG1 | Register.EVENTQ_IRQ_CFG1 | Register.PRIQ_IRQ_CFG1 if (
                self._irq_configurable(offset)
            ):
                registers[offset] = value & _WORD
            case Register.GERROR_IRQ_CFG2 | Register.EVENTQ_IRQ_CFG2 if self._irq_configurable(
                offset
            ):
                registers[offset] = value & 0x3F
            case Register.STRTAB_BASE if not cr0:
                self.configuration.base = StrtabBase(value & self._stored(StrtabBase))
            case Register.STRTAB_BASE_CFG if not cr0:
                self.configuration.base_cfg = StrtabBaseCfg(value & StrtabBaseCfg.mask())
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
            case Register.PRIQ_BASE | Register.PRIQ_PROD | Register.PRIQ_CONS as register:
                enabled = bool(self._requested(_CR0_PRI))
                if register == Register.PRIQ_BASE:
                    value &= self._stored(QueueBase)
                self.page_requests.write(register, value, enabled)
            case register if register in ATOS_REGISTERS:
                self.atos.write(register, value)
            case Register.PRIQ_IRQ_CFG2 if self.features.pri:
                # LO is there without MSIs too (6.3.1, MSI).
                if not IrqCtrl(registers.get(Register.IRQ_CTRL, 0)).priq_irqen:
                    attributes = 0x3F if self.features.msi else 0
                    registers[offset] = value & (PRIQ_LAST_ONLY | attributes)
            case _:
                pass  # read-only, reserved or not writable now

    def _stored(self, layout: type[Layout]) -> int:
        """The writable bits of a 64-bit register: of an address, none above the OAS (3.4.3)."""
        above = (1 << 52) - (1 << self.features.output_address_bits)
        return layout.mask() & ~above

    def _requested(self, mask: int) -> int:
        """Bits of CR0 or of its acknowledgement: either one guards a register."""
        registers = self._registers
        return (registers.get(Register.CR0, 0) | registers.get(Register.CR0ACK, 0)) & mask

    def _irq_configurable(self, offset: int) -> bool:
        """Not while it is enabled, and RES0 without MSIs (6.3.19, 6.3.29)."""
        if not self.features.msi:
            return False
        control = IrqCtrl(self._registers.get(Register.IRQ_CTRL, 0))
        if offset >= Register.PRIQ_BASE:
            return self.features.pri and not control.priq_irqen
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
        self.transactions.enabled = self.ats.enabled = self.atos.enabled = cr0.smmuen
        self.ats.checks = cr0.atschk
        self.page_requests.enabled = cr0.smmuen and cr0.priqen
        self._admit_stalls()
        self._settle_cr0()
        self.step()

    def _write_cr2(self, value: int) -> None:
        writable = _CR2 | int(self.features.el2) | (_CR2_ATS if self.features.ats else 0)
        self._registers[Register.CR2] = value & writable
        cr2 = Cr2(value & writable)
        self.configuration.e2h = cr2.e2h
        self.ats.records_errors, self.ats.records_bad_stream = cr2.rec_cfg_ats, cr2.recinvsid

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

    def _write_gerrorn(self, value: int) -> None:
        self._registers[Register.GERRORN] = value & self._errors
        if self.commands.stopped and not self._interrupts.error_active(GlobalError.CMDQ_ERR):
            self.commands.stopped = False
            self.step()
        self._admit_stalls()

    def _admit_stalls(self) -> None:
        """What faulted while the event queue was not writable, or too many were stalled, tries again (7.2.1)."""
        if self.events.writable and not self.stalls.full:
            self.stalls.admit()

    def raise_error(self, error: GlobalError) -> None:
        """Make a bit of GERROR active, as if what it stands for had happened."""
        self._interrupts.raise_error(error)

    def enter_service_failure(self) -> None:
        """Service failure mode (12.3): until a reset nothing is translated, consumed or recorded."""
        self._set_failed(True)
        self.raise_error(GlobalError.SFM_ERR)

    def _set_failed(self, failed: bool) -> None:
        for part in (self.transactions, self.commands, self.events, self.ats):
            part.failed = failed

    # Work

    @property
    def busy(self) -> bool:
        """`step` has something to do."""
        return self.commands.busy or self.transactions.has_hints

    def step(self) -> bool:
        """Consume some commands, or else follow one prefetch; True when there is more to do."""
        if not self.commands.busy and self.transactions.has_hints:
            self.transactions.follow_hint()
        self.commands.step()
        return self.busy

    def translate(self, access: Access, iova: int, size: int) -> Translation:
        """See `Transactions.translate`."""
        return self.transactions.translate(access, iova, size)

    def translate_ranges(self, access: Access, ranges: "array[int]") -> Translation:
        """See `Transactions.translate_ranges`."""
        return self.transactions.translate_ranges(access, ranges)

    def connect(self, stream_id: int, function: AtsFunction) -> None:
        """`function` has an address translation cache, and is `stream_id`."""
        self.ats_port.connect(stream_id, function)

    def ats_translate(
        self, access: Access, iova: int, span: int = 1, *, no_write: bool = False
    ) -> TranslationCompletion:
        """See `Ats.request`."""
        return self.ats.request(access, iova, span, no_write=no_write)

    def translated(self, access: Access, addresses: "array[int]") -> Translation:
        """See `Ats.translated`."""
        return self.ats.translated(access, addresses)

    def page_request(self, request: PageRequest) -> None:
        """See `PageRequestQueue.receive`. A profile without PRI ignores it: nobody may ask."""
        if self.features.pri:
            self.page_requests.receive(request)

    def give_up(self) -> int:
        """See `AtsPort.give_up`: whoever has a clock calls it."""
        return self.ats_port.give_up()

    def retire(self, translation: Translation) -> None:
        """The transaction is done: its bytes moved, or it was given up."""
        self.in_flight.retire(translation)
