"""What becomes of an endpoint at host level when the host SMMU does not come to an end."""

from collections.abc import Callable

import pytest

from viommu.driver.domains import AttachmentState, NtStatus
from viommu.endpoints.port import DmaFault, DmaPort
from viommu.host import EndpointState, HostDomains
from viommu.memory import GuestMemory
from viommu.smmu import Smmu
from viommu.stack import Filter, FilterDevice, Request
from viommu.stack.path import FilteredPath
from viommu.trace import Tracer

RAM, PAGE = 0x4000_0000, 0x1000
OK = NtStatus.SUCCESS


class Two:
    """Two endpoints, behind a guest's SMMU that is off, or none. `work` runs while the host's driver waits."""

    def __init__(self, guest: Smmu | None = None) -> None:
        self.ram, memory = bytearray(4 * PAGE), GuestMemory()
        memory.add_region(RAM, len(self.ram), memoryview(self.ram))
        self.ports = {
            name: DmaPort(memory, stream_id, guest)
            for name, stream_id in (("one", 0x10), ("two", 0x18))
        }
        for port in self.ports.values():
            port.bus_master = True
        self.work: Callable[[], object] = lambda: None
        self.host = HostDomains(self.ports, lambda: self._work(), Tracer(), timeout=0.1)

    def _work(self) -> None:
        self.work()

    def lands(self) -> bool:
        """Whether the DMA of `one` reaches memory."""
        try:
            with self.ports["one"].begin(RAM, 4, write=True) as transfer:
                transfer.write_from(b"here")
        except DmaFault:
            return False
        return self.ram[:4] == b"here"

    @property
    def state(self) -> EndpointState:
        return self.host.endpoints()[0].state


@pytest.fixture
def two() -> Two:
    return Two()


def test_an_attach_that_was_undone_in_time_blocks_too(two: Two) -> None:
    host = two.host
    for domain in ("everything", "nothing"):
        assert host.create(domain) is OK
    assert host.map_identity("everything") is OK
    assert host.attach("two", "everything") is OK
    device = host.device("one")
    assert device is not None
    slow = two.ports["two"].begin(RAM, 4, write=True)

    def end_too_late() -> None:
        if host.remapping.state(device) is AttachmentState.BLOCKED:
            slow.done()

    two.work = end_too_late
    assert host.attach("one", "nothing") is NtStatus.IO_TIMEOUT
    assert (two.state, host.endpoints()[0].domain) == (EndpointState.BLOCKED, None)
    assert not two.lands()
    assert host.attach("one", "everything") is OK
    assert two.lands()


def test_who_is_not_blocked_any_more_passes_by_whatever_the_smmu_says(two: Two) -> None:
    stuck = two.ports["one"].begin(RAM, 4, write=True)
    assert two.host.block("one") is NtStatus.IO_TIMEOUT
    assert (two.state, two.lands()) == (EndpointState.BLOCKED, False)
    assert two.host.unblock("one") is OK
    assert (two.state, two.lands()) == (EndpointState.PASS_THROUGH, True)
    stuck.done()
    assert two.host.block("one") is OK
    assert (two.state, two.lands()) == (EndpointState.BLOCKED, False)


class Alias(Filter):
    """Sends everything out as the other endpoint's."""

    def before_translation(self, request: Request) -> None:
        request.access = request.access._replace(stream_id=0x18)


@pytest.mark.parametrize("guest", [False, True])
def test_what_a_filter_sends_out_as_anothers_is_the_endpoints_own(guest: bool) -> None:
    two = Two(Smmu(GuestMemory()) if guest else None)
    port = two.ports["one"]
    alias = FilterDevice("alias", Alias())
    port.path = FilteredPath(port, [alias], Tracer())
    own = port.begin(RAM, 4, write=True)
    assert (port.in_flight, len(port.transactions)) == (1, 1)
    assert two.ports["two"].transactions == []
    assert two.host.block("two") is OK
    assert two.host.block("one") is NtStatus.IO_TIMEOUT
    own.done()
    assert port.transactions == []
    assert two.host.block("one") is OK
