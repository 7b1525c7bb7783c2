"""What the interface tells its observer: every change of a domain or an attachment, and every step of a detach."""

from enum import Enum
from typing import Any, NamedTuple

from viommu.driver.domains.status import NtStatus


class Step(Enum):
    """What a detach does, in this order; what does not apply to the attachment is left out."""

    BLOCK = "block"
    """The STEs abort, in memory."""
    INVALIDATE_CONFIGURATION = "invalidate-configuration"
    """CFGI_STE and CFGI_CD_ALL of each stream, and a CMD_SYNC, are handed to the SMMU."""
    DRAIN = "drain"
    """That CMD_SYNC is complete, hence every transaction that used the old STE (3.21.3)."""
    INVALIDATE_TLB = "invalidate-tlb"
    """TLBI of the domain, and CMD_SYNC."""
    INVALIDATE_ATC = "invalidate-atc"
    """CMD_ATC_INV of each stream, and CMD_SYNC, where ATS is on."""
    END_STALLS = "end-stalls"
    """CMD_STALL_TERM of each stream, and CMD_SYNC, where the device can stall."""
    FLUSH_FAULTS = "flush-faults"
    """The event queue is emptied: the device's last faults reach its handler."""


class DomainChanged(NamedTuple):
    """A domain was `created`, `configured` or `deleted`."""

    time: float
    domain: int
    type: str
    change: str


class DeviceAttached(NamedTuple):
    """`streams` are in the domain from here on."""

    time: float
    domain: int
    device: str
    input_mapping_id: int
    streams: tuple[int, ...]


class DetachStepped(NamedTuple):
    """A step of a detach ended at `time` and had taken `seconds`; when it did not succeed, it was the last one."""

    time: float
    device: str
    input_mapping_id: int
    step: Step
    seconds: float
    status: NtStatus


class DeviceDetached(NamedTuple):
    """The device is in no domain any more; or, without success, its streams are blocked and it still is in this one."""

    time: float
    domain: int
    device: str
    input_mapping_id: int
    status: NtStatus


class Caller(NamedTuple):
    """Who made a call: the call, and where in which thread."""

    call: str
    place: str
    thread: str

    def __str__(self) -> str:
        return f"{self.call} from {self.place} in {self.thread}"


class ConcurrentCalls(NamedTuple):
    """A call on a device came while another was under way. It was refused; the first one goes on."""

    time: float
    device: str
    first: Caller
    second: Caller


DomainEvent = DomainChanged | DeviceAttached | DetachStepped | DeviceDetached | ConcurrentCalls


def as_dict(event: DomainEvent) -> dict[str, Any]:
    """The event as plain values, `kind` first, for JSON."""
    return {"kind": type(event).__name__} | {
        name: _plain(value) for name, value in event._asdict().items()
    }


def _plain(value: object) -> object:
    match value:
        case NtStatus():
            return value.name
        case Step():
            return value.value
        case Caller():
            return value._asdict()
        case tuple():
            return list(value)
        case _:
            return value
