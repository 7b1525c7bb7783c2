"""Domains with the semantics of Windows' DMA-remapping interface, whose statuses are its results.

Statuses, devices, attachments, the detach and its check; tables and commands are `viommu.driver`'s.
"""

from viommu.driver.domains.attachments import AttachmentState
from viommu.driver.domains.device import DmaDevice, IdMapping
from viommu.driver.domains.domain import (
    ContiguousRange,
    DmaDomain,
    DomainConfiguration,
    DomainType,
)
from viommu.driver.domains.events import (
    Caller,
    ConcurrentCalls,
    DetachStepped,
    DeviceAttached,
    DeviceDetached,
    DomainChanged,
    DomainEvent,
    Step,
    as_dict,
)
from viommu.driver.domains.faults import Fault, FaultAction, FaultConfiguration, FaultType
from viommu.driver.domains.interface import CreatedDomain, DmaRemapping, InputMappings
from viommu.driver.domains.status import NtStatus

__all__ = [
    "AttachmentState",
    "Caller",
    "ConcurrentCalls",
    "ContiguousRange",
    "CreatedDomain",
    "DetachStepped",
    "DeviceAttached",
    "DeviceDetached",
    "DmaDevice",
    "DmaDomain",
    "DmaRemapping",
    "DomainChanged",
    "DomainConfiguration",
    "DomainEvent",
    "DomainType",
    "Fault",
    "FaultAction",
    "FaultConfiguration",
    "FaultType",
    "IdMapping",
    "InputMappings",
    "NtStatus",
    "Step",
    "as_dict",
]
