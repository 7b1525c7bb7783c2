"""DMA remapping as drivers see it: the calls of DMA_IOMMU_INTERFACE, on one SMMU."""

from collections import deque
from collections.abc import Callable, Sequence
from threading import RLock
from time import monotonic
from typing import NamedTuple

from viommu.driver.domain import UnmanagedDomain
from viommu.driver.domains import ranges
from viommu.driver.domains.attachments import Attachment, Attachments, AttachmentState
from viommu.driver.domains.detach import Detach
from viommu.driver.domains.device import DmaDevice
from viommu.driver.domains.domain import (
    ContiguousRange,
    DmaDomain,
    DomainConfiguration,
    DomainType,
)
from viommu.driver.domains.events import (
    Caller,
    ConcurrentCalls,
    DeviceAttached,
    DeviceDetached,
    DomainChanged,
    DomainEvent,
)
from viommu.driver.domains.faults import FaultAction, FaultConfiguration, decode
from viommu.driver.domains.status import NtStatus, status_of
from viommu.driver.domains.verifier import Verifier
from viommu.driver.errors import DriverError, UnsupportedSmmu
from viommu.driver.page_tables import (
    MAX_INPUT_BITS,
    MIN_INPUT_BITS,
    Access,
)
from viommu.driver.smmu import SmmuDriver
from viommu.layouts.records import EventRecord


class CreatedDomain(NamedTuple):
    """What `create_domain` returns: no domain without success."""

    status: NtStatus
    domain: DmaDomain | None


class InputMappings(NamedTuple):
    """What `query_input_mappings` returns."""

    status: NtStatus
    input_mapping_ids: tuple[int, ...] = ()


def _ignore(_event: DomainEvent) -> None:
    """Nobody watches."""


class DmaRemapping:
    """The domains of one SMMU and the devices in them.

    remapping = DmaRemapping(driver)                      # a driver that has reset its SMMU
    status, domain = remapping.create_domain(DomainType.TRANSLATE)
    remapping.map_logical_range(domain, READ_WRITE, ContiguousRange(address, size), iova)
    remapping.attach_device(domain, device)
    remapping.detach_device(domain, device)

    Every call returns a status, and unless it says otherwise changes nothing when that is no success. Calls may come
    from several threads. Attach, detach and fault reporting of one device must not overlap; that is checked, and
    refused with VERIFIER_STOP. `observer` is told of every change, with the time of `clock`, from within the call.
    """

    def __init__(
        self,
        driver: SmmuDriver,
        *,
        observer: Callable[[DomainEvent], None] = _ignore,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._driver, self._observe, self._clock = driver, observer, clock
        self._verifier = Verifier(self._report_concurrent_calls)
        self._attachments = Attachments()
        # Read and not yet delivered: a handler that raises must not lose those behind its own.
        self._records: deque[EventRecord] = deque()
        self._unclaimed: list[EventRecord] = []
        self._domains = 0
        # The command queue is one for all. A call that comes from within another, by a handler, passes.
        self._lock = RLock()

    # Domains

    def create_domain(
        self, domain_type: DomainType = DomainType.TRANSLATE, input_bits: int = MAX_INPUT_BITS
    ) -> CreatedDomain:
        """Make a domain. A managed one translates logical addresses of `input_bits`, and maps nothing yet.

        INVALID_PARAMETER_2: there are no tables for so many bits. INSUFFICIENT_RESOURCES: no memory, or no ASID.
        """
        if not MIN_INPUT_BITS <= input_bits <= MAX_INPUT_BITS:
            return CreatedDomain(NtStatus.INVALID_PARAMETER_2, None)
        with self._lock:
            try:
                domain = self._make(domain_type, input_bits)
            except UnsupportedSmmu:
                return CreatedDomain(NtStatus.INSUFFICIENT_RESOURCES, None)
            except DriverError as error:
                return CreatedDomain(status_of(error), None)
            self._changed(domain, "created")
            return CreatedDomain(NtStatus.SUCCESS, domain)

    def _make(self, domain_type: DomainType, input_bits: int) -> DmaDomain:
        self._domains += 1
        match domain_type:
            case DomainType.TRANSLATE:
                space = self._driver.create_domain(lower_bits=input_bits)
                return DmaDomain(self._domains, domain_type, space)
            case DomainType.UNMANAGED:
                unmanaged = self._driver.create_unmanaged_domain()
                return DmaDomain(self._domains, domain_type, unmanaged)
            case DomainType.PASS_THROUGH:
                return DmaDomain(self._domains, domain_type, None)

    def configure_domain(self, domain: DmaDomain, configuration: DomainConfiguration) -> NtStatus:
        """Give an unmanaged domain its page tables, instead of those that it had. Until the first time it blocks.

        INVALID_HANDLE: deleted. INVALID_PARAMETER_1: it is not unmanaged. INVALID_PARAMETER_2: the SMMU cannot use such
        tables. After a failure of the SMMU or a function (IO_TIMEOUT, DEVICE_UNRESPONSIVE and the like) the domain is
        not configured and blocks; devices of it may be BLOCKED then.
        """
        with self._lock:
            if domain.deleted:
                return NtStatus.INVALID_HANDLE
            space = domain.space
            if not isinstance(space, UnmanagedDomain):
                return NtStatus.INVALID_PARAMETER_1
            if not configuration.fits(space.output_bits):
                return NtStatus.INVALID_PARAMETER_2
            space.lower, space.upper = configuration.lower, configuration.upper
            space.mair = configuration.mair1 << 32 | configuration.mair0
            members = [
                attachment
                for attachment in self._attachments.of_domain(domain)
                if attachment.state is AttachmentState.ATTACHED
            ]
            try:
                if domain.configured:
                    self._driver.update(space)
                    space.flush()
                else:
                    domain.configured = True
                    for attachment in members:
                        self._route(attachment)
            except DriverError as error:
                domain.configured = False
                for attachment in members:
                    self._unroute(attachment, space)
                return status_of(error)
            self._changed(domain, "configured")
            return NtStatus.SUCCESS

    def delete_domain(self, domain: DmaDomain) -> NtStatus:
        """Delete a domain and, if it is managed, its page tables.

        INVALID_HANDLE: deleted before. RESOURCE_IN_USE: devices are attached, or blocked in it.
        """
        with self._lock:
            if domain.deleted:
                return NtStatus.INVALID_HANDLE
            if self._attachments.of_domain(domain):
                return NtStatus.RESOURCE_IN_USE
            if domain.space is not None:
                try:
                    domain.space.close()
                except DriverError as error:
                    return status_of(error)
            domain.deleted = True
            self._changed(domain, "deleted")
            return NtStatus.SUCCESS

    # Logical ranges

    def map_logical_range(
        self,
        domain: DmaDomain,
        permissions: Access,
        physical: ContiguousRange | Sequence[int],
        logical_address: int,
    ) -> NtStatus:
        """Map memory at `logical_address`: a contiguous range, or pages by their physical addresses (an MDL).

        INVALID_HANDLE: deleted. INVALID_PARAMETER_1: not managed. INVALID_PARAMETER_3: `physical` is not whole pages,
        none, or beyond the output size. INVALID_PARAMETER_4: no page of the domain. CONFLICTING_ADDRESSES: some of it
        is mapped. DEVICE_UNRESPONSIVE, IO_TIMEOUT: there was no memory for all of it, and what was mapped for a moment
        may be remembered.
        """
        with self._lock:
            return ranges.map_range(domain, permissions, physical, logical_address)

    def unmap_logical_range(
        self, domain: DmaDomain, logical_address: int, number_of_pages: int
    ) -> NtStatus:
        """Unmap pages; on success no transaction reaches them any more, and their memory may be used again.

        INVALID_HANDLE: deleted. INVALID_PARAMETER_1: not managed. INVALID_PARAMETER_2: no page of the domain.
        INVALID_PARAMETER_3: not so many pages. NOT_MAPPED_VIEW: some of them are not mapped. FREE_VM_NOT_AT_BASE: it
        would split a block. DEVICE_UNRESPONSIVE, IO_TIMEOUT: they are unmapped, but may be remembered: keep the memory.
        """
        with self._lock:
            return ranges.unmap_range(domain, logical_address, number_of_pages)

    # Flushing

    def flush_domain(self, domain: DmaDomain) -> NtStatus:
        """Make the TLB, and functions with ATS, forget all of a domain.

        INVALID_HANDLE: deleted. INVALID_PARAMETER_1: pass-through has nothing to forget.
        """
        with self._lock:
            return ranges.flush(domain)

    def flush_domain_va_list(
        self, domain: DmaDomain, last_level: bool, addresses: Sequence[int]
    ) -> NtStatus:
        """The same for what maps `addresses`; with `last_level` only pages and blocks have changed, no tables.

        INVALID_PARAMETER_3: one is not a page's.
        """
        with self._lock:
            return ranges.flush(domain, addresses, leaf=last_level)

    # Devices

    def attach_device(
        self,
        domain: DmaDomain,
        device: DmaDevice,
        input_mapping_id_base: int = 0,
        mapping_count: int = 1,
    ) -> NtStatus:
        """Attach the streams of `mapping_count` InputMappingIds from the base. They can only be detached together.

        INVALID_HANDLE: the domain is deleted. INVALID_PARAMETER_3: the device has no such InputMappingId (one that is
        not ACPI-enumerated has 0). INVALID_PARAMETER_4: not so many from there. DEVICE_ALREADY_ATTACHED: one is in this
        domain. INVALID_DEVICE_STATE: one is in another domain, or blocked: detach it first. SHARING_VIOLATION: another
        device has the stream. NO_SUCH_DEVICE: the stream table ends before it. NOT_SUPPORTED: the SMMU has no ATS or
        no stalls. INSUFFICIENT_RESOURCES: no memory. IO_TIMEOUT, IO_DEVICE_ERROR: the SMMU does not answer, or refuses;
        the streams may be BLOCKED then.
        """
        return self._exclusively(
            device,
            "attach_device",
            lambda: self._attach(domain, device, input_mapping_id_base, mapping_count),
        )

    def detach_device(
        self, domain: DmaDomain, device: DmaDevice, input_mapping_id: int = 0
    ) -> NtStatus:
        """Detach what was attached by this base. On success none of its transactions is under way, and none comes.

        INVALID_HANDLE: the domain is deleted. INVALID_PARAMETER_2: the device is not attached. INVALID_PARAMETER_3: it
        is, but nothing by this InputMappingId, or the device has none such. INVALID_PARAMETER_MIX: it is attached to
        another domain. FREE_VM_NOT_AT_BASE: it was attached by a lower base. ALREADY_DISCONNECTED: it was detached from
        here before. IO_TIMEOUT: the SMMU does not answer. DEVICE_UNRESPONSIVE: the device does not answer an ATC
        invalidation. After the last two, and IO_DEVICE_ERROR, the streams are BLOCKED; the same call tries again.
        """
        return self._exclusively(
            device, "detach_device", lambda: self._detach(domain, device, input_mapping_id)
        )

    def set_device_fault_reporting(
        self,
        device: DmaDevice,
        input_mapping_id_base: int,
        enable: bool,
        config: FaultConfiguration | None = None,
    ) -> NtStatus:
        """Let faults of an attachment reach a handler, instead of any before, or no more. Detaching ends it too.

        INVALID_PARAMETER_1: the device is not attached. INVALID_PARAMETER_2: it is, but nothing by this base.
        FREE_VM_NOT_AT_BASE: it was attached by a lower base. INVALID_PARAMETER_4: there is no `config` to enable.
        """
        return self._exclusively(
            device,
            "set_device_fault_reporting",
            lambda: self._set_reporting(device, input_mapping_id_base, enable, config),
        )

    def query_input_mappings(self, device: DmaDevice) -> InputMappings:
        """The InputMappingIds of an ACPI-enumerated device; UNSUCCESSFUL for any other."""
        if not device.is_acpi:
            return InputMappings(NtStatus.UNSUCCESSFUL)
        return InputMappings(NtStatus.SUCCESS, tuple(sorted(device.streams)))

    def state(self, device: DmaDevice, input_mapping_id: int = 0) -> AttachmentState:
        """What becomes of the DMA of a device's stream."""
        attachment = self._attachments.find(device, input_mapping_id)
        return AttachmentState.DETACHED if attachment is None else attachment.state

    def service_faults(self) -> list[EventRecord]:
        """Read the event queue, as one does on its interrupt: faults go to their handlers, stalls are answered.

        Returns the records that nobody claimed, those too that a detach found. Raises `DriverError` when the SMMU does
        not take an answer.
        """
        with self._lock:
            self._deliver()
            unclaimed, self._unclaimed = self._unclaimed, []
            return unclaimed

    # What the calls do, with the device to themselves

    def _exclusively(self, device: DmaDevice, call: str, act: Callable[[], NtStatus]) -> NtStatus:
        if not self._verifier.enter(device, call):
            return NtStatus.VERIFIER_STOP
        try:
            with self._lock:
                return act()
        finally:
            self._verifier.leave(device)

    def _attach(self, domain: DmaDomain, device: DmaDevice, base: int, count: int) -> NtStatus:
        status = self._attachments.judge_attach(domain, device, base, count)
        if not status.success:
            return status
        features = self._driver.features
        if domain.space is not None and (
            device.ats > features.ats or device.stalls > features.stalls
        ):
            return NtStatus.NOT_SUPPORTED
        attachment = Attachment(domain, device, base, count)
        try:
            # Room for every STE, before any of them changes.
            for stream_id in attachment.streams:
                self._driver.block(stream_id)
        except DriverError as error:
            return status_of(error)
        self._attachments.add(attachment)
        try:
            self._route(attachment)
        except DriverError as error:
            if self._run_detach(attachment).success:
                self._attachments.remove(attachment)
            return status_of(error)
        streams = tuple(attachment.streams)
        self._observe(DeviceAttached(self._clock(), domain.number, device.name, base, streams))
        return NtStatus.SUCCESS

    def _route(self, attachment: Attachment) -> None:
        """Let the domain rule the attachment's streams."""
        domain, device = attachment.domain, attachment.device
        for stream_id in attachment.streams:
            if domain.space is None:
                self._driver.attach_bypass(stream_id)
            elif domain.configured:
                self._driver.attach(stream_id, domain.space, ats=device.ats, stall=device.stalls)
            else:
                self._driver.invalidate_stream(stream_id)

    def _unroute(self, attachment: Attachment, space: UnmanagedDomain) -> None:
        """Let nothing through, but keep the attachment; it is BLOCKED when something may be remembered."""
        try:
            for stream_id in attachment.streams:
                self._driver.detach(stream_id)
            # The next tables have the same ASID.
            space.invalidate_tlb()
            if attachment.device.ats:
                space.invalidate_atcs(attachment.streams)
        except DriverError:
            for stream_id in attachment.streams:
                self._driver.block(stream_id)
            attachment.state = AttachmentState.BLOCKED

    def _detach(self, domain: DmaDomain, device: DmaDevice, input_id: int) -> NtStatus:
        status = self._attachments.judge_detach(domain, device, input_id)
        attachment = self._attachments.find(device, input_id)
        if not status.success or attachment is None:
            return status
        status = self._run_detach(attachment)
        if status.success:
            self._attachments.detach(attachment)
        now = self._clock()
        self._observe(DeviceDetached(now, domain.number, device.name, input_id, status))
        return status

    def _run_detach(self, attachment: Attachment) -> NtStatus:
        return Detach(
            self._driver,
            attachment,
            flush_faults=self._deliver,
            observe=self._observe,
            clock=self._clock,
        ).run()

    def _set_reporting(
        self, device: DmaDevice, base: int, enable: bool, config: FaultConfiguration | None
    ) -> NtStatus:
        status = self._attachments.judge_reporting(device, base)
        attachment = self._attachments.find(device, base)
        if not status.success or attachment is None:
            return status
        if enable and config is None:
            return NtStatus.INVALID_PARAMETER_4
        attachment.reporting = config if enable else None
        return NtStatus.SUCCESS

    def _deliver(self) -> None:
        self._records += self._driver.events()
        while self._records:
            record = self._records.popleft()
            attachment = self._attachments.of_stream(record.stream_id)
            if attachment is None:
                self._unclaimed.append(record)
                continue
            action = None
            try:
                action = self._report(attachment, record)
            finally:
                # What is blocked has no stalled transactions, or is about to lose them.
                if record.stall and attachment.state is AttachmentState.ATTACHED:
                    retry = action is FaultAction.RETRY
                    self._driver.answer_stall(record.stream_id, record.stag, retry=retry)

    def _report(self, attachment: Attachment, record: EventRecord) -> FaultAction | None:
        fault = decode(record, attachment.device, attachment.streams[record.stream_id])
        if fault is None or attachment.reporting is None:
            self._unclaimed.append(record)
            return None
        return attachment.reporting.handler(fault)

    # Events

    def _changed(self, domain: DmaDomain, change: str) -> None:
        self._observe(DomainChanged(self._clock(), domain.number, domain.type.value, change))

    def _report_concurrent_calls(self, device: DmaDevice, first: Caller, second: Caller) -> None:
        self._observe(ConcurrentCalls(self._clock(), device.name, first, second))
