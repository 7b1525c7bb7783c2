"""The steps of a detach, in their order; and detaches that cannot come to their end."""

from array import array
from collections.abc import Callable
from time import monotonic

import pytest

from tests.ats_rig import Function
from tests.domain_rig import IOVA, DomainRig, acpi_device
from tests.driver_rig import DATA, PAGE
from viommu.driver.domains import (
    AttachmentState,
    DetachStepped,
    DeviceDetached,
    DmaDevice,
    DomainType,
    NtStatus,
    Step,
)
from viommu.layouts.registers import Register
from viommu.layouts.tables import SteConfig
from viommu.smmu import Access, AtsStatus, TransactionAborted, TransactionStalled, Translation

STREAM = 0x10
STEPS = ["block", "invalidate-configuration", "drain", "invalidate-tlb", "flush-faults"]
OF_CONFIGURATION = ["CMD_CFGI_STE", "CMD_CFGI_CD_ALL"]


@pytest.fixture
def rig() -> DomainRig:
    return DomainRig()


def begin(rig: DomainRig) -> Translation:
    """A write that is translated and has not landed."""
    return rig.smmu.translate(Access(STREAM, write=True), IOVA, 64)


@pytest.mark.parametrize(
    ("ats", "stalls", "more_steps", "more_commands"),
    [
        (False, False, [], []),
        (True, False, ["invalidate-atc"], ["CMD_ATC_INV", "CMD_SYNC"]),
        (False, True, ["end-stalls"], ["CMD_STALL_TERM", "CMD_SYNC"]),
        (
            True,
            True,
            ["invalidate-atc", "end-stalls"],
            ["CMD_ATC_INV", "CMD_SYNC", "CMD_STALL_TERM", "CMD_SYNC"],
        ),
    ],
)
def test_the_steps_and_their_commands(
    rig: DomainRig, ats: bool, stalls: bool, more_steps: list[str], more_commands: list[str]
) -> None:
    domain, device = rig.domain(address=DATA), DmaDevice("pci", STREAM, ats=ats, stalls=stalls)
    rig.smmu.connect(STREAM, Function())
    rig.attach(domain, device)
    rig.seen.clear()
    names, stop = rig.commands()
    rig.detach(domain, device)
    stop()
    assert rig.steps == [*STEPS[:-1], *more_steps, STEPS[-1]]
    assert names == [*OF_CONFIGURATION, "CMD_SYNC", "CMD_TLBI_NH_ASID", "CMD_SYNC", *more_commands]
    # Each with its time; then the detach is complete.
    *steps, end = rig.seen
    times = [event.time for event in rig.seen]
    assert times == sorted(times)
    assert len(set(times)) == len(times)
    for step in steps:
        assert isinstance(step, DetachStepped)
        assert (step.device, step.input_mapping_id, step.status) == ("pci", 0, NtStatus.SUCCESS)
        assert step.seconds > 0
    assert end == DeviceDetached(end.time, domain.number, "pci", 0, NtStatus.SUCCESS)


def test_a_group_is_blocked_as_a_whole_before_anything_else(rig: DomainRig) -> None:
    domain, device = rig.domain(address=DATA), acpi_device()
    rig.attach(domain, device, 0, 4)
    names, _ = rig.commands()
    rig.detach(domain, device)
    assert names == [*OF_CONFIGURATION * 4, "CMD_SYNC", "CMD_TLBI_NH_ASID", "CMD_SYNC"]


def test_pass_through_has_no_tlb_to_invalidate(rig: DomainRig) -> None:
    domain, device = rig.domain(DomainType.PASS_THROUGH), DmaDevice("pci", STREAM)
    rig.attach(domain, device)
    rig.detach(domain, device)
    assert rig.steps == ["block", "invalidate-configuration", "drain", "flush-faults"]


def test_the_drain_waits_for_what_is_in_flight(rig: DomainRig) -> None:
    domain, device = rig.domain(address=DATA), DmaDevice("pci", STREAM)
    rig.attach(domain, device)
    flying, polls = begin(rig), 0

    def land_later() -> None:
        nonlocal polls
        polls += 1
        assert rig.config(STREAM) is SteConfig.ABORT
        if polls == 1:
            # It takes as long as the transaction does; what comes meanwhile is refused.
            assert rig.steps == ["block", "invalidate-configuration"]
            assert rig.reaches(STREAM) is None
        if polls == 5:
            rig.smmu.retire(flying)
        rig.smmu.step()

    rig.while_polling = land_later
    rig.detach(domain, device)
    assert polls >= 5
    assert rig.steps == STEPS
    assert len(rig.smmu.in_flight) == len(rig.smmu.tlb) == 0


def test_stalled_transactions_are_terminated(rig: DomainRig) -> None:
    domain, device = rig.domain(address=DATA), DmaDevice("pci", STREAM, stalls=True)
    rig.attach(domain, device)
    with pytest.raises(TransactionStalled) as held:
        rig.smmu.translate(Access(STREAM), IOVA + PAGE, 8)
    assert held.value.stalled.resolution is None
    rig.detach(domain, device)
    assert held.value.stalled.resolution == "abort"
    assert len(rig.smmu.stalls) == 0


def test_a_device_with_ats_is_refused_both_ways(rig: DomainRig) -> None:
    domain, device = rig.domain(address=DATA), DmaDevice("pci", STREAM, ats=True)
    function = Function()
    rig.smmu.connect(STREAM, function)
    rig.attach(domain, device)
    found = rig.smmu.ats_translate(Access(STREAM), IOVA)
    assert (found.status, found.address) == (AtsStatus.SUCCESS, DATA)
    # Unmapping makes it forget that page, a detach everything.
    assert rig.remapping.unmap_logical_range(domain, IOVA, 1) is NtStatus.SUCCESS
    assert [(r.address, r.size) for r in function.requests] == [(IOVA, PAGE)]
    rig.detach(domain, device)
    assert function.requests[-1].size == 1 << 64
    assert rig.smmu.ats_translate(Access(STREAM), IOVA).status is not AtsStatus.SUCCESS


# Detaches that cannot come to their end


def _hold_a_transaction(rig: DomainRig) -> Callable[[], object]:
    flying = begin(rig)
    return lambda: rig.smmu.retire(flying)


def _stop_the_queue(rig: DomainRig) -> Callable[[], object]:
    cr0 = rig.smmu.read(Register.CR0, 4)
    rig.smmu.write(Register.CR0, 4, cr0 & ~8)
    return lambda: rig.smmu.write(Register.CR0, 4, cr0)


def _ignore_invalidations(rig: DomainRig) -> Callable[[], object]:
    function, since = Function(), 0
    function.at_once = False
    rig.smmu.connect(STREAM, function)

    def run_out_of_patience() -> None:
        nonlocal since
        since += 1
        if not since % 5:
            rig.smmu.give_up()
        rig.smmu.step()

    rig.while_polling = run_out_of_patience

    def answer_again() -> None:
        function.at_once = True

    return answer_again


def _ignore_for_ever(rig: DomainRig) -> Callable[[], object]:
    answer_again = _ignore_invalidations(rig)
    rig.while_polling = rig.smmu.step

    def give_up_at_last() -> None:
        rig.smmu.give_up()
        answer_again()

    return give_up_at_last


@pytest.mark.parametrize(
    ("trouble", "ends", "status"),
    [
        (_hold_a_transaction, [Step.DRAIN] * 2, NtStatus.IO_TIMEOUT),
        (_stop_the_queue, [Step.DRAIN] * 2, NtStatus.IO_TIMEOUT),
        (_ignore_invalidations, [Step.INVALIDATE_ATC] * 2, NtStatus.DEVICE_UNRESPONSIVE),
        # The CMD_SYNC behind the first CMD_ATC_INV holds the queue: the second try does not come as far.
        (_ignore_for_ever, [Step.INVALIDATE_ATC, Step.DRAIN], NtStatus.IO_TIMEOUT),
    ],
)
def test_a_detach_that_cannot_complete_ends_with_the_stream_blocked(
    rig: DomainRig,
    trouble: Callable[[DomainRig], Callable[[], object]],
    ends: list[Step],
    status: NtStatus,
) -> None:
    remapping, device = rig.remapping, DmaDevice("pci", STREAM, ats=True)
    domain, other = rig.domain(address=DATA), rig.domain(address=DATA + PAGE)
    rig.smmu.connect(STREAM, Function())
    rig.attach(domain, device)
    cached = rig.smmu.ats_translate(Access(STREAM), IOVA).address
    end_of_trouble = trouble(rig)
    for last in ends:
        rig.seen.clear()
        started = monotonic()
        assert remapping.detach_device(domain, device) is status
        # One time-out of 0.02 s, on a machine that may have other things to do.
        assert monotonic() - started < 2
        *_, step, end = rig.seen
        assert isinstance(step, DetachStepped)
        assert isinstance(end, DeviceDetached)
        assert (step.step, step.status, end.status) == (last, status, status)
        assert rig.config(STREAM) is SteConfig.ABORT
        assert remapping.state(device) is AttachmentState.BLOCKED
    if ends[0] is Step.INVALIDATE_ATC:
        # What the function remembers is of no use to it.
        assert rig.reaches(STREAM) is None
        with pytest.raises(TransactionAborted):
            translated(rig, cached)
    # It is still in the domain, and nowhere else.
    assert remapping.attach_device(domain, device) is NtStatus.INVALID_DEVICE_STATE
    assert remapping.attach_device(other, device) is NtStatus.INVALID_DEVICE_STATE
    assert remapping.detach_device(other, device) is NtStatus.INVALID_PARAMETER_MIX
    assert remapping.delete_domain(domain) is NtStatus.RESOURCE_IN_USE
    # The next detach goes through all steps again; then all is as ever.
    end_of_trouble()
    rig.seen.clear()
    rig.detach(domain, device)
    assert rig.steps == [*STEPS[:-1], "invalidate-atc", STEPS[-1]]
    rig.attach(other, device)
    assert rig.reaches(STREAM) == DATA + PAGE
    assert int(rig.driver.global_errors()) == 0


def translated(rig: DomainRig, address: int) -> None:
    rig.smmu.retire(rig.smmu.translated(Access(STREAM, write=True), array("Q", (address, 8))))


def test_an_unmap_that_a_function_ignores_says_so(rig: DomainRig) -> None:
    domain, device = rig.domain(address=DATA), DmaDevice("pci", STREAM, ats=True)
    rig.attach(domain, device)
    _ignore_invalidations(rig)
    status = rig.remapping.unmap_logical_range(domain, IOVA, 1)
    assert status is NtStatus.DEVICE_UNRESPONSIVE
    assert rig.reaches(STREAM) is None
    assert rig.remapping.flush_domain(domain) is NtStatus.DEVICE_UNRESPONSIVE


def test_a_function_that_does_not_answer_is_no_others_trouble(rig: DomainRig) -> None:
    """The CMD_SYNC behind what it ignored fails while the next detach waits for its own."""
    domain, mute, other = rig.domain(), DmaDevice("mute", STREAM, ats=True), DmaDevice("pci", 0x18)
    rig.attach(domain, mute)
    rig.attach(domain, other)
    _ignore_for_ever(rig)
    assert rig.remapping.detach_device(domain, mute) is NtStatus.IO_TIMEOUT

    def give_up() -> None:
        rig.smmu.give_up()
        rig.smmu.step()

    rig.while_polling = give_up
    rig.detach(domain, other)
    assert rig.remapping.detach_device(domain, mute) is NtStatus.DEVICE_UNRESPONSIVE
