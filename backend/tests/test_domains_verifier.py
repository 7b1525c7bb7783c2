"""Calls on one device that overlap are caught, both callers are named, and the tables stay as the first makes them."""

from collections.abc import Callable
from threading import Event, Thread

import pytest

from tests.domain_rig import IOVA, DomainRig
from tests.driver_rig import DATA, PAGE
from viommu.driver.domains import (
    AttachmentState,
    Caller,
    ConcurrentCalls,
    DmaDevice,
    DmaDomain,
    Fault,
    FaultConfiguration,
    NtStatus,
)
from viommu.driver.queues import Completion
from viommu.layouts.tables import SteConfig
from viommu.smmu import Access

STREAM = 0x10
NOBODY = FaultConfiguration(lambda fault: None)
Call = Callable[[DomainRig, DmaDomain, DmaDevice], NtStatus]

CALLS: dict[str, Call] = {
    "attach_device": lambda rig, domain, device: rig.remapping.attach_device(domain, device),
    "detach_device": lambda rig, domain, device: rig.remapping.detach_device(domain, device),
    "set_device_fault_reporting": lambda rig, domain, device: (
        rig.remapping.set_device_fault_reporting(device, 0, True, NOBODY)
    ),
}


@pytest.fixture
def rig() -> DomainRig:
    return DomainRig(timeout=5)


@pytest.fixture
def device() -> DmaDevice:
    return DmaDevice("pci", STREAM)


def violations(rig: DomainRig) -> list[ConcurrentCalls]:
    return [event for event in rig.seen if isinstance(event, ConcurrentCalls)]


def hold(rig: DomainRig) -> tuple[Event, Event]:
    """A detach from now on waits for a transaction: it is `inside` then, until it may `go_on`."""
    inside, go_on = Event(), Event()
    flying = rig.smmu.translate(Access(STREAM, write=True), IOVA, 64)

    def wait() -> None:
        inside.set()
        if go_on.wait(0.001):
            rig.smmu.retire(flying)
        rig.smmu.step()

    rig.while_polling = wait
    return inside, go_on


@pytest.mark.parametrize("second", CALLS)
def test_two_threads(rig: DomainRig, device: DmaDevice, second: str) -> None:
    domain = rig.domain(address=DATA)
    rig.attach(domain, device)
    inside, go_on = hold(rig)
    results: list[NtStatus] = []
    first = Thread(
        target=lambda: results.append(rig.remapping.detach_device(domain, device)), name="remover"
    )
    first.start()
    assert inside.wait(5)
    assert CALLS[second](rig, domain, device) is NtStatus.VERIFIER_STOP
    go_on.set()
    first.join(5)
    # The first went on as if nothing had been.
    assert results == [NtStatus.SUCCESS]
    assert rig.config(STREAM) is SteConfig.ABORT
    assert rig.remapping.state(device) is AttachmentState.DETACHED
    assert rig.reaches(STREAM) is None
    (violation,) = violations(rig)
    assert violation.device == "pci"
    assert (violation.first.call, violation.second.call) == ("detach_device", second)
    assert (violation.first.thread, violation.second.thread) == ("remover", "MainThread")
    for caller in (violation.first, violation.second):
        place, function = caller.place.split(" ")
        path, line = place.rsplit(":", 1)
        assert path == __file__
        assert int(line) > 0
        assert "<lambda>" in function
    assert str(violation.second) == f"{second} from {violation.second.place} in MainThread"
    # And the device can be used again.
    rig.attach(domain, device)
    assert rig.reaches(STREAM) == DATA


def test_other_devices_take_their_turn(rig: DomainRig, device: DmaDevice) -> None:
    domain, other = rig.domain(address=DATA), DmaDevice("other", 0x18)
    rig.attach(domain, device)
    inside, go_on = hold(rig)
    first = Thread(target=lambda: rig.detach(domain, device))
    first.start()
    assert inside.wait(5)
    second = Thread(target=lambda: rig.attach(domain, other))
    second.start()
    second.join(0.02)
    assert second.is_alive()  # it waits: there is one command queue
    go_on.set()
    for thread in (first, second):
        thread.join(5)
    assert violations(rig) == []
    assert (rig.reaches(STREAM), rig.reaches(0x18)) == (None, DATA)


@pytest.mark.parametrize("inner", CALLS)
def test_a_call_from_within_a_call(rig: DomainRig, device: DmaDevice, inner: str) -> None:
    """From what runs while the driver waits."""
    domain = rig.domain(address=DATA)
    rig.attach(domain, device)
    flying = rig.smmu.translate(Access(STREAM, write=True), IOVA, 64)
    results: list[NtStatus] = []

    def reenter() -> None:
        if not results:
            results.append(CALLS[inner](rig, domain, device))
            rig.smmu.retire(flying)
        rig.smmu.step()

    rig.while_polling = reenter
    rig.detach(domain, device)
    assert results == [NtStatus.VERIFIER_STOP]
    (violation,) = violations(rig)
    assert violation.second == Caller(inner, violation.second.place, "MainThread")
    assert rig.reaches(STREAM) is None


@pytest.mark.parametrize("completion", list(Completion))
def test_another_device_from_within_a_call(completion: Completion) -> None:
    """That is allowed, and two CMD_SYNCs then wait for the same queue."""
    rig, device, other = DomainRig(timeout=5), DmaDevice("pci", STREAM), DmaDevice("other", 0x18)
    rig.driver.reset(rig.driver.linear_table(8), completion=completion)
    domain = rig.domain(address=DATA)
    rig.attach(domain, device)
    flying = rig.smmu.translate(Access(STREAM, write=True), IOVA, 64)
    results: list[NtStatus] = []

    def reenter() -> None:
        if not results:
            results.append(NtStatus.SUCCESS)
            rig.smmu.retire(flying)
            results[0] = rig.remapping.attach_device(domain, other)
        rig.smmu.step()

    rig.while_polling = reenter
    rig.detach(domain, device)
    assert results == [NtStatus.SUCCESS]
    assert violations(rig) == []
    assert (rig.reaches(STREAM), rig.reaches(0x18)) == (None, DATA)


def test_a_handler_may_not_call_back_into_the_detach_that_called_it(
    rig: DomainRig, device: DmaDevice
) -> None:
    domain = rig.domain()
    rig.attach(domain, device)
    results: list[NtStatus] = []

    def handle(fault: Fault) -> None:
        results.append(rig.remapping.detach_device(domain, device))

    config = FaultConfiguration(handle)
    assert rig.remapping.set_device_fault_reporting(device, 0, True, config).success
    assert rig.reaches(STREAM) is None
    rig.detach(domain, device)
    assert results == [NtStatus.VERIFIER_STOP]
    # From `service_faults`, which is no call on a device, it may.
    rig.attach(domain, device)
    assert rig.remapping.set_device_fault_reporting(device, 0, True, config).success
    assert rig.reaches(STREAM) is None
    rig.remapping.service_faults()
    assert results == [NtStatus.VERIFIER_STOP, NtStatus.SUCCESS]
    assert rig.remapping.state(device) is AttachmentState.DETACHED


def test_many_threads_at_once(rig: DomainRig, device: DmaDevice) -> None:
    """Whoever comes first is served; every refusal is reported; what is left is one consistent state."""
    one, two = rig.domain(address=DATA), rig.domain(address=DATA + PAGE)
    results: list[NtStatus] = []

    def use(domain: DmaDomain) -> None:
        for _ in range(100):
            results.append(rig.remapping.attach_device(domain, device))
            results.append(CALLS["set_device_fault_reporting"](rig, domain, device))
            results.append(rig.remapping.detach_device(domain, device))

    threads = [Thread(target=use, args=(domain,)) for domain in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 600
    assert results.count(NtStatus.VERIFIER_STOP) == len(violations(rig))
    assert set(results) <= {
        NtStatus.SUCCESS,
        NtStatus.VERIFIER_STOP,
        NtStatus.INVALID_DEVICE_STATE,
        NtStatus.INVALID_PARAMETER_1,
        NtStatus.INVALID_PARAMETER_2,
        NtStatus.INVALID_PARAMETER_MIX,
        NtStatus.ALREADY_DISCONNECTED,
        NtStatus.DEVICE_ALREADY_ATTACHED,
    }
    for domain in (one, two):
        if rig.remapping.detach_device(domain, device) is NtStatus.SUCCESS:
            break
    assert rig.reaches(STREAM) is None
    for domain, address in ((one, DATA), (two, DATA + PAGE)):
        rig.attach(domain, device)
        assert rig.reaches(STREAM) == address
        rig.detach(domain, device)
        assert rig.remapping.delete_domain(domain) is NtStatus.SUCCESS
