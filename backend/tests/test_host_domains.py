"""Domains at host level, on a server whose clients know nothing of them."""

import json
import mmap
from collections.abc import Iterator

import pytest

from tests.host_server_rig import (
    ATTACHED,
    BLOCKED,
    MIB,
    OK,
    PAGE,
    PASS_THROUGH,
    fill,
    identity,
    pattern,
    served,
    state,
)
from tests.server_rig import BASE, ERROR, HALTED, RAM, Function, Machine
from viommu.driver.access import Poll
from viommu.driver.arena import Arena
from viommu.driver.domains import DomainConfiguration, DomainType, Fault, FaultType, NtStatus
from viommu.driver.page_tables import PageTable
from viommu.driver.smmu import SmmuDriver
from viommu.endpoints.port import DmaRefused
from viommu.host import HostDomains, HostEndpoint
from viommu.host.domains import HostDomain, HostFault
from viommu.layouts.test_engine import UserFrame


@pytest.fixture
def machine() -> Iterator[Machine]:
    yield from served()


@pytest.fixture
def host(machine: Machine) -> HostDomains:
    return machine.server.host


@pytest.fixture
def engine(machine: Machine) -> Function:
    return machine.connect("engine0", bus_master=True)


def host_events(machine: Machine) -> list[str]:
    """The kinds of the events of the host SMMU and of its domains."""
    return [
        each.as_dict()["event"]["kind"]
        for each in machine.events
        if each.kind in ("HostSmmuEvent", "HostDomainEvent")
    ]


# Pass-through


def test_at_first_everything_passes_by(machine: Machine, engine: Function) -> None:
    fill(engine)
    machine.run()
    assert engine.status() == HALTED
    assert machine.ram[:MIB] == pattern(MIB)
    assert host_events(machine) == [], "there is no host SMMU until somebody asks for it"
    assert machine.server.host.endpoints() == [
        HostEndpoint("engine0", 0x10, PASS_THROUGH, None),
        HostEndpoint("engine1", 0x18, PASS_THROUGH, None),
    ]
    assert len(host_events(machine)) > 0


def test_an_endpoint_that_nobody_touched_is_not_looked_at(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    other = machine.connect("engine1", bus_master=True)
    identity(host)
    assert host.attach("engine0", "d") is OK
    assert host.block("engine0") is OK
    before = len(host_events(machine))
    fill(other)
    machine.run()
    assert other.status() == HALTED
    assert len(host_events(machine)) == before


# Attach


def test_an_endpoint_comes_and_goes_while_it_works(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    """From pass-through into a domain that maps everything no transaction is lost."""
    identity(host)
    fill(engine)
    for _ in range(100):
        machine.server.turn()
    assert host.attach("engine0", "d") is OK
    assert state(host) is ATTACHED
    machine.run()
    assert engine.status() == HALTED
    assert machine.ram[:MIB] == pattern(MIB)
    assert "Translated" in host_events(machine)
    assert not any(isinstance(each, DmaRefused) for each in machine.events)


def test_where_a_domain_sends_an_endpoint(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    assert host.create("d") is OK
    assert host.map("d", BASE, BASE + 2 * MIB, MIB) is OK
    assert host.attach("engine0", "d") is OK
    fill(engine)
    machine.run()
    assert engine.status() == HALTED
    assert machine.ram[2 * MIB : 3 * MIB] == pattern(MIB)
    assert machine.ram[:MIB] == bytes(MIB)


def test_a_page_that_is_left_out(machine: Machine, host: HostDomains, engine: Function) -> None:
    hole = BASE + 5 * PAGE
    identity(host, "d", hole)
    assert host.attach("engine0", "d") is OK
    fill(engine, rate=0)
    machine.run()
    assert (engine.status(), engine.field(UserFrame.udata2)) == (ERROR, hole)
    assert machine.ram[: 5 * PAGE] == pattern(5 * PAGE), "the bytes before it moved"
    assert machine.ram[5 * PAGE : MIB] == bytes(MIB - 5 * PAGE)
    assert host.faults() == [HostFault("engine0", "d", "TRANSLATION", hole, write=True)]
    assert host.faults() == []
    refused = next(each for each in machine.events if isinstance(each, DmaRefused))
    assert refused.why == f"host SMMU, stream 0x10: abort at {hole:#x}: F_TRANSLATION"
    # What was left out can be mapped later, and goes again as it came.
    assert host.map("d", hole, hole, PAGE, write=False) is OK
    fill(engine)
    machine.run()
    assert [each.fault for each in host.faults()] == ["PERMISSION"]
    assert host.unmap("d", hole, PAGE) is OK


def test_detached_and_attached_again(machine: Machine, host: HostDomains, engine: Function) -> None:
    identity(host)
    for _ in range(3):
        assert host.attach("engine0", "d") is OK
        fill(engine)
        machine.run()
        assert engine.status() == HALTED
        assert machine.ram[:MIB] == pattern(MIB)
        machine.ram[:MIB] = bytes(MIB)
        assert host.detach("engine0", "d") is OK
        fill(engine)
        machine.run()
        assert (engine.status(), state(host)) == (ERROR, BLOCKED)
        assert machine.ram[:MIB] == bytes(MIB)
    assert host.unblock("engine0") is OK
    fill(engine)
    machine.run()
    assert (engine.status(), state(host)) == (HALTED, PASS_THROUGH)


def test_a_domain_without_translation(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    assert host.create("open", DomainType.PASS_THROUGH) is OK
    assert host.block("engine0") is OK
    assert host.attach("engine0", "open") is OK
    fill(engine)
    machine.run()
    assert (engine.status(), state(host)) == (HALTED, ATTACHED)
    assert "Translated" in host_events(machine)


def test_a_domain_whose_tables_are_somebody_elses(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    assert host.create("own", DomainType.UNMANAGED) is OK
    assert host.attach("engine0", "own") is OK
    fill(engine)
    machine.run()
    assert engine.status() == ERROR, "a domain blocks until it is configured"
    table = PageTable(host.host.memory, input_bits=40)
    table.map(BASE, BASE, RAM)
    domain = host.domain("own")
    assert domain is not None
    configuration = DomainConfiguration(ttbr0=table.root, input_size0=40)
    assert host.remapping.configure_domain(domain, configuration) is OK
    fill(engine)
    machine.run()
    assert engine.status() == HALTED


# Behind the guest's own SMMU


class GuestRegisters:
    """The registers of the guest's SMMU as a driver in the guest reaches them."""

    def __init__(self, client: Function) -> None:
        self._client = client

    def read32(self, offset: int) -> int:
        return self._client.get(offset)

    def write32(self, offset: int, value: int) -> None:
        self._client.put(offset, value)

    def read64(self, offset: int) -> int:
        return self._client.get(offset, 8)

    def write64(self, offset: int, value: int) -> None:
        self._client.put(offset, value, 8)


def test_the_guests_smmu_and_then_the_hosts(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    """The guest turns two pages round, the host sends one of them elsewhere."""
    tables = memoryview(mmap.mmap(machine.fd, RAM))[2 * MIB :]

    def turn() -> None:
        machine.server.turn()

    guest = SmmuDriver(
        GuestRegisters(machine.connect("smmu", bus_master=True)),
        Arena([(BASE + 2 * MIB, tables)]),
        Poll(relax=turn),
    )
    guest.reset()
    domain = guest.create_domain()
    domain.map_pages(0x1_0000, [BASE + PAGE, BASE])
    guest.attach(0x10, domain)

    identity(host, "d", BASE)
    assert host.map("d", BASE, BASE + MIB, PAGE) is OK
    assert host.attach("engine0", "d") is OK
    fill(engine, 2 * PAGE, at=0x1_0000)
    machine.run()
    assert engine.status() == HALTED
    expected = pattern(2 * PAGE, 0x1_0000)
    assert machine.ram[PAGE : 2 * PAGE] == expected[:PAGE]
    assert machine.ram[MIB : MIB + PAGE] == expected[PAGE:]
    assert machine.ram[:PAGE] == bytes(PAGE)

    # Each SMMU has a word to say, and says it to its own software.
    fill(engine, 3 * PAGE, at=0x1_0000)
    machine.run()
    assert engine.field(UserFrame.udata2) == 0x1_2000
    assert [each.event.name for each in guest.events()] == ["F_TRANSLATION"]
    assert host.faults() == []
    assert host.unmap("d", BASE, PAGE) is OK
    fill(engine, 2 * PAGE, at=0x1_0000)
    machine.run()
    assert engine.field(UserFrame.udata2) == 0x1_1000
    assert guest.events() == []
    assert [(each.fault, each.address) for each in host.faults()] == [("TRANSLATION", BASE)]

    # The guest's detach is as good as ever.
    fill(engine, PAGE, at=0x1_0000)
    machine.server.turn()
    guest.detach(0x10)
    image = machine.ram[: 2 * MIB]
    machine.run()
    assert machine.ram[: 2 * MIB] == image


def test_a_map_of_everything_that_is_refused_maps_nothing(host: HostDomains) -> None:
    assert host.create("d") is OK
    assert host.map_identity("d", [(BASE, 100)]) is NtStatus.INVALID_PARAMETER_3
    assert host.domains()[0].mappings == 0
    assert host.map("d", BASE + PAGE, BASE, PAGE) is OK
    assert host.map_identity("d", [(BASE, PAGE)]) is NtStatus.CONFLICTING_ADDRESSES
    assert host.domains()[0].mappings == 1
    assert host.map_identity("d", [(BASE, 2 * PAGE)]) is OK


# Waiting


def test_nothing_is_taken_from_a_client_while_the_host_waits(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    other = machine.connect("engine1", bus_master=True)
    other.fill(PAGE, at=BASE + MIB)
    fill(engine)
    for _ in range(5):
        machine.server.turn()
    other.post(0, 0, HALTED.RAND48.to_bytes(4, "little"))
    machine.events.clear()
    assert host.block("engine0") is OK
    assert "DmaMoved" in machine.kinds(), "it waited"
    assert "EngineStarted" not in machine.kinds()
    machine.run()
    assert other.status() == HALTED
    assert "EngineStarted" in machine.kinds()


def test_what_does_not_end_is_a_timeout_and_a_block(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    port = host.host.ports["engine0"]
    stuck = port.begin(BASE, PAGE, write=True)
    assert host.block("engine0") is NtStatus.IO_TIMEOUT
    assert state(host) is BLOCKED
    fill(engine)
    machine.run()
    assert engine.status() == ERROR
    stuck.done()
    assert host.block("engine0") is OK
    # And in a domain: half-way out of it, until the next try.
    identity(host)
    assert host.attach("engine0", "d") is OK
    stuck = port.begin(BASE, PAGE, write=True)
    assert host.detach("engine0", "d") is NtStatus.IO_TIMEOUT
    assert host.endpoints()[0] == HostEndpoint("engine0", 0x10, BLOCKED, "d")
    assert host.unblock("engine0") is NtStatus.INVALID_DEVICE_STATE
    assert host.delete("d") is NtStatus.RESOURCE_IN_USE
    stuck.done()
    assert host.detach("engine0", "d") is OK


def test_an_attach_that_waits_in_vain_blocks(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    """What went out before it might land where the domain lets nothing go."""
    identity(host)
    stuck = host.host.ports["engine0"].begin(BASE, PAGE, write=True)
    assert host.attach("engine0", "d") is NtStatus.IO_TIMEOUT
    assert state(host) is BLOCKED
    stuck.done()
    assert host.block("engine0") is OK
    assert host.unblock("engine0") is OK


# What the guest does, and what the host knows


@pytest.mark.parametrize("how", ["reset", "another client"])
def test_resets_and_clients_come_and_go_and_the_host_domains_stay(
    machine: Machine, host: HostDomains, engine: Function, how: str
) -> None:
    identity(host, "d", BASE + PAGE)
    assert host.attach("engine0", "d") is OK
    fill(engine)
    for _ in range(5):
        machine.server.turn()
    if how == "reset":
        engine.reset()
        engine.set_bus_master(True)
    else:
        engine.close()
        for _ in range(50):
            machine.server.turn()
        engine = machine.connect("engine0", bus_master=True)
    assert state(host) is ATTACHED
    fill(engine)
    machine.run()
    assert engine.field(UserFrame.udata2) == BASE + PAGE
    assert host.detach("engine0", "d") is OK, "nothing of before is in flight"


def test_whoever_wants_to_hear_of_faults_does(
    machine: Machine, host: HostDomains, engine: Function
) -> None:
    heard: list[tuple[str, Fault]] = []
    host.on_fault = lambda endpoint, fault: heard.append((endpoint, fault))
    assert host.create("nothing") is OK
    assert host.attach("engine0", "nothing") is OK
    fill(engine)
    machine.run()
    ((name, fault),) = heard
    assert (name, fault.type, fault.address, fault.write) == (
        "engine0",
        FaultType.TRANSLATION,
        BASE,
        True,
    )
    assert host.detach("engine0", "nothing") is OK
    fill(engine)
    machine.run()
    assert len(heard) == 1, "what is blocked is aborted in silence"


def test_the_trace_has_it_all(machine: Machine, host: HostDomains, engine: Function) -> None:
    assert host.create("d") is OK
    assert host.attach("engine0", "d") is OK
    fill(engine)
    machine.run()
    assert host.detach("engine0", "d") is OK
    kinds = host_events(machine)
    assert [each for each in kinds if each.startswith(("Device", "Domain", "Detach"))] == [
        "DomainChanged",
        "DeviceAttached",
        *["DetachStepped"] * 5,
        "DeviceDetached",
    ]
    assert {"CommandConsumed", "SyncCompleted", "EventRecorded", "Aborted"} < set(kinds)
    own = [each for each in machine.kinds() if not each.startswith("Host")]
    assert not {"CommandConsumed", "SyncCompleted", "EventRecorded", "Aborted"} & set(own)
    assert "HostFault" in machine.kinds()
    for event in machine.events:
        json.dumps(event.as_dict())


def test_statuses(machine: Machine, host: HostDomains) -> None:
    assert host.create("d") is OK
    assert host.create("d") is NtStatus.RESOURCE_IN_USE
    for call in (
        host.delete("x"),
        host.map("x", 0, 0, PAGE),
        host.map_identity("x"),
        host.unmap("x", 0, PAGE),
        host.flush("x"),
        host.attach("engine0", "x"),
        host.detach("engine0", "x"),
    ):
        assert call is NtStatus.INVALID_HANDLE
    for call in (
        host.attach("smmu", "d"),
        host.detach("smmu", "d"),
        host.block("smmu"),
        host.unblock("smmu"),
    ):
        assert call is NtStatus.NO_SUCH_DEVICE
    assert host.map_identity("d") is OK
    assert host.map("d", BASE, BASE, PAGE) is NtStatus.CONFLICTING_ADDRESSES
    assert host.unmap("d", BASE, PAGE) is NtStatus.FREE_VM_NOT_AT_BASE
    assert host.unmap("d", BASE, 5) is NtStatus.INVALID_PARAMETER_3
    assert host.flush("d") is OK
    assert host.detach("engine0", "d") is NtStatus.INVALID_PARAMETER_2
    assert host.attach("engine0", "d") is OK
    assert host.attach("engine0", "d") is NtStatus.DEVICE_ALREADY_ATTACHED
    assert host.create("e") is OK
    assert host.attach("engine0", "e") is NtStatus.INVALID_DEVICE_STATE
    assert host.detach("engine0", "e") is NtStatus.INVALID_PARAMETER_MIX
    assert host.unblock("engine0") is NtStatus.INVALID_DEVICE_STATE
    assert host.delete("d") is NtStatus.RESOURCE_IN_USE
    assert host.domains() == [
        HostDomain("d", DomainType.TRANSLATE, 1024, ("engine0",)),
        HostDomain("e", DomainType.TRANSLATE, 0, ()),
    ]
    assert host.block("engine0") is OK
    assert host.detach("engine0", "d") is NtStatus.ALREADY_DISCONNECTED
    assert host.delete("d") is OK
    assert host.delete("d") is NtStatus.INVALID_HANDLE
