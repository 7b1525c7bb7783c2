"""The driver: brings an SMMU up, attaches streams to domains, detaches them, and reads what it reports."""

from enum import Enum
from functools import partial

from viommu.driver import context, stream_table
from viommu.driver.access import Memory, Poll, Registers
from viommu.driver.asids import Asids
from viommu.driver.context import ContextTable
from viommu.driver.domain import AddressSpace, Domain, UnmanagedDomain
from viommu.driver.entries import change_entry
from viommu.driver.errors import DriverError, StreamError, UnsupportedSmmu
from viommu.driver.features import Features
from viommu.driver.queues import CommandQueue, Completion, EventQueue
from viommu.driver.stream_table import (
    LinearStreamTable,
    StreamTable,
    TwoLevelStreamTable,
    abort_entry,
    bypass_entry,
    invalid_entry,
    stage1_entry,
)
from viommu.layouts.commands import (
    CFGI_ALL_RANGE,
    Command,
    Opcode,
    ResumeCommand,
    StreamCommand,
    TlbiCommand,
)
from viommu.layouts.records import EventRecord
from viommu.layouts.registers import Cr0, Cr1, Cr2, Gbpa, GlobalError, IrqCtrl, Register
from viommu.layouts.tables import S1Default, S1Format, StreamTableEntry

_WRITE_BACK = 1
_INNER_SHAREABLE = 3
_LEAF = 1
_DEFAULT_SPLIT = 8
_LARGEST_LINEAR_LOG2 = 8
"""A linear table by default serves one bus: 16 KiB."""
_LARGEST_QUEUE_LOG2 = 8


class DetachMode(Enum):
    """How a stream loses its domain."""

    UNMAP = "unmap"
    """Every page is unmapped and the TLB invalidated; the stream keeps its now empty domain. F_TRANSLATION."""
    STE_ABORT = "ste-abort"
    """The STE aborts: silence. What an operating system does."""
    STE_INVALID = "ste-invalid"
    """The STE is invalid. C_BAD_STE."""
    CD_INVALID = "cd-invalid"
    """The CD is invalid, the STE goes on pointing at it. C_BAD_CD."""
    SMMU_DISABLED = "smmu-disabled"
    """The SMMU is off and GBPA aborts every transaction of every stream: silence."""


class _Stream:
    """What the driver knows of a stream that was attached once: its CDs, and who is behind each."""

    __slots__ = ("ats", "contexts", "domains", "stall")

    def __init__(self, contexts: ContextTable, *, ats: bool, stall: bool) -> None:
        self.contexts, self.ats, self.stall = contexts, ats, stall
        self.domains: dict[int, AddressSpace] = {}


class SmmuDriver:
    """One SMMUv3 in the non-secure state, stage 1.

    driver = SmmuDriver(registers, memory)
    driver.reset()
    domain = driver.create_domain()
    domain.map(iova, address, size)
    driver.attach(stream_id, domain)
    driver.detach(stream_id)
    driver.disable()

    Every call returns when its effect is complete. `DriverTimeout` is raised when the SMMU takes too long.
    """

    def __init__(self, registers: Registers, memory: Memory, poll: Poll | None = None) -> None:
        self._registers, self._memory = registers, memory
        self._poll = poll or Poll()
        self.features = Features.read(registers)
        self._streams: dict[int, _Stream] = {}
        self._owned: list[StreamTable | CommandQueue | EventQueue] = []
        self._asids = Asids(self.features.asid_bits)

    # Bring-up and shutdown

    def linear_table(
        self, log2size: int | None = None, initial: StreamTableEntry | None = None
    ) -> LinearStreamTable:
        """A linear stream table for `reset`, of 2^`log2size` STEs."""
        if log2size is None:
            log2size = min(self.features.stream_id_bits, _LARGEST_LINEAR_LOG2)
        return LinearStreamTable(self._memory, log2size, initial)

    def two_level_table(
        self, split: int = _DEFAULT_SPLIT, log2size: int | None = None
    ) -> TwoLevelStreamTable:
        """A 2-level stream table for `reset`, by default for every StreamID there is."""
        if not self.features.two_level_streams:
            raise UnsupportedSmmu("the SMMU has no 2-level stream tables")
        if log2size is None:
            log2size = self.features.stream_id_bits
        return TwoLevelStreamTable(self._memory, log2size, split)

    def reset(
        self,
        table: StreamTable | None = None,
        *,
        completion: Completion | None = None,
        command_queue_log2: int | None = None,
        event_queue_log2: int | None = None,
        interrupts: bool = False,
    ) -> None:
        """Bring the SMMU up from whatever state it is in, with all its caches empty (6.3.9).

        Every stream aborts as `table` says, which the driver takes over; by default it is 2-level where that exists.
        CMD_SYNC completes by message where the SMMU can send one. Domains and streams of before are gone.
        """
        features = self.features
        if table is None:
            table = self.two_level_table() if features.two_level_streams else self.linear_table()
        if completion is None:
            completion = Completion.MSI if features.idr0.msi else Completion.CONS
        if completion is Completion.MSI and not features.idr0.msi:
            raise UnsupportedSmmu("the SMMU does not send messages")
        if command_queue_log2 is None:
            command_queue_log2 = min(features.command_queue_log2, _LARGEST_QUEUE_LOG2)
        if event_queue_log2 is None:
            event_queue_log2 = min(features.event_queue_log2, _LARGEST_QUEUE_LOG2)
        registers = self._registers

        # What comes in while there are no tables must not get through.
        self._set_gbpa(abort=True)
        self._write_cr0(Cr0())
        cr1 = Cr1(queue_ic=_WRITE_BACK, queue_oc=_WRITE_BACK, queue_sh=_INNER_SHAREABLE)
        cr1.table_ic, cr1.table_oc, cr1.table_sh = _WRITE_BACK, _WRITE_BACK, _INNER_SHAREABLE
        registers.write32(Register.CR1, cr1.value)
        # Record StreamIDs outside the table; take no part in broadcast TLB maintenance.
        registers.write32(Register.CR2, Cr2(recinvsid=True, ptm=True).value)

        self._give_back()
        self.table = table
        registers.write64(Register.STRTAB_BASE, table.base.value)
        registers.write32(Register.STRTAB_BASE_CFG, table.configuration.value)

        self.commands = CommandQueue(
            registers, self._memory, command_queue_log2, self._poll, completion
        )
        self.commands.program()
        self._acknowledge_errors()
        self._write_cr0(Cr0(cmdqen=True))
        self._complete(_CFGI_ALL)
        self._complete(TlbiCommand(opcode=Opcode.CMD_TLBI_NSNH_ALL))

        self.event_queue = EventQueue(registers, self._memory, event_queue_log2)
        self.event_queue.program()
        self._owned = [table, self.commands, self.event_queue]
        # ATSCHK: an STE that aborts stops Translated transactions too, whatever the function remembers.
        cr0 = Cr0(cmdqen=True, eventqen=True, atschk=features.ats)
        self._write_cr0(cr0)
        self.set_interrupts(interrupts)
        cr0.smmuen = True
        self._write_cr0(cr0)

    def disable(self, *, abort: bool = True) -> None:
        """Switch the SMMU off. From then on GBPA aborts every transaction, or with `abort` False lets it bypass.

        When this returns, no transaction that was translated is in flight any more.
        """
        self._set_gbpa(abort=abort)
        self._write_cr0(Cr0(cmdqen=True, eventqen=True))
        # The queues stay for this: what was translated is done when the CMD_SYNC is (3.21.3).
        self._complete(_CFGI_ALL, TlbiCommand(opcode=Opcode.CMD_TLBI_NSNH_ALL))
        self._write_cr0(Cr0())

    def close(self) -> None:
        """Switch the SMMU off, aborting, and give back all memory but that of the domains."""
        self.disable()
        self._give_back()

    # Domains and streams

    def create_domain(
        self, *, lower_bits: int | None = 48, upper_bits: int | None = None, asid: int | None = None
    ) -> Domain:
        """An empty address space under an ASID of its own.

        It has 2^`lower_bits` bytes from 0 up (TTB0) and 2^`upper_bits` below 2^64 (TTB1); None leaves a half out.
        """
        if asid is None:
            asid = self._asids.take()
        elif asid >> self.features.asid_bits:
            raise UnsupportedSmmu(f"ASID {asid}: there are {self.features.asid_bits} bits")
        try:
            return Domain(
                self._memory,
                self.commands,
                asid=asid,
                output_bits=self.features.output_bits,
                lower_bits=lower_bits,
                upper_bits=upper_bits,
                closed=partial(self._asids.give_back, asid),
            )
        except DriverError:
            self._asids.give_back(asid)
            raise

    def create_unmanaged_domain(self) -> UnmanagedDomain:
        """An ASID for tables that somebody else makes."""
        asid = self._asids.take()
        return UnmanagedDomain(
            self.commands,
            asid=asid,
            output_bits=self.features.output_bits,
            closed=partial(self._asids.give_back, asid),
        )

    def attach(
        self,
        stream_id: int,
        domain: AddressSpace,
        *,
        substream_id: int = 0,
        substream_bits: int = 0,
        context_format: S1Format = S1Format.LINEAR,
        default: S1Default = S1Default.SUBSTREAM_0,
        ats: bool = False,
        stall: bool = False,
    ) -> None:
        """Let `domain` translate a stream, or one substream of it, in place of what did so before.

        The first attach of a stream makes its CD table, of 2^`substream_bits` CDs laid out by `context_format`, and
        rules by `default` what happens to transactions without a SubstreamID, whether the function may keep
        translations (`ats`), and whether faults wait for an answer (`stall`); later ones take the table as it is.
        """
        features = self.features
        if substream_bits > features.substream_id_bits:
            raise UnsupportedSmmu(f"{features.substream_id_bits} SubstreamID bits exist")
        if ats > features.ats or stall > features.stalls:
            raise UnsupportedSmmu(f"the SMMU has no {'ATS' if ats > features.ats else 'stalls'}")
        self._entry(stream_id)
        stream = self._streams.get(stream_id)
        if stream is None:
            contexts = ContextTable(self._memory, substream_bits, context_format)
            stream = _Stream(contexts, ats=ats, stall=stall or features.must_stall)
            self._streams[stream_id] = stream
        # The CD first: until the STE points at it nobody sees it.
        self._change_cd(stream_id, stream, substream_id, domain)
        entry = stage1_entry(
            stream.contexts,
            default=default,
            stall_disable=features.can_stall and not stream.stall,
            ats=stream.ats,
        )
        self._change_ste(stream_id, entry)

    def update(self, domain: AddressSpace) -> None:
        """Let every stream of `domain` use its translation tables as they are described now."""
        for stream_id, substream_id in sorted(domain.streams):
            self._change_cd(stream_id, self._streams[stream_id], substream_id, domain)

    def attach_bypass(self, stream_id: int) -> None:
        """Let a stream's transactions through as they are."""
        self._change_ste(stream_id, bypass_entry())
        self._drop_contexts(stream_id)

    def attach_abort(self, stream_id: int) -> None:
        """Abort a stream's transactions, silently."""
        self.detach(stream_id, DetachMode.STE_ABORT)

    def detach(self, stream_id: int, how: DetachMode = DetachMode.STE_ABORT) -> None:
        """Take a stream's domains away. When this returns none of its transactions reaches them any more.

        The TLB may keep entries of the domain: they are under its ASID, which no stream uses now, and go when the
        domain is closed. With `UNMAP` the domain loses its mappings for every stream attached to it.
        """
        match how:
            case DetachMode.UNMAP:
                for domain in set(self._attached(stream_id).domains.values()):
                    if not isinstance(domain, Domain):
                        raise StreamError("somebody else makes this domain's tables")
                    domain.unmap_all()
            case DetachMode.STE_ABORT:
                self.block(stream_id)
                self.invalidate_stream(stream_id)
                self.release(stream_id)
            case DetachMode.STE_INVALID:
                self._change_ste(stream_id, invalid_entry())
                self._drop_contexts(stream_id)
            case DetachMode.CD_INVALID:
                self._clear_contexts(stream_id, self._attached(stream_id))
            case DetachMode.SMMU_DISABLED:
                self.disable(abort=True)

    def block(self, stream_id: int) -> None:
        """Make the STE abort, by one store. The SMMU may go on by what it has read until `invalidate_stream`."""
        self._entry(stream_id)[0] = abort_entry().value

    def release(self, stream_id: int) -> None:
        """Give back what a stream used that is blocked. Only once the SMMU has forgotten its STE and CDs."""
        # These words do not count while the STE aborts: nobody has to be told.
        words = self._entry(stream_id)
        for place in range(1, len(words)):
            words[place] = 0
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            for substream_id in list(stream.domains):
                self._leave(stream_id, stream, substream_id)
            stream.contexts.close()

    def invalidate_stream(self, stream_id: int, *, leaf: bool = True) -> None:
        """Make the SMMU forget a stream's STE and CDs, and with `leaf` False the way to its STE too (4.3.1)."""
        self._complete(
            StreamCommand(opcode=Opcode.CMD_CFGI_STE, stream_id=stream_id, leaf_or_range=leaf)
        )

    # Stalled transactions

    def answer_stall(self, stream_id: int, stag: int, *, retry: bool) -> None:
        """Let a stalled transaction try again, or abort it (4.6.1)."""
        opcode = Opcode.CMD_RESUME
        self._complete(
            ResumeCommand(
                opcode=opcode, stream_id=stream_id, stag=stag, retry=retry, abort=not retry
            )
        )

    def terminate_stalls(self, *stream_ids: int) -> None:
        """Abort every stalled transaction of streams whose new ones cannot stall any more (4.6.2)."""
        opcode = Opcode.CMD_STALL_TERM
        self._complete(*(ResumeCommand(opcode=opcode, stream_id=each) for each in stream_ids))

    # What the SMMU reports

    def events(self) -> list[EventRecord]:
        """The records in the event queue, oldest first; their places are free again."""
        return self.event_queue.read()

    def set_interrupts(self, enabled: bool) -> None:
        """Let events and global errors assert the wired interrupt, or not (6.3.16)."""
        registers = self._registers
        self._write_acknowledged(Register.IRQ_CTRL, 0)
        # Address 0 of a message means the wired interrupt.
        registers.write64(Register.GERROR_IRQ_CFG0, 0)
        registers.write64(Register.EVENTQ_IRQ_CFG0, 0)
        if enabled:
            control = IrqCtrl(gerror_irqen=True, eventq_irqen=True)
            self._write_acknowledged(Register.IRQ_CTRL, control.value)

    def global_errors(self) -> GlobalError:
        """The errors that are active now (6.3.18); acknowledged by reading them here."""
        registers = self._registers
        active = registers.read32(Register.GERROR) ^ registers.read32(Register.GERRORN)
        if active:
            self._acknowledge_errors()
        return GlobalError(active)

    # Registers with a handshake

    def _write_cr0(self, value: Cr0) -> None:
        self._write_acknowledged(Register.CR0, value.value)

    def _write_acknowledged(self, register: Register, value: int) -> None:
        """Write CR0 or IRQ_CTRL, and wait until its acknowledge register, the next one, says the same."""
        self._registers.write32(register, value)
        self._poll.until(
            lambda: self._registers.read32(register + 4) == value, f"{register.name}ACK"
        )

    def _set_gbpa(self, *, abort: bool) -> None:
        """Set GBPA.ABORT by its UPDATE handshake (6.3.14)."""

        def updated() -> bool:
            return not Gbpa(self._registers.read32(Register.GBPA)).update

        self._poll.until(updated, "GBPA.UPDATE")
        gbpa = Gbpa(self._registers.read32(Register.GBPA))
        gbpa.abort, gbpa.update = abort, True
        self._registers.write32(Register.GBPA, gbpa.value)
        self._poll.until(updated, "GBPA.UPDATE")

    def _acknowledge_errors(self) -> None:
        self._registers.write32(Register.GERRORN, self._registers.read32(Register.GERROR))

    # Structures in memory

    def _complete(self, *commands: Command) -> None:
        self.commands.issue(*commands)
        self.commands.sync()

    def _entry(self, stream_id: int) -> memoryview:
        """The words of a stream's STE, where the SMMU finds it."""
        known = self.table.has(stream_id)
        words = self.table.entry(stream_id)
        if not known:
            # The pointer to a new second-level table is only looked at again without Leaf.
            self.invalidate_stream(stream_id, leaf=False)
        return words

    def _change_ste(self, stream_id: int, target: StreamTableEntry) -> None:
        change_entry(
            self._entry(stream_id),
            target,
            stream_table.used_bits,
            lambda: self.invalidate_stream(stream_id),
        )

    def _change_cd(
        self, stream_id: int, stream: _Stream, substream_id: int, domain: AddressSpace | None
    ) -> None:
        known = stream.contexts.has(substream_id)
        words = stream.contexts.entry(substream_id)
        command = StreamCommand(
            opcode=Opcode.CMD_CFGI_CD, stream_id=stream_id, substream_id=substream_id
        )
        if not known:
            self._complete(command)
        command.leaf_or_range = _LEAF
        target = context.invalid_descriptor()
        if domain is not None:
            target = domain.context_descriptor(stall=stream.stall)
        change_entry(words, target, context.used_bits, lambda: self._complete(command))
        self._leave(stream_id, stream, substream_id)
        if domain is not None:
            stream.domains[substream_id] = domain
            domain.streams.add((stream_id, substream_id))
            if stream.ats:
                domain.ats_streams.add(stream_id)

    @staticmethod
    def _leave(stream_id: int, stream: _Stream, substream_id: int) -> None:
        domain = stream.domains.pop(substream_id, None)
        if domain is not None:
            domain.streams.discard((stream_id, substream_id))
            if domain not in stream.domains.values():
                domain.ats_streams.discard(stream_id)

    def _clear_contexts(self, stream_id: int, stream: _Stream) -> None:
        for substream_id in list(stream.domains):
            self._change_cd(stream_id, stream, substream_id, None)

    def _drop_contexts(self, stream_id: int) -> None:
        """Give a stream's CDs back, once its STE does not point at them any more."""
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self._clear_contexts(stream_id, stream)
            stream.contexts.close()

    def _give_back(self) -> None:
        """Free every structure in memory, once the SMMU is off."""
        for stream in self._streams.values():
            for domain in stream.domains.values():
                domain.streams.clear()
                domain.ats_streams.clear()
            stream.contexts.close()
        for part in self._owned:
            part.close()
        self._streams, self._owned = {}, []

    def _attached(self, stream_id: int) -> _Stream:
        stream = self._streams.get(stream_id)
        if stream is None or not stream.domains:
            raise StreamError(f"stream {stream_id:#x} is attached to no domain")
        return stream


_CFGI_ALL = StreamCommand(opcode=Opcode.CMD_CFGI_STE_RANGE, leaf_or_range=CFGI_ALL_RANGE)
