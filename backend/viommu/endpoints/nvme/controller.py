"""The NVMe controller: a PCI function whose BAR0 has the registers and doorbells.

Where the specification leaves a choice:

Registers
    are written by aligned accesses of 4 or 8 bytes; any other write is dropped. AQA, ASQ and ACQ ignore writes while
    the controller is enabled. CSTS.RDY follows CC.EN at once.
Fatal
    is a command that cannot be fetched and a completion that cannot be written, of any queue, and a configuration that
    cannot be enabled. Everything stops, until CC.EN is cleared.
Data
    moves between guest RAM and a buffer, then to the store: a write whose DMA aborts changes no block.
Shutdown
    waits for no command: the store is flushed. Normal and abrupt are the same.
"""

import struct
from collections.abc import Callable

from viommu.endpoints.base import Bar, Endpoint, ExtendedCapability, Identity
from viommu.endpoints.nvme.admin import AdminCommands
from viommu.endpoints.nvme.engine import Engine, Fatal
from viommu.endpoints.nvme.events import NvmeStateChanged
from viommu.endpoints.nvme.features import Features
from viommu.endpoints.nvme.identify import VERSION, Identification
from viommu.endpoints.nvme.interrupts import Interrupts
from viommu.endpoints.nvme.io import IoCommands
from viommu.endpoints.nvme.logs import Logs
from viommu.endpoints.nvme.queues import (
    IO_QUEUES,
    MAX_ENTRIES,
    Queues,
)
from viommu.endpoints.nvme.store import BlockStore
from viommu.endpoints.port import DmaPort
from viommu.endpoints.transfers import Steps, Transfers
from viommu.layouts.nvme import (
    DOORBELLS,
    AdminQueueAttributes,
    Capabilities,
    Configuration,
    ControllerStatus,
    Register,
    ShutdownNotification,
    ShutdownStatus,
)
from viommu.trace import Tracer

BAR_SIZE = 0x2000
_MASK = (1 << 32) - 1
_MAX_PAGE = 4  # CAP.MPSMAX: 64 KiB
_SQ_ENTRY, _CQ_ENTRY = 6, 4  # powers of two

CAPABILITIES = Capabilities(
    max_queue_entries=MAX_ENTRIES - 1,
    contiguous_queues_required=True,
    timeout=20,
    nvm_command_set=True,
    memory_page_size_max=_MAX_PAGE,
)


class NvmeController(Endpoint):
    """The function. Its namespace has the blocks of `store`, what is left over of a last one aside."""

    identity = Identity(vendor_id=0x1234, device_id=0x5304, class_code=0x01_0802)
    bars = (Bar(0, BAR_SIZE),)
    msix_vectors = 1 + IO_QUEUES

    def __init__(
        self,
        port: DmaPort,
        store: BlockStore,
        *,
        clock: Callable[[], float],
        name: str = "nvme",
        block_size: int = 512,
        tracer: Tracer | None = None,
    ) -> None:
        """`clock`, in seconds, is for the interrupt pin alone, as `time.monotonic`."""
        self.name = name
        self._port, self._store, self._block_size = port, store, block_size
        self._tracer = tracer if tracer is not None else Tracer()
        self._identification = Identification(
            self.identity, name, store.size // block_size, block_size
        )
        self._queues = Queues(name, self.msix_vectors, self._tracer)
        self._interrupts = Interrupts(self._queues, clock)
        self._transfers = Transfers(port)
        self._logs = Logs()
        self._admin_queues: dict[int, int] = {}
        self._engine: Engine | None = None
        self._forget()

    def _forget(self) -> None:
        self._configuration = Configuration()
        self._status = ControllerStatus()
        self._admin_queues = {Register.AQA: 0, Register.ASQ: 0, Register.ACQ: 0}

    @property
    def interrupt(self) -> Callable[[int], bool]:
        """See `Endpoint`."""
        return self._interrupts.send

    @interrupt.setter
    def interrupt(self, send: Callable[[int], bool]) -> None:
        self._interrupts.send = send

    @property
    def pin_enabled(self) -> Callable[[], bool]:
        """See `Endpoint`."""
        return self._interrupts.wired

    @pin_enabled.setter
    def pin_enabled(self, wired: Callable[[], bool]) -> None:
        self._interrupts.wired = wired

    def pin_released(self) -> None:
        """See `Endpoint`."""
        self._interrupts.released()

    @property
    def capabilities(self) -> tuple[ExtendedCapability, ...]:
        """See `Endpoint`."""
        return self._port.capabilities

    @property
    def tasks(self) -> int:
        """How much is under way."""
        return 0 if self._engine is None else len(self._engine.tasks)

    @property
    def busy(self) -> bool:
        """A task can go on."""
        engine = self._engine
        return engine is not None and (engine.tasks.busy or self._interrupts.due)

    def step(self) -> bool:
        """Let one task go on."""
        self._interrupts.step()
        if self._engine is not None:
            try:
                self._engine.step()
            except Fatal as fatal:
                self._fail(str(fatal))
        return self.busy

    def reset(self) -> None:
        """Function level reset."""
        self._disable()
        self._forget()
        self._logs = Logs()
        self._port.reset()

    # Registers

    def read(self, bar: int, offset: int, size: int) -> int:
        """`size` bytes of BAR0, little-endian; 0 where there is nothing. Doorbells read 0."""
        if bar != 0:
            return 0
        content = struct.pack(
            "<QIIIIIIIIQQ",
            *(CAPABILITIES.value, VERSION, self._interrupts.mask, self._interrupts.mask),
            *(self._configuration.value, 0, self._status.value, 0),
            *self._admin_queues.values(),
        )
        self._interrupts.accessed()
        return int.from_bytes(content[offset : offset + size], "little")

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write 4 or 8 bytes of BAR0."""
        if bar != 0:
            return
        self._interrupts.accessed()
        if size in (4, 8) and offset % 4 == 0:
            for place in range(0, size, 4):
                self._write(offset + place, value >> 8 * place & _MASK)

    def _write(self, offset: int, value: int) -> None:
        if offset >= DOORBELLS:
            self._ring(*divmod(offset - DOORBELLS >> 2, 2), value)
            return
        match offset:
            case Register.INTMS:
                self._interrupts.mask |= value
            case Register.INTMC:
                self._interrupts.mask &= ~value
                self._interrupts.unmasked()
            case Register.CC:
                self._configure(Configuration(value & Configuration.mask()))
            case Register.AQA if not self._configuration.enable:
                self._admin_queues[Register.AQA] = value & AdminQueueAttributes.mask()
            case Register.ASQ | Register.ACQ if not self._configuration.enable:
                old = self._admin_queues[Register(offset)]
                self._admin_queues[Register(offset)] = old & ~_MASK | value & ~0xFFF
            case 0x2C | 0x34 if not self._configuration.enable:
                old = self._admin_queues[Register(offset - 4)]
                self._admin_queues[Register(offset - 4)] = old & _MASK | value << 32

    def _ring(self, queue_id: int, completion: int, value: int) -> None:
        if self._engine is None or self._status.controller_fatal_status:
            return
        if completion:
            self._engine.ring_completion(queue_id, value & 0xFFFF)
        else:
            self._engine.ring_submission(queue_id, value & 0xFFFF)

    # Life

    def _configure(self, new: Configuration) -> None:
        old, self._configuration = self._configuration, new
        if old.enable and not new.enable:
            self._disable()
            self._tell("disabled")
        elif new.enable and not old.enable:
            self._enable()
        if (
            self._engine is not None
            and new.shutdown_notification != ShutdownNotification.NONE
            and self._status.shutdown_status == ShutdownStatus.NORMAL_OPERATION
        ):
            self._status.shutdown_status = ShutdownStatus.OCCURRING
            self._engine.tasks.spawn(self._shut_down())

    def _enable(self) -> None:
        configuration = self._configuration
        attributes = AdminQueueAttributes(self._admin_queues[Register.AQA])
        page = 4096 << configuration.memory_page_size
        bases = self._admin_queues[Register.ASQ], self._admin_queues[Register.ACQ]
        sizes = attributes.submission_queue_size + 1, attributes.completion_queue_size + 1
        if configuration.command_set or configuration.arbitration:
            self._fail("CC asks for what CAP does not have")
        elif configuration.memory_page_size > _MAX_PAGE:
            self._fail("CC.MPS is more than CAP.MPSMAX")
        elif min(sizes) < 2 or any(base % page for base in bases):
            self._fail("the admin queues have no entries, or do not begin with a page")
        else:
            self._begin(page, bases, sizes)

    def _begin(self, page: int, bases: tuple[int, int], sizes: tuple[int, int]) -> None:
        self._queues.create_admin(bases, sizes)
        features = Features()
        admin = AdminCommands(
            self._transfers,
            self._queues,
            self._identification,
            features,
            self._logs,
            page,
            entry_sizes=self._entry_sizes,
            flush=self._store.flush,
        )
        io = IoCommands(self._transfers, self._store, self._block_size, features, self._logs, page)
        self._engine = Engine(
            self.name,
            self._queues,
            self._transfers,
            self._interrupts,
            self._logs,
            admin,
            io,
            self._tracer,
        )
        self._status.ready = True
        self._tell("ready")

    def _entry_sizes(self) -> bool:
        """CC.IOSQES and CC.IOCQES, which count from when the first I/O queue is created, are right."""
        configuration = self._configuration
        sizes = configuration.io_submission_entry_size, configuration.io_completion_entry_size
        return sizes == (_SQ_ENTRY, _CQ_ENTRY)

    def _disable(self) -> None:
        """The controller level reset: all work ends, the queues are gone (7.3.2)."""
        if self._engine is not None:
            self._engine.cancel()
            self._engine = None
        self._queues.clear()
        self._interrupts.reset()
        self._status = ControllerStatus()

    def _fail(self, why: str) -> None:
        if self._engine is not None:
            self._engine.cancel()
        self._status.controller_fatal_status = True
        self._tell("fatal", why)

    def _shut_down(self) -> Steps:
        try:
            yield from self._store.flush()
        except OSError as error:
            self._fail(f"shutdown: {error}")
            return
        self._status.shutdown_status = ShutdownStatus.COMPLETE
        self._tell("shut down")

    def _tell(self, state: str, why: str = "") -> None:
        if self._tracer:
            self._tracer.emit(NvmeStateChanged(self.name, state, why))
