"""What a domain lets through: each type, before and after it is configured, mapped, flushed, deleted."""

import pytest

from tests.ats_rig import Function
from tests.domain_rig import IOVA, DomainRig, acpi_device
from tests.driver_rig import DATA, PAGE, fault
from viommu.driver.domains import (
    AttachmentState,
    DmaDevice,
    DomainConfiguration,
    DomainType,
    NtStatus,
)
from viommu.driver.page_tables import PageTable
from viommu.layouts.commands import Opcode
from viommu.layouts.records import EventType
from viommu.layouts.tables import SteConfig
from viommu.smmu import Access as Transaction

PCI = 0x10


@pytest.fixture
def rig() -> DomainRig:
    return DomainRig()


@pytest.fixture
def device() -> DmaDevice:
    return DmaDevice("pci", PCI)


def tables(rig: DomainRig, address: int, iova: int = IOVA) -> DomainConfiguration:
    """Page tables that the test made, which map a page at `iova` to `address`."""
    table = PageTable(rig.arena, input_bits=39)
    table.map(iova, address, PAGE)
    return DomainConfiguration(ttbr0=table.root, input_size0=39)


def test_a_managed_domain_lets_through_what_is_mapped(rig: DomainRig, device: DmaDevice) -> None:
    domain = rig.domain()
    rig.attach(domain, device)
    assert rig.refused(IOVA) == [fault(EventType.F_TRANSLATION)]
    rig.map(domain, IOVA, DATA)
    assert rig.reaches(PCI) == DATA
    assert rig.remapping.unmap_logical_range(domain, IOVA, 1) is NtStatus.SUCCESS
    assert rig.refused(IOVA) == [fault(EventType.F_TRANSLATION)]
    rig.map(domain, IOVA, DATA + PAGE)
    assert rig.reaches(PCI) == DATA + PAGE


def test_an_unmanaged_domain_blocks_until_it_is_configured(
    rig: DomainRig, device: DmaDevice
) -> None:
    domain = rig.domain(DomainType.UNMANAGED)
    rig.attach(domain, device)
    assert rig.refused(IOVA) == []
    assert rig.config(PCI) is SteConfig.ABORT
    assert rig.remapping.configure_domain(domain, tables(rig, DATA)) is NtStatus.SUCCESS
    assert rig.reaches(PCI) == DATA
    # It can be configured anew, under way.
    assert rig.remapping.configure_domain(domain, tables(rig, DATA + PAGE)) is NtStatus.SUCCESS
    assert rig.reaches(PCI) == DATA + PAGE
    # Who comes later finds it configured.
    other = DmaDevice("other", 0x18)
    rig.attach(domain, other)
    assert rig.reaches(0x18) == DATA + PAGE
    rig.detach(domain, device)
    assert rig.refused(IOVA) == []
    assert rig.reaches(0x18) == DATA + PAGE


def test_both_halves_of_an_unmanaged_domain(rig: DomainRig, device: DmaDevice) -> None:
    upper = PageTable(rig.arena, input_bits=39, upper=True)
    upper.map(2**64 - PAGE, DATA + PAGE, PAGE)
    configuration = tables(rig, DATA)._replace(ttbr1=upper.root, input_size1=39)
    domain = rig.domain(DomainType.UNMANAGED)
    assert rig.remapping.configure_domain(domain, configuration) is NtStatus.SUCCESS
    rig.attach(domain, device)
    assert rig.reaches(PCI) == DATA
    assert rig.reaches(PCI, 2**64 - PAGE) == DATA + PAGE
    assert configuration.mair0 == 0xFF


@pytest.mark.parametrize("by", ["list", "all"])
def test_the_owner_flushes_an_unmanaged_domain(rig: DomainRig, device: DmaDevice, by: str) -> None:
    table = PageTable(rig.arena, input_bits=39)
    table.map(IOVA, DATA, PAGE)
    domain = rig.domain(DomainType.UNMANAGED)
    configuration = DomainConfiguration(ttbr0=table.root, input_size0=39)
    assert rig.remapping.configure_domain(domain, configuration) is NtStatus.SUCCESS
    rig.attach(domain, device)
    assert rig.reaches(PCI) == DATA
    table.unmap(IOVA, PAGE)
    assert rig.reaches(PCI) == DATA  # stale, as its owner has not flushed
    other = rig.remapping.flush_domain_va_list(domain, True, [IOVA + PAGE])
    assert other is NtStatus.SUCCESS
    assert rig.reaches(PCI) == DATA
    names, stop = rig.commands()
    if by == "list":
        assert rig.remapping.flush_domain_va_list(domain, False, [IOVA]) is NtStatus.SUCCESS
    else:
        assert rig.remapping.flush_domain(domain) is NtStatus.SUCCESS
    stop()
    opcode = Opcode.CMD_TLBI_NH_VA if by == "list" else Opcode.CMD_TLBI_NH_ALL
    assert names == [opcode.name, "CMD_SYNC"]
    assert rig.reaches(PCI) is None


def test_the_streams_of_a_device_can_be_in_several_domains(rig: DomainRig) -> None:
    device = acpi_device()
    one, two = rig.domain(address=DATA), rig.domain(address=DATA + PAGE)
    through = rig.domain(DomainType.PASS_THROUGH)
    rig.attach(one, device, 0, 2)
    rig.attach(two, device, 2, 2)
    rig.attach(through, device, 8)
    assert [rig.reaches(stream_id) for stream_id in (0x20, 0x21, 0x22, 0x23)] == [
        DATA,
        DATA,
        DATA + PAGE,
        DATA + PAGE,
    ]
    assert rig.reaches(0x30, DATA) == DATA
    rig.detach(one, device, 0)
    assert [rig.reaches(stream_id) for stream_id in (0x20, 0x21)] == [None, None]
    assert rig.reaches(0x22) == DATA + PAGE
    rig.detach(two, device, 2)
    rig.detach(through, device, 8)
    assert rig.reaches(0x30, DATA) is None
    assert {rig.remapping.state(device, each) for each in device.streams} == {
        AttachmentState.DETACHED
    }


def test_detach_then_attach_elsewhere(rig: DomainRig, device: DmaDevice) -> None:
    one, two = rig.domain(address=DATA), rig.domain(address=DATA + PAGE)
    for _ in range(3):
        for domain, address in ((one, DATA), (two, DATA + PAGE)):
            rig.attach(domain, device)
            assert rig.reaches(PCI) == address
            rig.detach(domain, device)
            assert rig.reaches(PCI) is None
    for domain in (one, two):
        assert rig.remapping.delete_domain(domain) is NtStatus.SUCCESS


def test_what_was_used_is_given_back(rig: DomainRig) -> None:
    free, device = rig.arena.free_bytes, acpi_device()
    for kind in DomainType:
        domain = rig.domain(kind)
        rig.attach(domain, device, 0, 4)
        rig.detach(domain, device, 0)
        assert rig.remapping.delete_domain(domain) is NtStatus.SUCCESS
    assert rig.arena.free_bytes == free
    for stream_id in (0x20, 0x23):
        assert list(rig.driver.table.entry(stream_id)) == [1] + [0] * 7


def test_a_configuration_that_the_smmu_does_not_take_leaves_the_domain_blocked(
    rig: DomainRig, device: DmaDevice
) -> None:
    domain, configuration = rig.domain(DomainType.UNMANAGED), tables(rig, DATA)
    rig.attach(domain, device)
    with rig.stuck():
        assert rig.remapping.configure_domain(domain, configuration) is NtStatus.IO_TIMEOUT
    assert rig.config(PCI) is SteConfig.ABORT
    assert rig.remapping.state(device) is AttachmentState.BLOCKED
    assert rig.remapping.configure_domain(domain, configuration) is NtStatus.SUCCESS
    assert rig.refused(IOVA) == []  # a blocked device stays out until it is detached
    rig.detach(domain, device)
    rig.attach(domain, device)
    assert rig.reaches(PCI) == DATA


def test_nothing_of_before_a_failed_configuration_is_used_after_the_next(rig: DomainRig) -> None:
    device, function = DmaDevice("pci", PCI, ats=True), Function()
    domain, wanted = rig.domain(DomainType.UNMANAGED), tables(rig, DATA + PAGE)
    rig.smmu.connect(PCI, function)
    rig.attach(domain, device)
    assert rig.remapping.configure_domain(domain, tables(rig, DATA)) is NtStatus.SUCCESS
    slow = rig.smmu.translate(Transaction(PCI), IOVA, 8)

    def end_too_late() -> None:
        if rig.config(PCI) is SteConfig.ABORT:  # the call has given up
            rig.smmu.retire(slow)
        rig.smmu.step()

    rig.while_polling = end_too_late
    assert rig.remapping.configure_domain(domain, wanted) is NtStatus.IO_TIMEOUT
    assert rig.remapping.state(device) is AttachmentState.ATTACHED
    assert rig.reaches(PCI) is None
    assert [request.size for request in function.requests] == [1 << 64]
    assert rig.remapping.configure_domain(domain, wanted) is NtStatus.SUCCESS
    assert rig.reaches(PCI) == DATA + PAGE


def test_a_function_that_may_remember_what_was_before_a_configuration_is_blocked(
    rig: DomainRig,
) -> None:
    device, function = DmaDevice("pci", PCI, ats=True), Function()
    domain, wanted = rig.domain(DomainType.UNMANAGED), tables(rig, DATA + PAGE)
    rig.smmu.connect(PCI, function)
    rig.attach(domain, device)
    assert rig.remapping.configure_domain(domain, tables(rig, DATA)) is NtStatus.SUCCESS

    def give_up() -> None:
        rig.smmu.give_up()
        rig.smmu.step()

    function.at_once, rig.while_polling = False, give_up
    assert rig.remapping.configure_domain(domain, wanted) is NtStatus.DEVICE_UNRESPONSIVE
    assert rig.remapping.state(device) is AttachmentState.BLOCKED
    function.at_once = True
    assert rig.remapping.configure_domain(domain, wanted) is NtStatus.SUCCESS
    assert rig.reaches(PCI) is None
    rig.detach(domain, device)
    rig.attach(domain, device)
    assert rig.reaches(PCI) == DATA + PAGE


def test_an_attach_that_the_smmu_does_not_take_is_blocked(
    rig: DomainRig, device: DmaDevice
) -> None:
    domain = rig.domain(address=DATA)
    with rig.stuck():
        assert rig.remapping.attach_device(domain, device) is NtStatus.IO_TIMEOUT
    assert rig.remapping.state(device) is AttachmentState.BLOCKED
    assert rig.config(PCI) is SteConfig.ABORT
    assert rig.reaches(PCI) is None
    rig.detach(domain, device)
    rig.attach(domain, device)
    assert rig.reaches(PCI) == DATA
