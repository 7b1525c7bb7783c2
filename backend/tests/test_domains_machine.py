"""Random sequences of calls against a simple reference: the statuses, and whether and where DMA goes through."""

from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from tests.domain_rig import DomainRig, acpi_device
from tests.driver_rig import DATA, PAGE
from viommu.driver.domains import (
    ContiguousRange,
    DmaDevice,
    DmaDomain,
    DomainConfiguration,
    DomainType,
    FaultConfiguration,
    NtStatus,
)
from viommu.driver.page_tables import READ_WRITE, PageTable

PAGES = 3
BASES = st.integers(0, 4)
SOMEBODY = FaultConfiguration(lambda fault: None)


class Group(NamedTuple):
    device: str
    base: int
    domain: int


class Reference:
    """What the calls should do, told by dictionaries."""

    def __init__(self) -> None:
        self.kinds: dict[int, DomainType] = {}
        self.pages: dict[int, dict[int, int] | None] = {}
        """By domain the frame of each page; None blocks."""
        self.streams: dict[tuple[str, int], Group] = {}
        """By device and input ID."""
        self.left: dict[tuple[str, int], int] = {}

    def attach(self, domain: int, device: str, ids: set[int], base: int, count: int) -> NtStatus:
        wanted = set(range(base, base + count))
        if domain not in self.kinds:
            return NtStatus.INVALID_HANDLE
        if base not in ids:
            return NtStatus.INVALID_PARAMETER_3
        if not wanted or not wanted <= ids:
            return NtStatus.INVALID_PARAMETER_4
        taken = [
            self.streams[device, each] for each in sorted(wanted) if (device, each) in self.streams
        ]
        if taken:
            same = taken[0].domain == domain
            return NtStatus.DEVICE_ALREADY_ATTACHED if same else NtStatus.INVALID_DEVICE_STATE
        for each in wanted:
            self.streams[device, each] = Group(device, base, domain)
        return NtStatus.SUCCESS

    def detach(self, domain: int, device: str, ids: set[int], base: int) -> NtStatus:
        if domain not in self.kinds:
            return NtStatus.INVALID_HANDLE
        if base not in ids:
            return NtStatus.INVALID_PARAMETER_3
        group = self.streams.get((device, base))
        if group is None:
            if self.left.get((device, base)) == domain:
                return NtStatus.ALREADY_DISCONNECTED
            own = {(g.device, g.domain) for g in self.streams.values()}
            inside = (device, domain) in own
            return NtStatus.INVALID_PARAMETER_3 if inside else NtStatus.INVALID_PARAMETER_2
        if group.domain != domain:
            return NtStatus.INVALID_PARAMETER_MIX
        if group.base != base:
            return NtStatus.FREE_VM_NOT_AT_BASE
        self.streams = {key: each for key, each in self.streams.items() if each != group}
        self.left[device, base] = domain
        return NtStatus.SUCCESS

    def report(self, device: str, ids: set[int], base: int) -> NtStatus:
        group = self.streams.get((device, base))
        if group is not None:
            return NtStatus.SUCCESS if group.base == base else NtStatus.FREE_VM_NOT_AT_BASE
        attached = any(each.device == device for each in self.streams.values())
        wrong = attached or base not in ids
        return NtStatus.INVALID_PARAMETER_2 if wrong else NtStatus.INVALID_PARAMETER_1

    def reaches(self, group: Group | None, page: int) -> tuple[int, int | None]:
        """The address by which a stream asks for `page`, and where that leads."""
        if group is None:
            return page * PAGE, None
        if self.kinds[group.domain] is DomainType.PASS_THROUGH:
            return DATA + page * PAGE, DATA + page * PAGE
        return page * PAGE, (self.pages[group.domain] or {}).get(page)


class Calls(RuleBasedStateMachine):
    domains: Bundle[DmaDomain] = Bundle("domains")
    devices: Bundle[DmaDevice] = Bundle("devices")

    def __init__(self) -> None:
        super().__init__()
        self.rig = DomainRig()
        self.reference = Reference()
        self.all = [acpi_device(), DmaDevice("pci", 0x10)]

    @initialize(target=devices)
    def begin(self) -> DmaDevice:
        return multiple(*self.all)  # type: ignore[return-value]

    @rule(target=domains, kind=st.sampled_from(DomainType))
    def create(self, kind: DomainType) -> DmaDomain:
        domain = self.rig.domain(kind)
        self.reference.kinds[domain.number] = kind
        managed = kind is DomainType.TRANSLATE
        self.reference.pages[domain.number] = {} if managed else None
        return domain

    @rule(domain=domains, frame=st.integers(0, 7), page=st.integers(0, PAGES - 1))
    def configure(self, domain: DmaDomain, frame: int, page: int) -> None:
        table = PageTable(self.rig.arena, input_bits=39)
        table.map(page * PAGE, DATA + frame * PAGE, PAGE)
        configuration = DomainConfiguration(ttbr0=table.root, input_size0=39)
        kind = self.reference.kinds.get(domain.number)
        expected = {
            None: NtStatus.INVALID_HANDLE,
            DomainType.UNMANAGED: NtStatus.SUCCESS,
        }.get(kind, NtStatus.INVALID_PARAMETER_1)
        assert self.rig.remapping.configure_domain(domain, configuration) is expected
        if expected.success:
            self.reference.pages[domain.number] = {page: DATA + frame * PAGE}

    @rule(domain=domains, page=st.integers(0, PAGES - 1), frame=st.integers(0, 7))
    def map(self, domain: DmaDomain, page: int, frame: int) -> None:
        kind, pages = self._managed(domain)
        expected = (
            kind or (pages is not None and page in pages and NtStatus.CONFLICTING_ADDRESSES)
        ) or NtStatus.SUCCESS
        physical = ContiguousRange(DATA + frame * PAGE, PAGE)
        status = self.rig.remapping.map_logical_range(domain, READ_WRITE, physical, page * PAGE)
        assert status is expected
        if status.success and pages is not None:
            pages[page] = physical.base

    @rule(domain=domains, page=st.integers(0, PAGES - 1))
    def unmap(self, domain: DmaDomain, page: int) -> None:
        kind, pages = self._managed(domain)
        expected = (
            kind or (pages is not None and page not in pages and NtStatus.NOT_MAPPED_VIEW)
        ) or NtStatus.SUCCESS
        status = self.rig.remapping.unmap_logical_range(domain, page * PAGE, 1)
        assert status is expected
        if status.success and pages is not None:
            del pages[page]

    def _managed(self, domain: DmaDomain) -> tuple[NtStatus | None, dict[int, int] | None]:
        kind = self.reference.kinds.get(domain.number)
        if kind is None:
            return NtStatus.INVALID_HANDLE, None
        if kind is not DomainType.TRANSLATE:
            return NtStatus.INVALID_PARAMETER_1, None
        return None, self.reference.pages[domain.number]

    @rule(domain=domains, device=devices, base=BASES, count=st.integers(0, 3))
    def attach(self, domain: DmaDomain, device: DmaDevice, base: int, count: int) -> None:
        status = self.rig.remapping.attach_device(domain, device, base, count)
        ids = set(device.streams)
        assert status is self.reference.attach(domain.number, device.name, ids, base, count)

    @rule(domain=domains, device=devices, base=BASES)
    def detach(self, domain: DmaDomain, device: DmaDevice, base: int) -> None:
        status = self.rig.remapping.detach_device(domain, device, base)
        ids = set(device.streams)
        assert status is self.reference.detach(domain.number, device.name, ids, base)

    @rule(device=devices, base=BASES)
    def report(self, device: DmaDevice, base: int) -> None:
        status = self.rig.remapping.set_device_fault_reporting(device, base, True, SOMEBODY)
        assert status is self.reference.report(device.name, set(device.streams), base)

    @rule(domain=domains)
    def delete(self, domain: DmaDomain) -> None:
        self._delete(domain)

    @rule(domain=consumes(domains))
    def forget(self, domain: DmaDomain) -> None:
        self._delete(domain)

    def _delete(self, domain: DmaDomain) -> None:
        if domain.number not in self.reference.kinds:
            expected = NtStatus.INVALID_HANDLE
        elif any(group.domain == domain.number for group in self.reference.streams.values()):
            expected = NtStatus.RESOURCE_IN_USE
        else:
            expected = NtStatus.SUCCESS
            del self.reference.kinds[domain.number]
        assert self.rig.remapping.delete_domain(domain) is expected

    @invariant()
    def dma_goes_where_the_reference_says(self) -> None:
        for device in self.all:
            for input_id, stream_id in device.streams.items():
                group = self.reference.streams.get((device.name, input_id))
                for page in range(PAGES):
                    iova, expected = self.reference.reaches(group, page)
                    assert self.rig.reaches(stream_id, iova) == expected
        self.rig.driver.events()
        assert int(self.rig.driver.global_errors()) == 0


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
