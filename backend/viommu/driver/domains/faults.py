"""Faults of devices: what an event record says, in the words of FAULT_INFORMATION_ARM64."""

from collections.abc import Callable
from enum import Enum, IntEnum
from typing import NamedTuple

from viommu.driver.domains.device import DmaDevice
from viommu.layouts.records import EventRecord, EventType


class FaultType(IntEnum):
    """FAULT_INFORMATION_ARM64_TYPE."""

    UNSUPPORTED_UPSTREAM_TRANSACTION = 0
    ADDRESS_SIZE = 1
    TLB_MATCH_CONFLICT = 2
    EXTERNAL = 3
    PERMISSION = 4
    ACCESS_FLAG = 5
    TRANSLATION = 6


_TYPES = {
    EventType.F_UUT: FaultType.UNSUPPORTED_UPSTREAM_TRANSACTION,
    # The device sent what its stream is not configured for.
    EventType.F_BAD_ATS_TREQ: FaultType.UNSUPPORTED_UPSTREAM_TRANSACTION,
    EventType.F_STREAM_DISABLED: FaultType.UNSUPPORTED_UPSTREAM_TRANSACTION,
    EventType.F_TRANSL_FORBIDDEN: FaultType.UNSUPPORTED_UPSTREAM_TRANSACTION,
    EventType.C_BAD_SUBSTREAMID: FaultType.UNSUPPORTED_UPSTREAM_TRANSACTION,
    EventType.F_ADDR_SIZE: FaultType.ADDRESS_SIZE,
    EventType.F_TLB_CONFLICT: FaultType.TLB_MATCH_CONFLICT,
    EventType.F_STE_FETCH: FaultType.EXTERNAL,
    EventType.F_CD_FETCH: FaultType.EXTERNAL,
    EventType.F_VMS_FETCH: FaultType.EXTERNAL,
    EventType.F_WALK_EABT: FaultType.EXTERNAL,
    EventType.F_PERMISSION: FaultType.PERMISSION,
    EventType.F_ACCESS: FaultType.ACCESS_FLAG,
    EventType.F_TRANSLATION: FaultType.TRANSLATION,
}
# Those whose records have no InputAddr, and say nothing of the transaction (7.3).
_WITHOUT_ADDRESS = {
    EventType.F_STE_FETCH,
    EventType.F_CD_FETCH,
    EventType.F_VMS_FETCH,
    EventType.F_STREAM_DISABLED,
    EventType.C_BAD_SUBSTREAMID,
}


class FaultAction(Enum):
    """A handler's answer to a stalled transaction; to others it says nothing."""

    TERMINATE = "terminate"
    RETRY = "retry"


class Fault(NamedTuple):
    """One fault. `address` is None where the record has none; `write` and what follows are then False.

    `stalled`: the transaction waits for the handler's answer.
    """

    type: FaultType
    device: DmaDevice
    input_mapping_id: int
    stream_id: int
    substream_id: int | None
    address: int | None
    write: bool
    instruction: bool
    privileged: bool
    stalled: bool


class FaultConfiguration(NamedTuple):
    """DEVICE_FAULT_CONFIGURATION: who is told of a device's faults. Without an answer a stalled transaction aborts."""

    handler: Callable[[Fault], FaultAction | None]


def decode(record: EventRecord, device: DmaDevice, input_mapping_id: int) -> Fault | None:
    """The fault that `record` tells of; None when it is about the driver's own structures (C_BAD_STE, C_BAD_CD, …)."""
    fault_type = _TYPES.get(record.event)
    if fault_type is None:
        return None
    has_address = record.event not in _WITHOUT_ADDRESS
    # A Translation Request reads nothing and writes nothing: its record has other bits there (7.3.6).
    transacts = has_address and record.event != EventType.F_BAD_ATS_TREQ
    has_substream = record.ssv or record.event == EventType.C_BAD_SUBSTREAMID
    return Fault(
        fault_type,
        device,
        input_mapping_id,
        record.stream_id,
        record.substream_id if has_substream else None,
        record.address if has_address else None,
        write=transacts and not record.rnw,
        instruction=transacts and record.ind,
        privileged=transacts and record.pnu,
        stalled=transacts and record.stall,
    )
