"""Domains: the status of each call in each state, what DMA does in each type, steps of a detach, faults."""

from collections.abc import Callable
from time import monotonic

from board import DESTINATION, SOURCE, Board, Json
from engine import RAND48, SUM64
from pool import HUGE, PAGE, Scattered
from remapping import PATIENCE, Bench

from viommu.driver.domains import (
    DmaDevice,
    DmaDomain,
    DomainConfiguration,
    DomainType,
    Fault,
    FaultAction,
    FaultConfiguration,
    NtStatus,
)
from viommu.driver.page_tables import READ_ONLY, READ_WRITE, Access
from viommu.layouts.registers import Cr0, Register

DATA_SIZE = HUGE
NOWHERE = 0x60_0000_0000
"""A physical address without memory, on either machine."""
SOMEBODY = FaultConfiguration(lambda fault: None)

# Statuses


class Scene:
    """A domain and a device of four streams; further domains come and go."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.remapping = bench, bench.remapping
        self.device, self.alias = bench.pair(), DmaDevice("alias", bench.streams[0])
        self.domain = bench.domain()
        self.domains = [self.domain]

    def attach(self, domain: DmaDomain | None = None) -> None:
        self.bench.attach(domain or self.domain, self.device, 0, 2)

    def attach_elsewhere(self) -> None:
        self.domains.append(self.bench.domain())
        self.attach(self.domains[1])

    def detach_again(self) -> None:
        self.attach()
        assert self.remapping.detach_device(self.domain, self.device).success

    def block(self) -> None:
        self.attach()
        with Stuck(self.bench):
            status = self.remapping.detach_device(self.domain, self.device)
        assert status is NtStatus.IO_TIMEOUT, status

    def delete(self) -> None:
        assert self.remapping.delete_domain(self.domain).success

    def clear(self) -> None:
        """Leave nothing to the next scene."""
        for domain in self.domains:
            self.remapping.detach_device(domain, self.alias)
            for base in range(4):
                self.remapping.detach_device(domain, self.device, base)
            self.remapping.delete_domain(domain)


class Stuck:
    """CR0.CMDQEN is 0 for a while: no command is taken."""

    def __init__(self, bench: Bench) -> None:
        self._registers = bench.board.registers
        self._cr0 = Cr0(self._registers.read32(Register.CR0))

    def __enter__(self) -> None:
        self._write(Cr0(self._cr0.value & ~Cr0(cmdqen=True).value))

    def __exit__(self, *_: object) -> None:
        self._write(self._cr0)

    def _write(self, cr0: Cr0) -> None:
        self._registers.write32(Register.CR0, cr0.value)


STATES: dict[str, Callable[[Scene], None]] = {
    "detached": lambda scene: None,
    "attached": Scene.attach,
    "attached elsewhere": Scene.attach_elsewhere,
    "detached again": Scene.detach_again,
    "blocked": Scene.block,
    "deleted": Scene.delete,
}


def _attach(base: int, count: int) -> Callable[[Scene], NtStatus]:
    return lambda s: s.remapping.attach_device(s.domain, s.device, base, count)


def _detach(base: int) -> Callable[[Scene], NtStatus]:
    return lambda s: s.remapping.detach_device(s.domain, s.device, base)


def _report(base: int, config: FaultConfiguration | None) -> Callable[[Scene], NtStatus]:
    return lambda s: s.remapping.set_device_fault_reporting(s.device, base, True, config)


CALLS: dict[str, Callable[[Scene], NtStatus]] = {
    **{
        f"attach({base}, {count})": _attach(base, count)
        for base, count in ((0, 2), (1, 1), (1, 2), (2, 2), (4, 1), (2, 0), (2, 3))
    },
    "alias.attach(0, 1)": lambda s: s.remapping.attach_device(s.domain, s.alias),
    **{f"detach({base})": _detach(base) for base in (0, 1, 2, 4)},
    **{f"report({base}, on)": _report(base, SOMEBODY) for base in (0, 1, 2, 4)},
    "report(0, off)": lambda s: s.remapping.set_device_fault_reporting(s.device, 0, False),
    "report(0, nobody)": _report(0, None),
    "flush": lambda s: s.remapping.flush_domain(s.domain),
    "delete": lambda s: s.remapping.delete_domain(s.domain),
}


def statuses(board: Board, state: str) -> dict[str, Json]:
    """Every call in one state."""
    bench = Bench(board, PATIENCE)
    found: dict[str, Json] = {}
    for name, call in CALLS.items():
        scene = Scene(bench)
        STATES[state](scene)
        found[name] = call(scene).name
        scene.clear()
    return {"statuses": found, "global_errors": int(bench.driver.global_errors())}


# What DMA does


def managed(board: Board) -> dict[str, Json]:
    """Two engines attached as one device: before, within and after; unmapped; deleted."""
    bench = Bench(board)
    device, domain = bench.pair(), bench.domain()
    bench.attach(domain, device, 0, 2)
    empty = [bench.write(engine=engine) for engine in range(2)]
    frames = Scattered(board.destination, 1).frames
    mapped = bench.remapping.map_logical_range(domain, READ_WRITE, frames, DESTINATION)
    attached = [bench.write(engine=engine) for engine in range(2)]
    unmapped = bench.remapping.unmap_logical_range(domain, DESTINATION, 1)
    gone = [bench.write(engine=engine) for engine in range(2)]
    bench.remapping.map_logical_range(domain, READ_WRITE, frames, DESTINATION)
    detached = bench.remapping.detach_device(domain, device)
    after = [bench.write(engine=engine) for engine in range(2)]
    deleted = bench.remapping.delete_domain(domain)
    return {
        "statuses": [status.name for status in (mapped, unmapped, detached, deleted)],
        "empty": empty,
        "attached": attached,
        "gone": gone,
        "after": after,
    }


def unmanaged(board: Board) -> dict[str, Json]:
    """Blocked until it is configured; its owner's unmapping counts when it has flushed."""
    bench = Bench(board)
    device, domain = bench.device(), bench.domain(DomainType.UNMANAGED)
    bench.attach(domain, device)
    blocked, events = bench.write(), board.events()
    owner = bench.driver.create_domain(lower_bits=39)
    owner.map_pages(DESTINATION, Scattered(board.destination, 1).frames)
    assert owner.lower is not None
    configuration = DomainConfiguration(ttbr0=owner.lower.root, input_size0=39)
    configured = bench.remapping.configure_domain(domain, configuration)
    attached = bench.write()
    owner.unmap(DESTINATION, PAGE, invalidate=False)
    stale = bench.write()
    flushed = bench.remapping.flush_domain_va_list(domain, True, [DESTINATION])
    return {
        "statuses": [configured.name, flushed.name],
        "blocked": blocked,
        "blocked_events": events,
        "attached": attached,
        "stale": stale,
        "flushed": bench.write(),
    }


def pass_through(board: Board) -> dict[str, Json]:
    """An IOVA is a physical address."""
    bench = Bench(board)
    device, domain = bench.device(), bench.domain(DomainType.PASS_THROUGH)
    frame = Scattered(board.destination, 1).frames[0]
    bench.attach(domain, device)
    attached = bench.write(frame)
    detached = bench.remapping.detach_device(domain, device)
    return {"statuses": [detached.name], "attached": attached, "after": bench.write(frame)}


# Detach


def steps(board: Board, *, ats: bool = False, stalls: bool = False) -> dict[str, Json]:
    """A detach while both engines write without end; every step, with its time."""
    bench = Bench(board)
    for engine in board.engines:
        engine.function.set_ats(ats)
    device, pages = bench.pair(ats=ats, stalls=stalls), DATA_SIZE // PAGE
    domain = bench.domain(pages=pages)
    bench.attach(domain, device, 0, 2)
    frames = [engine.frame() for engine in board.engines]
    for frame in frames:
        frame.start(RAND48, DESTINATION, DATA_SIZE, seed=7, rate=16, ats=ats)
    while not all(frame.returned for frame in frames):
        assert all(frame.running for frame in frames)
    bench.told.clear()
    started = monotonic()
    status = bench.remapping.detach_device(domain, device)
    ended = monotonic()
    outcomes = [frame.wait() for frame in frames]
    after = [bench.write(engine=engine, ats=ats) for engine in range(2)]
    for engine in board.engines:
        engine.function.set_ats(False)
    return {
        "status": status.name,
        "streams": [*bench.streams],
        "domain": domain.number,
        "started": started,
        "ended": ended,
        "told": bench.events,
        "engines": [outcome.status for outcome in outcomes],
        "after": after,
    }


def stuck(board: Board) -> dict[str, Json]:
    """A detach while the command queue takes nothing, and another one when it does again."""
    bench = Bench(board, PATIENCE)
    device, domain = bench.device(), bench.domain(pages=1)
    bench.attach(domain, device)
    attached = bench.write()
    with Stuck(bench):
        started = monotonic()
        status = bench.remapping.detach_device(domain, device)
        took = monotonic() - started
        config, state = bench.config(bench.streams[0]), bench.remapping.state(device).value
        second = bench.remapping.attach_device(domain, device)
    again = bench.remapping.detach_device(domain, device)
    after = bench.write()
    bench.attach(domain, device)
    return {
        "statuses": [status.name, second.name, again.name],
        "seconds": took,
        "patience": PATIENCE,
        "config": config,
        "state": state,
        "attached": attached,
        "after": after,
        "back": bench.write(),
    }


# Faults


def faults(board: Board) -> dict[str, Json]:
    """Each type that an engine can bring about, as its handler hears of it; none after the detach."""
    bench = Bench(board)
    device = bench.device()
    heard: list[Json] = []

    def hear(fault: Fault) -> None:
        heard.append(
            {
                "type": fault.type.name,
                "address": fault.address,
                "stream_id": fault.stream_id,
                "substream_id": fault.substream_id,
                "write": fault.write,
                "instruction": fault.instruction,
                "privileged": fault.privileged,
            }
        )

    def listen() -> None:
        config = FaultConfiguration(hear)
        assert bench.remapping.set_device_fault_reporting(device, 0, True, config).success

    def heard_of(address: int, **options: int) -> Json:
        command = SUM64 if options.pop("read", 0) else RAND48
        board.dma(command, address, PAGE, **options)
        unclaimed = len(bench.remapping.service_faults())
        found, heard[:] = list(heard), []
        return {"heard": found, "unclaimed": unclaimed}

    domain, frames = bench.domain(), Scattered(board.destination, 3).frames
    for place, access in enumerate((READ_ONLY, Access(accessed=False), Access(privileged=True))):
        address = DESTINATION + place * PAGE
        bench.remapping.map_logical_range(domain, access, frames[place : place + 1], address)
    bench.attach(domain, device)
    listen()
    result: dict[str, Json] = {
        "stream_id": bench.streams[0],
        "translation": heard_of(SOURCE + 0x10),
        "translation-read": heard_of(SOURCE, read=1),
        "translation-instruction": heard_of(SOURCE, read=1, instruction=1),
        "permission": heard_of(DESTINATION),
        "permission-privileged": heard_of(DESTINATION, privileged=1),
        "access-flag": heard_of(DESTINATION + PAGE),
        "unprivileged": heard_of(DESTINATION + 2 * PAGE, read=1),
        "substream": heard_of(SOURCE, substream_id=5),
    }
    # The last one is still in the queue when the detach comes.
    board.dma(RAND48, SOURCE, PAGE)
    assert bench.remapping.detach_device(domain, device).success
    result["flushed"] = list(heard)
    heard.clear()
    result["after"] = heard_of(SOURCE)

    owned = bench.domain(DomainType.UNMANAGED)
    configuration = DomainConfiguration(ttbr0=NOWHERE, input_size0=39)
    bench.remapping.configure_domain(owned, configuration)
    bench.attach(owned, device)
    result["not-listening"] = heard_of(SOURCE)
    listen()
    result["external"] = heard_of(SOURCE)
    return result


def stalls(board: Board) -> dict[str, Json]:
    """A handler maps what was missing; where there is no answer the detach ends the wait."""
    bench = Bench(board)
    device, domain = bench.device(stalls=True), bench.domain()
    frames = Scattered(board.destination, 1).frames

    def page_in(fault: Fault) -> FaultAction:
        bench.remapping.map_logical_range(domain, READ_WRITE, frames, DESTINATION)
        return FaultAction.RETRY

    bench.attach(domain, device)
    config = FaultConfiguration(page_in)
    assert bench.remapping.set_device_fault_reporting(device, 0, True, config).success
    frame = board.frame()
    frame.start(RAND48, DESTINATION, PAGE, seed=3)
    deadline = monotonic() + 10
    while frame.running and monotonic() < deadline:
        bench.remapping.service_faults()
    answered = frame.wait().status
    frame.start(RAND48, SOURCE, PAGE)
    waits = frame.running
    status = bench.remapping.detach_device(domain, device)
    return {
        "answered": answered,
        "waits": waits,
        "status": status.name,
        "ended": frame.wait().status,
    }


def verifier(board: Board) -> dict[str, Json]:
    """A handler calls back into the detach that called it."""
    bench = Bench(board)
    device, domain = bench.device(), bench.domain(pages=1)
    inner: list[Json] = []

    def call_back(fault: Fault) -> None:
        inner.append(bench.remapping.attach_device(domain, device).name)

    bench.attach(domain, device)
    config = FaultConfiguration(call_back)
    assert bench.remapping.set_device_fault_reporting(device, 0, True, config).success
    board.dma(RAND48, SOURCE, PAGE)
    bench.told.clear()
    status = bench.remapping.detach_device(domain, device)
    return {
        "inner": inner,
        "status": status.name,
        "told": bench.events,
        "config": bench.config(bench.streams[0]),
        "after": bench.write(),
    }


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {
    **{
        f"statuses {state}": lambda board, state=state: statuses(board, state)  # type: ignore[misc]
        for state in STATES
    },
    "managed": managed,
    "unmanaged": unmanaged,
    "pass-through": pass_through,
    "steps": steps,
    "steps-ats": lambda board: steps(board, ats=True),
    "steps-stalls": lambda board: steps(board, stalls=True),
    "stuck": stuck,
    "faults": faults,
    "stalls": stalls,
    "verifier": verifier,
}
