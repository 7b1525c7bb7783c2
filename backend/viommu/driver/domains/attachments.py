"""Which streams are attached, together with which, to which domain; and what may be done to them next."""

from collections.abc import Iterator
from enum import Enum
from weakref import WeakKeyDictionary

from viommu.driver.domains.device import DmaDevice
from viommu.driver.domains.domain import DmaDomain
from viommu.driver.domains.faults import FaultConfiguration
from viommu.driver.domains.status import NtStatus


class AttachmentState(Enum):
    """What becomes of a stream's DMA."""

    DETACHED = "detached"
    """It is in no domain, and blocked."""
    ATTACHED = "attached"
    """Its domain rules."""
    BLOCKED = "blocked"
    """A detach did not come to its end: the STE aborts, and nobody knows what the SMMU and the function remember.

    It can only be detached, from this domain and by this base, until that succeeds.
    """


class Attachment:
    """Streams of one device that were attached together, and leave together."""

    def __init__(self, domain: DmaDomain, device: DmaDevice, base: int, count: int) -> None:
        self.domain, self.device, self.base = domain, device, base
        self.streams = {
            device.streams[input_id]: input_id for input_id in range(base, base + count)
        }
        """The InputMappingId of each StreamID."""
        self.state = AttachmentState.ATTACHED
        self.reporting: FaultConfiguration | None = None


class Attachments:
    """All of them. The `judge_…` methods say what a call would be answered, and change nothing."""

    def __init__(self) -> None:
        self._by_stream: dict[int, Attachment] = {}
        # From which domain each base of a device was detached last, as long as there is the device.
        self._left: WeakKeyDictionary[DmaDevice, dict[int, DmaDomain]] = WeakKeyDictionary()

    def __iter__(self) -> Iterator[Attachment]:
        """Each once, in the order in which they were attached."""
        return iter(dict.fromkeys(self._by_stream.values()))

    def add(self, attachment: Attachment) -> None:
        """`attachment` is there from now on."""
        self._by_stream |= dict.fromkeys(attachment.streams, attachment)

    def remove(self, attachment: Attachment) -> None:
        """`attachment` was never there: its attach failed."""
        for stream_id in attachment.streams:
            del self._by_stream[stream_id]

    def detach(self, attachment: Attachment) -> None:
        """`attachment` has ended."""
        self.remove(attachment)
        self._left.setdefault(attachment.device, {})[attachment.base] = attachment.domain

    def of_stream(self, stream_id: int) -> Attachment | None:
        """Where a stream is attached."""
        return self._by_stream.get(stream_id)

    def of_domain(self, domain: DmaDomain) -> list[Attachment]:
        """Who is in a domain."""
        return [attachment for attachment in self if attachment.domain is domain]

    def find(self, device: DmaDevice, input_id: int) -> Attachment | None:
        """The attachment that has this stream of a device."""
        attachment = self._by_stream.get(device.streams.get(input_id, -1))
        return attachment if attachment is not None and attachment.device is device else None

    def judge_attach(self, domain: DmaDomain, device: DmaDevice, base: int, count: int) -> NtStatus:
        """Whether the streams of `device` may be attached to `domain`."""
        if domain.deleted:
            return NtStatus.INVALID_HANDLE
        if base not in device.streams:
            return NtStatus.INVALID_PARAMETER_3
        input_ids = range(base, base + count)
        if not input_ids or any(each not in device.streams for each in input_ids):
            return NtStatus.INVALID_PARAMETER_4
        for input_id in input_ids:
            attachment = self._by_stream.get(device.streams[input_id])
            if attachment is None:
                continue
            if attachment.device is not device:
                return NtStatus.SHARING_VIOLATION
            blocked = attachment.state is AttachmentState.BLOCKED
            if blocked or attachment.domain is not domain:
                return NtStatus.INVALID_DEVICE_STATE
            return NtStatus.DEVICE_ALREADY_ATTACHED
        return NtStatus.SUCCESS

    def judge_detach(self, domain: DmaDomain, device: DmaDevice, input_id: int) -> NtStatus:
        """Whether `input_id` of `device` names an attachment to `domain`."""
        if domain.deleted:
            return NtStatus.INVALID_HANDLE
        if input_id not in device.streams:
            return NtStatus.INVALID_PARAMETER_3
        attachment = self.find(device, input_id)
        if attachment is not None:
            if attachment.domain is not domain:
                return NtStatus.INVALID_PARAMETER_MIX
            return _judge_base(attachment, input_id)
        if self._left.get(device, {}).get(input_id) is domain:
            return NtStatus.ALREADY_DISCONNECTED
        own = any(each.device is device and each.domain is domain for each in self)
        return NtStatus.INVALID_PARAMETER_3 if own else NtStatus.INVALID_PARAMETER_2

    def judge_reporting(self, device: DmaDevice, base: int) -> NtStatus:
        """Whether `base` of `device` names an attachment."""
        attachment = self.find(device, base)
        if attachment is not None:
            return _judge_base(attachment, base)
        own = any(each.device is device for each in self)
        unknown = own or base not in device.streams
        return NtStatus.INVALID_PARAMETER_2 if unknown else NtStatus.INVALID_PARAMETER_1


def _judge_base(attachment: Attachment, input_id: int) -> NtStatus:
    return NtStatus.SUCCESS if input_id == attachment.base else NtStatus.FREE_VM_NOT_AT_BASE
