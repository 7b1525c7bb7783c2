"""A server with host domains, and an engine that works under them."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.server_rig import BASE, Function, Machine
from viommu.driver.domains import NtStatus
from viommu.endpoints.pattern import rand48
from viommu.host import EndpointState, HostDomains

PAGE, MIB = 0x1000, 1 << 20
SEED = 0  # in ascending order
OK = NtStatus.SUCCESS
ATTACHED, BLOCKED = EndpointState.ATTACHED, EndpointState.BLOCKED
PASS_THROUGH = EndpointState.PASS_THROUGH


def served() -> Iterator[Machine]:
    """For a fixture."""
    with tempfile.TemporaryDirectory(prefix="vs-", dir="/tmp") as path, Machine(Path(path)) as made:
        yield made


def pattern(size: int, at: int = BASE) -> bytes:
    return rand48(SEED, at, at, size)


def fill(engine: Function, size: int = MIB, *, at: int = BASE, rate: int = 16) -> None:
    """Let the engine write to guest RAM, `rate` × 64 bytes at a time."""
    engine.fill(size, at=at, seed=SEED, rate=rate)
    engine.start()


def identity(host: HostDomains, name: str = "d", *holes: int) -> None:
    assert host.create(name) is OK
    assert host.map_identity(name, [(hole, PAGE) for hole in holes]) is OK


def state(host: HostDomains, endpoint: str = "engine0") -> EndpointState:
    return next(each.state for each in host.endpoints() if each.endpoint == endpoint)
