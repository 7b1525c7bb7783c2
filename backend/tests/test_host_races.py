"""Zero bytes after the call returned: blocks, detaches and unmaps of the host that race the DMA of an endpoint."""

from collections.abc import Callable, Iterator
from random import Random

import pytest

from tests.host_server_rig import ATTACHED, MIB, OK, PAGE, served, state
from tests.server_rig import BASE, ERROR, RAM, Function, Machine
from viommu.endpoints.port import DmaMoved
from viommu.host import HostDomains


@pytest.fixture
def machine() -> Iterator[Machine]:
    yield from served()


@pytest.fixture
def host(machine: Machine) -> HostDomains:
    return machine.server.host


@pytest.fixture
def engine(machine: Machine) -> Function:
    return machine.connect("engine0", bus_master=True)


def block(host: HostDomains) -> None:
    assert host.block("engine0") is OK


def detach(host: HostDomains) -> None:
    assert host.detach("engine0", "d") is OK


def unmap(host: HostDomains) -> None:
    assert host.unmap("d", BASE, 2 * MIB) is OK


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_lands_once_a_block_has_returned(
    machine: Machine, host: HostDomains, engine: Function, attached: bool, seed: int
) -> None:
    races(machine, host, engine, block, attached=attached, seed=seed)


@pytest.mark.parametrize("end", [detach, unmap])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_lands_once_a_detach_or_an_unmap_has_returned(
    machine: Machine,
    host: HostDomains,
    engine: Function,
    end: Callable[[HostDomains], None],
    seed: int,
) -> None:
    races(machine, host, engine, end, attached=True, seed=seed)


def races(
    machine: Machine,
    host: HostDomains,
    engine: Function,
    end: Callable[[HostDomains], None],
    *,
    attached: bool,
    seed: int,
) -> None:
    """Forty times: frames write at random rates, `end` comes at a random moment, and memory stays as it is then."""
    random = Random(seed)
    moved = waited = stopped = 0
    for turn in range(40):
        if attached:
            assert host.create("d") is OK
            assert host.map("d", BASE, BASE, 2 * MIB) is OK
            assert host.attach("engine0", "d") is OK
        machine.ram[:] = bytes(RAM)
        for frame in range(4):
            engine.fill(
                128 * PAGE,
                frame=frame,
                at=BASE + frame * 128 * PAGE,
                seed=turn + 1,
                rate=random.choice([1, 7, 64, 0]),
            )
            engine.start(frame)
        for _ in range(random.randrange(60)):
            machine.server.turn()
        machine.events.clear()
        end(host)
        waited += any(isinstance(each, DmaMoved) for each in machine.events)
        image = machine.ram[:]
        moved += any(image)
        machine.run()
        assert machine.ram[:] == image
        stopped += [engine.status(frame) for frame in range(4)].count(ERROR)
        if state(host) is ATTACHED:
            assert host.detach("engine0", "d") is OK
        if attached:
            assert host.delete("d") is OK
        assert host.unblock("engine0") is OK
    assert moved > 20, "DMA was under way"
    assert waited > 20, "the call waited for what was in flight"
    assert stopped > 80, "and stopped what was to come"
