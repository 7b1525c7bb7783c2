"""Faults of a device reach its handler, decoded, while it is attached and wants them."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.domain_rig import IOVA, DomainRig, acpi_device
from tests.driver_rig import DATA, PAGE, record
from viommu.driver.domains import (
    AttachmentState,
    ContiguousRange,
    DmaDevice,
    DomainConfiguration,
    DomainType,
    Fault,
    FaultAction,
    FaultConfiguration,
    FaultType,
    NtStatus,
)
from viommu.driver.page_tables import READ_ONLY, Access, PageTable
from viommu.layouts.records import EventType
from viommu.smmu import Access as Transaction
from viommu.smmu import Features, TransactionStalled

STREAM = 0x10
NOWHERE = 1 << 36


class Listener:
    """A device in a domain, whose faults are kept."""

    def __init__(
        self, features: Features | None = None, *, unmanaged: bool = False, stalls: bool = False
    ) -> None:
        self.rig = DomainRig(features)
        self.faults: list[Fault] = []
        self.answer: FaultAction | None = None
        self.device = DmaDevice("pci", STREAM, stalls=stalls)
        self.domain = self.rig.domain(DomainType.UNMANAGED if unmanaged else DomainType.TRANSLATE)
        self.rig.attach(self.domain, self.device)
        self.report(True)

    def report(self, enable: bool) -> None:
        config = FaultConfiguration(self._handle) if enable else None
        status = self.rig.remapping.set_device_fault_reporting(self.device, 0, enable, config)
        assert status is NtStatus.SUCCESS

    def _handle(self, fault: Fault) -> FaultAction | None:
        self.faults.append(fault)
        return self.answer

    def map(self, access: Access) -> None:
        one = ContiguousRange(DATA, PAGE)
        status = self.rig.remapping.map_logical_range(self.domain, access, one, IOVA)
        assert status is NtStatus.SUCCESS

    def configure(self, root: int) -> None:
        configuration = DomainConfiguration(ttbr0=root, input_size0=39)
        status = self.rig.remapping.configure_domain(self.domain, configuration)
        assert status is NtStatus.SUCCESS

    def fault(self, iova: int = IOVA, **transaction: int) -> Fault:
        """What is heard of a DMA that is refused."""
        assert self.rig.remapping.service_faults() == []
        self.faults.clear()
        with pytest.raises(Exception, match="stream 0x10"):
            self.rig.dma(iova, **transaction)
        assert self.rig.remapping.service_faults() == []
        (fault,) = self.faults
        assert (fault.device, fault.input_mapping_id, fault.stream_id) == (self.device, 0, STREAM)
        return fault


def test_a_translation_fault_with_all_that_is_known_of_it() -> None:
    listener = Listener()
    address = IOVA + 0x123
    expected = Fault(
        FaultType.TRANSLATION,
        listener.device,
        0,
        STREAM,
        None,
        address,
        write=False,
        instruction=False,
        privileged=False,
        stalled=False,
    )
    assert listener.fault(address) == expected
    assert listener.fault(address, write=True) == expected._replace(write=True)
    assert listener.fault(address, privileged=True) == expected._replace(privileged=True)
    assert listener.fault(address, instruction=True) == expected._replace(instruction=True)


@pytest.mark.parametrize(
    ("access", "transaction", "expected"),
    [
        (READ_ONLY, {"write": True}, FaultType.PERMISSION),
        (Access(privileged=True), {}, FaultType.PERMISSION),
        (Access(accessed=False), {}, FaultType.ACCESS_FLAG),
    ],
)
def test_faults_of_a_page(access: Access, transaction: dict[str, int], expected: FaultType) -> None:
    listener = Listener()
    listener.map(access)
    fault = listener.fault(**transaction)
    assert (fault.type, fault.address) == (expected, IOVA)
    assert fault.write == bool(transaction)


def test_faults_of_the_owner_s_tables() -> None:
    listener = Listener(replace(Features(), output_address_bits=40), unmanaged=True)
    wide = PageTable(listener.rig.arena, input_bits=39)
    wide.map(IOVA, 1 << 40, PAGE)
    listener.configure(wide.root)
    fault = listener.fault()
    assert (fault.type, fault.address) == (FaultType.ADDRESS_SIZE, IOVA)
    listener.configure(NOWHERE)
    fault = listener.fault()
    assert (fault.type, fault.address) == (FaultType.EXTERNAL, IOVA)


def test_a_substream_that_the_stream_has_not() -> None:
    fault = Listener().fault(substream_id=3)
    assert fault.type is FaultType.UNSUPPORTED_UPSTREAM_TRANSACTION
    assert (fault.substream_id, fault.address, fault.write) == (3, None, False)


TYPES = {
    EventType.F_UUT: FaultType.UNSUPPORTED_UPSTREAM_TRANSACTION,
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


@pytest.mark.parametrize("event", list(EventType))
def test_every_event_is_a_fault_or_stays_unclaimed(event: EventType) -> None:
    """Also those that this SMMU never has a reason for: a record is put into its queue."""
    listener = Listener()
    sent = record(event, rnw=True, address=0 if event == EventType.C_BAD_STE else 0x5000)
    listener.rig.smmu.events.record(sent)
    unclaimed = listener.rig.remapping.service_faults()
    if event in TYPES:
        assert [fault.type for fault in listener.faults] == [TYPES[event]]
        assert unclaimed == []
    else:
        assert listener.faults == []
        assert unclaimed == [sent]


def test_what_nobody_listens_to_is_unclaimed() -> None:
    listener = Listener()
    rig, refused = listener.rig, record(EventType.F_TRANSLATION, address=0x2000)
    listener.report(False)
    rig.smmu.events.record(refused)
    other = record(EventType.F_TRANSLATION, stream_id=0x40)
    rig.smmu.events.record(other)
    assert rig.remapping.service_faults() == [refused, other]
    assert rig.remapping.service_faults() == []
    assert listener.faults == []
    listener.report(True)
    assert listener.fault().type is FaultType.TRANSLATION


def test_the_stream_of_a_group_that_faulted_is_named() -> None:
    rig, device = DomainRig(), acpi_device()
    rig.attach(rig.domain(), device, 0, 4)
    faults: list[Fault] = []
    config = FaultConfiguration(faults.append)
    assert rig.remapping.set_device_fault_reporting(device, 0, True, config).success
    for stream_id in (0x22, 0x20):
        assert rig.reaches(stream_id) is None
    rig.remapping.service_faults()
    assert [(fault.stream_id, fault.input_mapping_id) for fault in faults] == [(0x22, 2), (0x20, 0)]


def test_a_detach_hands_over_the_last_faults_and_then_none_arrives() -> None:
    listener = Listener()
    rig, domain, device = listener.rig, listener.domain, listener.device
    assert rig.reaches(STREAM) is None
    assert listener.faults == []  # it is in the queue
    rig.detach(domain, device)
    assert [fault.type for fault in listener.faults] == [FaultType.TRANSLATION]
    late = record(EventType.F_TRANSLATION, address=0x3000)
    rig.smmu.events.record(late)
    assert rig.reaches(STREAM) is None
    assert rig.remapping.service_faults() == [late]
    # Nor after another attach, until it is asked for again.
    rig.attach(domain, device)
    rig.smmu.events.record(late)
    assert rig.remapping.service_faults() == [late]
    assert len(listener.faults) == 1


def test_a_detach_hands_over_the_faults_of_others_too() -> None:
    listener = Listener()
    rig, other = listener.rig, DmaDevice("other", 0x18)
    rig.attach(listener.domain, other)
    assert rig.reaches(STREAM) is None
    nobodys = record(EventType.C_BAD_STREAMID, stream_id=0x50)
    rig.smmu.events.record(nobodys)
    rig.detach(listener.domain, other)
    assert len(listener.faults) == 1
    assert rig.remapping.service_faults() == [nobodys]


# Stalls


def stall(listener: Listener) -> TransactionStalled:
    with pytest.raises(TransactionStalled) as held:
        listener.rig.smmu.translate(Transaction(STREAM), IOVA, 8)
    return held.value


def fail(_: Fault) -> None:
    raise RuntimeError("a bug in the handler")


def mapping(listener: Listener) -> Callable[[Fault], FaultAction]:
    def handle(fault: Fault) -> FaultAction:
        listener.faults.append(fault)
        listener.map(Access())
        return FaultAction.RETRY

    return handle


def test_a_handler_lets_a_stalled_transaction_try_again() -> None:
    listener = Listener(stalls=True)
    config = FaultConfiguration(mapping(listener))
    remapping = listener.rig.remapping
    assert remapping.set_device_fault_reporting(listener.device, 0, True, config).success
    held = stall(listener)
    assert remapping.service_faults() == []
    assert listener.faults[0].stalled
    assert held.stalled.resolution == "retry"
    assert listener.rig.reaches(STREAM) == DATA


def test_a_stall_at_which_the_handler_fails_aborts() -> None:
    listener = Listener(stalls=True)
    config = FaultConfiguration(fail)
    remapping = listener.rig.remapping
    assert remapping.set_device_fault_reporting(listener.device, 0, True, config).success
    held = stall(listener)
    with pytest.raises(RuntimeError, match="a bug"):
        remapping.service_faults()
    assert held.stalled.resolution == "abort"


@pytest.mark.parametrize("answer", [None, FaultAction.TERMINATE])
def test_without_such_an_answer_it_aborts(answer: FaultAction | None) -> None:
    listener = Listener(stalls=True)
    listener.answer = answer
    held = stall(listener)
    assert listener.rig.remapping.service_faults() == []
    assert held.stalled.resolution == "abort"


def test_a_stall_that_nobody_listens_to_aborts() -> None:
    listener = Listener(stalls=True)
    listener.report(False)
    held = stall(listener)
    (unclaimed,) = listener.rig.remapping.service_faults()
    assert (unclaimed.event, unclaimed.stall) == (EventType.F_TRANSLATION, True)
    assert held.stalled.resolution == "abort"


def test_devices_that_do_not_stall_beside_those_that_do() -> None:
    listener = Listener(stalls=True)
    other = DmaDevice("other", 0x18)
    listener.rig.attach(listener.domain, other)
    stall(listener)
    assert listener.rig.reaches(0x18) is None  # an abort at once


def test_an_smmu_whose_faults_always_stall() -> None:
    listener = Listener(replace(Features(), stall_model="stall"))
    held = stall(listener)
    listener.rig.detach(listener.domain, listener.device)
    assert held.stalled.resolution == "abort"
    assert "end-stalls" in listener.rig.steps


def test_a_handler_that_fails_leaves_the_device_blocked() -> None:
    listener = Listener()
    rig, domain, device = listener.rig, listener.domain, listener.device
    config = FaultConfiguration(fail)
    assert rig.remapping.set_device_fault_reporting(device, 0, True, config).success
    assert rig.reaches(STREAM) is None
    nobodys = record(EventType.C_BAD_STREAMID, stream_id=0x50)
    rig.smmu.events.record(nobodys)
    with pytest.raises(RuntimeError, match="a bug"):
        rig.remapping.detach_device(domain, device)
    assert rig.remapping.state(device) is AttachmentState.BLOCKED
    assert rig.reaches(STREAM) is None
    rig.detach(domain, device)  # the record that it failed on is gone, the one behind it is not
    assert rig.remapping.service_faults() == [nobodys]
