"""Domains at host level, by name, and the endpoints in them.

    host = server.host
    host.create("sandbox")
    host.map_identity("sandbox", leave_out=[(secret, 4096)])
    host.attach("engine0", "sandbox")
    host.detach("engine0", "sandbox")     # nothing lands any more; the endpoint is blocked
    host.unblock("engine0")               # … and now it passes the host SMMU by, as at first

The guest need not know: its driver runs on, and where a domain refuses a DMA the endpoint sees an abort. Call it from
the event loop, between its turns or from a control method; not from a reader of events, which a step may have called.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from viommu.driver.domains import (
    AttachmentState,
    ContiguousRange,
    DmaDevice,
    DmaDomain,
    DmaRemapping,
    DomainEvent,
    DomainType,
    Fault,
    FaultConfiguration,
    NtStatus,
    as_dict,
)
from viommu.driver.domains.status import status_of
from viommu.driver.errors import DriverError
from viommu.driver.page_tables import PAGE_SIZE, Access
from viommu.endpoints.port import DmaPort
from viommu.host.smmu import HostSmmu
from viommu.trace import Event, Tracer

_EVERYTHING = 1 << 40
"""The end of what an identity domain maps, in blocks of 1 GiB: guest RAM is below, wherever a machine has it."""
_FAULTS = 256
_TROUBLE = NtStatus.IO_TIMEOUT, NtStatus.IO_DEVICE_ERROR
"""What an attach ends with that has begun to change something."""


@dataclass(frozen=True, slots=True)
class HostDomainEvent(Event):
    """A host domain, or an endpoint's place in one, changed; or a detach made a step."""

    event: DomainEvent

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "event": as_dict(self.event)}


@dataclass(frozen=True, slots=True)
class HostFault(Event):
    """A host domain refused a DMA of the endpoint; `fault` is a type of FAULT_INFORMATION_ARM64."""

    endpoint: str
    domain: str
    fault: str
    address: int | None
    write: bool


class EndpointState(Enum):
    """What becomes of an endpoint's DMA behind the guest's SMMU."""

    PASS_THROUGH = "pass-through"  # noqa: S105 - not a secret
    """The host SMMU has nothing to do with it."""
    ATTACHED = "attached"
    """Its host domain rules."""
    BLOCKED = "blocked"
    """It is aborted."""


class HostEndpoint(NamedTuple):
    """Where an endpoint is. One that is BLOCKED in a domain left it halfway: detach it again."""

    endpoint: str
    stream_id: int
    state: EndpointState
    domain: str | None


class HostDomain(NamedTuple):
    """A domain and the endpoints in it. `mappings` are descriptors: a page or a block each."""

    domain: str
    type: DomainType
    mappings: int
    endpoints: tuple[str, ...]


class HostDomains:
    """The domains of one host SMMU. Its calls return the statuses of `DmaRemapping`, whose calls they are, by names.

    INVALID_HANDLE: there is no such domain. NO_SUCH_DEVICE: there is no such endpoint. A call that waits lets the
    endpoints go on, takes nothing from a client, and ends within `timeout` seconds a wait. Resets and new clients of an
    endpoint change nothing here.
    """

    def __init__(
        self,
        ports: Mapping[str, DmaPort],
        work: Callable[[], None],
        tracer: Tracer,
        *,
        timeout: float = 1.0,
    ) -> None:
        self.host = HostSmmu(ports, work, tracer, timeout=timeout)
        self.remapping = DmaRemapping(self.host.driver, observer=self._observe)
        """The whole interface, for what has no name here; the devices are `device(endpoint)`."""
        self.on_fault: Callable[[str, Fault], object] = lambda _endpoint, _fault: None
        """Called with each fault of an endpoint in a domain, between two turns of the event loop."""
        self._tracer = tracer
        self._devices = {name: DmaDevice(name, port.stream_id) for name, port in ports.items()}
        self._domains: dict[str, DmaDomain] = {}
        self._places: dict[str, str] = {}
        self._faults: deque[HostFault] = deque(maxlen=_FAULTS)

    # Domains

    def create(self, domain: str, domain_type: DomainType = DomainType.TRANSLATE) -> NtStatus:
        """Make a domain. One that translates maps nothing yet. RESOURCE_IN_USE: the name is taken."""
        if domain in self._domains:
            return NtStatus.RESOURCE_IN_USE
        status, created = self.remapping.create_domain(domain_type)
        if created is not None:
            self._domains[domain] = created
        return status

    def delete(self, domain: str) -> NtStatus:
        """Delete a domain. RESOURCE_IN_USE: an endpoint is in it."""
        found = self._domains.get(domain)
        if found is None:
            return NtStatus.INVALID_HANDLE
        status = self.remapping.delete_domain(found)
        if status.success:
            del self._domains[domain]
        return status

    def domain(self, domain: str) -> DmaDomain | None:
        """The domain of that name, for `remapping`."""
        return self._domains.get(domain)

    def map(
        self, domain: str, iova: int, address: int, size: int, *, write: bool = True
    ) -> NtStatus:
        """Let the guest physical addresses from `iova` on be `size` bytes of guest RAM at `address`."""
        found = self._domains.get(domain)
        if found is None:
            return NtStatus.INVALID_HANDLE
        memory = ContiguousRange(address, size)
        return self.remapping.map_logical_range(found, Access(write=write), memory, iova)

    def map_identity(self, domain: str, leave_out: Iterable[tuple[int, int]] = ()) -> NtStatus:
        """Map every address below 1 TiB to itself, but for the ranges `leave_out` (address, size), in whole pages.

        The blocks are as large as what is left out allows. Without success nothing of it stays mapped.
        """
        start = 0
        mapped: list[tuple[int, int]] = []
        for address, size in [*sorted(leave_out), (_EVERYTHING, 0)]:
            if address > start:
                status = self.map(domain, start, start, address - start)
                if not status.success:
                    for each in mapped:
                        self.unmap(domain, *each)
                    return status
                mapped.append((start, address - start))
            start = max(start, address + size)
        return NtStatus.SUCCESS

    def unmap(self, domain: str, iova: int, size: int) -> NtStatus:
        """Unmap; on success nothing reaches it any more. FREE_VM_NOT_AT_BASE: it would split a block."""
        found = self._domains.get(domain)
        if found is None:
            return NtStatus.INVALID_HANDLE
        if size % PAGE_SIZE:
            return NtStatus.INVALID_PARAMETER_3
        return self.remapping.unmap_logical_range(found, iova, size // PAGE_SIZE)

    def flush(self, domain: str) -> NtStatus:
        """Make the host SMMU forget all that it remembers of a domain."""
        found = self._domains.get(domain)
        return NtStatus.INVALID_HANDLE if found is None else self.remapping.flush_domain(found)

    def domains(self) -> list[HostDomain]:
        """Every domain."""
        return [
            HostDomain(
                name,
                domain.type,
                len(domain.managed.half(0).mappings()) if domain.managed else 0,
                tuple(each for each, place in self._places.items() if place == name),
            )
            for name, domain in self._domains.items()
        ]

    # Endpoints

    def device(self, endpoint: str) -> DmaDevice | None:
        """The endpoint of that name, for `remapping`."""
        return self._devices.get(endpoint)

    def attach(self, endpoint: str, domain: str) -> NtStatus:
        """Let `domain` rule an endpoint that passed by, or was blocked.

        No DMA that the domain lets pass is refused on the way there from pass-through. On success all that is under way
        is what the domain let pass; after IO_TIMEOUT the endpoint is blocked.
        """
        device, found = self._devices.get(endpoint), self._domains.get(domain)
        if device is None or found is None:
            return NtStatus.NO_SUCH_DEVICE if device is None else NtStatus.INVALID_HANDLE
        port = self.host.ports[endpoint]
        status = self.remapping.attach_device(found, device)
        if not status.success:
            blocked = self.remapping.state(device) is AttachmentState.BLOCKED
            if blocked:
                self._places.setdefault(endpoint, domain)
            if blocked or status in _TROUBLE:
                self.host.concern(port)
            return status
        self._places[endpoint] = domain
        reporting = FaultConfiguration(lambda fault: self._report(endpoint, fault))
        self.remapping.set_device_fault_reporting(device, 0, True, reporting)
        if port.host is None:
            # Until here it passed by, undisturbed; what it has in flight now is waited for.
            self.host.concern(port)
            try:
                self.host.driver.invalidate_stream(port.stream_id)
            except DriverError as error:
                self.detach(endpoint, domain)
                return status_of(error)
        return status

    def detach(self, endpoint: str, domain: str) -> NtStatus:
        """Take an endpoint out of `domain`, and leave it blocked: on success nothing is under way, and nothing lands.

        Without success it is blocked and still in the domain, unless it never was there.
        """
        device, found = self._devices.get(endpoint), self._domains.get(domain)
        if device is None or found is None:
            return NtStatus.NO_SUCH_DEVICE if device is None else NtStatus.INVALID_HANDLE
        status = self.remapping.detach_device(found, device)
        if status.success:
            del self._places[endpoint]
        return status

    def block(self, endpoint: str) -> NtStatus:
        """Abort all DMA of an endpoint from here on, wherever it was: when this returns, nothing lands.

        IO_TIMEOUT: it is blocked, but something that began before does not come to its end.
        """
        port = self.host.ports.get(endpoint)
        if port is None:
            return NtStatus.NO_SUCH_DEVICE
        if endpoint in self._places:
            return self.detach(endpoint, self._places[endpoint])
        self.host.concern(port)
        try:
            self.host.driver.detach(port.stream_id)
        except DriverError as error:
            return status_of(error)
        return NtStatus.SUCCESS

    def unblock(self, endpoint: str) -> NtStatus:
        """Let an endpoint pass the host SMMU by. INVALID_DEVICE_STATE: it is in a domain."""
        port = self.host.ports.get(endpoint)
        if port is None:
            return NtStatus.NO_SUCH_DEVICE
        if endpoint in self._places:
            return NtStatus.INVALID_DEVICE_STATE
        self.host.release(port)
        return NtStatus.SUCCESS

    def endpoints(self) -> list[HostEndpoint]:
        """Where each endpoint is."""
        return [
            HostEndpoint(name, port.stream_id, self._state(name, port), self._places.get(name))
            for name, port in self.host.ports.items()
        ]

    def _state(self, name: str, port: DmaPort) -> EndpointState:
        if port.host is None:
            return EndpointState.PASS_THROUGH
        attached = self.remapping.state(self._devices[name]) is AttachmentState.ATTACHED
        return EndpointState.ATTACHED if attached else EndpointState.BLOCKED

    # Faults

    def service(self) -> None:
        """Hand on what the host SMMU has recorded since the last time. The event loop calls it at every turn."""
        if self.host.interrupted:
            self.host.interrupted = False
            self.remapping.service_faults()

    def faults(self) -> list[HostFault]:
        """The last faults, oldest first; each is given out once."""
        self.service()
        faults = list(self._faults)
        self._faults.clear()
        return faults

    def _report(self, endpoint: str, fault: Fault) -> None:
        found = HostFault(
            endpoint, self._places[endpoint], fault.type.name, fault.address, fault.write
        )
        self._faults.append(found)
        if self._tracer:
            self._tracer.emit(found)
        self.on_fault(endpoint, fault)

    def _observe(self, event: DomainEvent) -> None:
        if self._tracer:
            self._tracer.emit(HostDomainEvent(event))
