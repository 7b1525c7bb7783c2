"""Filters above a port: what each point sees, what it may change, and that each transaction completes once."""

from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import smmu_rig as hw
from tests.test_port import LEAF, Behind
from viommu.endpoints.port import DmaFault, DmaPort, DmaRefused, DmaStalled
from viommu.endpoints.tasks import Tasks
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.endpoints.transfers import Segment, Transfers
from viommu.layouts.ntstatus import NtStatus
from viommu.layouts.test_engine import EngineCommand, UserFrame, user_frame
from viommu.memory import GuestMemory
from viommu.smmu import Access, Translation
from viommu.stack import Abort, DriverObject, Filter, FilterDevice, IoManager, Outcome, Request
from viommu.stack.endpoint import EndpointDevice, EndpointDriver
from viommu.stack.library import CorruptingFilter, TracingFilter, TransactionTraced
from viommu.trace import Event, Tracer

FIRST, SECOND = Behind.PAGES
IOVA = 0x1000


class Stack:
    """A port behind an SMMU, with its device object; `attach` puts a filter on top."""

    def __init__(self) -> None:
        self.behind = Behind()
        self.port, self.ram = self.behind.port, self.behind.rig.ram
        tracer = Tracer()
        tracer.subscribe(self.behind.events.append)
        self.io = IoManager(tracer)
        self.drivers = {"endpoint": EndpointDriver("endpoint"), "filter": DriverObject("filter")}
        for driver in self.drivers.values():
            self.io.load_driver(driver)
        self.bottom = EndpointDevice(
            "engine0", self.port, tracer, plugged=lambda: False, withdraw=lambda: None
        )
        self.io.create_device(self.drivers["endpoint"], self.bottom)

    def attach(self, what: Filter) -> FilterDevice:
        device = FilterDevice(f"filter{len(self.io.devices)}", what)
        self.io.create_device(self.drivers["filter"], device)
        what.started(device.name, self.io.tracer)
        assert self.io.attach_device(device, "engine0") is NtStatus.SUCCESS
        return device

    def write(self, data: bytes, iova: int = IOVA) -> int:
        """Returns how many bytes went."""
        with self.port.begin(iova, len(data), write=True) as transfer:
            transfer.write_from(data[: transfer.size])
            return transfer.size

    def read(self, size: int, iova: int = IOVA) -> bytes:
        buffer = bytearray(size)
        with self.port.begin(iova, size, write=False) as transfer:
            transfer.read_into(buffer)
        return bytes(buffer)

    def at(self, address: int, size: int) -> bytes:
        return bytes(self.ram[address - hw.BASE : address - hw.BASE + size])

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.behind.events if type(event) is kind]


class Witness(Filter):
    """Keeps a record of its points, in a list that it shares; `act` may do something at one of them."""

    def __init__(
        self,
        name: str = "witness",
        seen: list[str] | None = None,
        act: Mapping[str, Callable[..., object]] = MappingProxyType({}),
    ) -> None:
        self.name, self.seen = name, [] if seen is None else seen
        self.outcomes: list[Outcome] = []
        self._act = act

    def _at(self, point: str, *arguments: object) -> None:
        self.seen.append(f"{self.name} {point}")
        if point in self._act:
            self._act[point](*arguments)

    def before_translation(self, request: Request) -> None:
        self._at("before", request)

    def after_translation(self, request: Request, translation: Translation) -> None:
        self._at("after", request, translation)

    def data(self, request: Request, data: memoryview) -> None:
        self._at("data", request, data)

    def completed(self, request: Request, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._at("completed", request, outcome)


@pytest.fixture
def stack() -> Iterator[Stack]:
    made = Stack()
    yield made
    assert made.port.in_flight == 0
    assert not len(made.behind.rig.smmu.in_flight)
    assert all(device.transactions == 0 for device in made.io.devices.values())


@pytest.mark.parametrize("write", [True, False])
def test_points_in_order(stack: Stack, write: bool) -> None:
    seen: list[str] = []
    stack.attach(Witness("low", seen))
    stack.attach(Witness("high", seen))
    stack.write(b"12345678") if write else stack.read(8)
    data = ["high data", "low data"]
    assert seen == [
        *("high before", "low before", "high after", "low after"),
        *(data if write else reversed(data)),
        *("low completed", "high completed"),
    ]


def test_a_filter_that_does_nothing_changes_nothing(stack: Stack) -> None:
    stack.attach(Filter())
    assert stack.write(b"x" * 0x1800) == 0x1800
    assert stack.read(0x1800) == b"x" * 0x1800
    assert stack.at(FIRST, 0x1000) == stack.at(SECOND, 0x800) * 2
    with pytest.raises(ValueError, match="a transaction of 0 bytes"):
        stack.port.begin(IOVA, 0, write=True)


def test_a_port_with_no_filter_asks_nobody(stack: Stack) -> None:
    device = stack.attach(Filter())
    assert stack.port.path is not None
    stack.io.detach_device(stack.bottom)
    assert stack.port.path is None
    assert stack.io.delete_device(device) is NtStatus.SUCCESS


# What a filter may change


def test_the_address_before_translation(stack: Stack) -> None:
    def elsewhere(request: Request) -> None:
        request.iova += 0x1000

    stack.attach(Witness(act={"before": elsewhere}))
    with stack.port.begin(IOVA, 8, write=True) as transfer:
        assert transfer.iova == IOVA, "the device knows only its own"
        transfer.write_from(b"12345678")
    assert stack.at(SECOND, 8) == b"12345678"


def test_the_size(stack: Stack) -> None:
    sizes = iter((3, 100, 0))

    def cut(request: Request) -> None:
        request.size = next(sizes)

    stack.attach(Witness(act={"before": cut}))
    assert stack.write(b"12345678") == 3
    assert stack.write(b"12345678") == 8, "it does not grow"
    with pytest.raises(ValueError, match="filter1 made a transaction of 0 bytes"):
        stack.write(b"12345678")


def test_the_stream(stack: Stack) -> None:
    def forged(request: Request) -> None:
        request.access = Access(0x13, None, write=True)

    stack.attach(Witness(act={"before": forged}))
    with pytest.raises(DmaFault):
        stack.write(b"12345678")
    (record,) = stack.behind.rig.events()
    assert (record[0], record[4]) == (0x04, 0x13), "C_BAD_STE of the other stream"


def test_where_it_goes_after_translation(stack: Stack) -> None:
    def swapped(_: Request, translation: Translation) -> None:
        translation.runs[:] = array("Q", (SECOND, 4, FIRST, 4))

    stack.attach(Witness(act={"after": swapped}))
    stack.write(b"12345678")
    assert (stack.at(SECOND, 4), stack.at(FIRST, 4)) == (b"1234", b"5678")


@pytest.mark.parametrize("write", [True, False])
def test_the_bytes(stack: Stack, write: bool) -> None:
    stack.write(b"12345678")
    stack.attach(CorruptingFilter(every=2, mask=0x01))
    data = b"12345678"
    for expected in (b"12345678", b"02345678") * 2:
        if write:
            stack.write(data)
            assert stack.at(FIRST, 8) == expected
        else:
            assert stack.read(8) == expected
    assert data == b"12345678", "the device's own bytes are as they were"


# Aborts, and what goes wrong below


def abort(*_: object) -> None:
    raise Abort("for a test")


@pytest.mark.parametrize("point", ["before", "after", "data"])
@pytest.mark.parametrize("write", [True, False])
def test_an_abort(stack: Stack, point: str, write: bool) -> None:
    low, middle, high = Witness(), Witness(act={point: abort}), Witness()
    for witness in (low, middle, high):
        stack.attach(witness)
    with pytest.raises(DmaFault, match="aborted at 0x1000: for a test") as raised:
        stack.write(b"12345678") if write else stack.read(8)
    assert (raised.value.address, raised.value.done) == (IOVA, 0)
    assert stack.of(DmaRefused) == [DmaRefused(hw.STREAM, IOVA, write, "for a test")]
    assert high.outcomes == middle.outcomes == [Outcome.ABORTED]
    assert low.outcomes == ([] if point == "before" else [Outcome.ABORTED]), "it was not passed"
    assert stack.at(FIRST, 8) == bytes(8)


def test_a_fault_is_at_the_address_that_the_device_sent(stack: Stack) -> None:
    def elsewhere(request: Request) -> None:
        request.iova += 0x10_0000

    witness = Witness(act={"before": elsewhere})
    stack.attach(witness)
    with pytest.raises(DmaFault, match="at 0x1004") as raised:
        stack.write(b"12345678", IOVA + 4)
    assert raised.value.address == IOVA + 4
    stack.behind.rig.map(0x10_1000, 0xF_0000_0000 | LEAF)  # no memory there
    with pytest.raises(DmaFault) as raised:
        stack.read(8)
    assert (raised.value.address, witness.outcomes) == (IOVA, [Outcome.ABORTED] * 2)


def test_a_transaction_that_stalls(stack: Stack) -> None:
    witness = Witness()
    stack.attach(witness)
    held = type("Held", (), {"address": IOVA, "resolution": None})()

    def stalled(*_: object) -> None:
        raise DmaStalled(held)

    stack.port.issue = stalled  # type: ignore[assignment]
    with pytest.raises(DmaStalled):
        stack.port.begin(IOVA, 8, write=True)
    assert witness.outcomes == [Outcome.STALLED]


def test_a_transaction_that_moves_nothing(stack: Stack) -> None:
    witness = Witness()
    stack.attach(witness)
    transfer = stack.port.begin(IOVA, 8, write=True)
    transfer.done()
    transfer.done()
    assert witness.outcomes == [Outcome.ENDED]


def fail(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("point", ["before", "after", "data", "completed"])
def test_a_filter_with_a_bug_leaves_nothing_in_flight(stack: Stack, point: str) -> None:
    stack.attach(Witness(act={point: fail}))
    with pytest.raises(ZeroDivisionError):
        stack.write(b"12345678")


@pytest.mark.parametrize("iova", [IOVA, 0x9000])
def test_one_that_fails_at_the_end_is_not_the_last_that_is_told(stack: Stack, iova: int) -> None:
    low, high = Witness(act={"completed": fail}), Witness()
    stack.attach(low)
    stack.attach(high)
    with pytest.raises(ZeroDivisionError):
        stack.write(b"12345678", iova)
    assert low.outcomes == high.outcomes
    assert len(high.outcomes) == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_what_a_generator_has_in_flight_ends_though_a_filter_fails(
    stack: Stack, steps: int
) -> None:
    """In the middle of them, and when they are ended from outside."""
    stack.attach(Witness(act={"completed": fail}))
    segments = [Segment(IOVA + 16 * place, 8) for place in range(3)]
    tasks = Tasks()
    for _ in range(2):
        tasks.spawn(Transfers(stack.port).move(segments, memoryview(bytes(24)), write=True))
    for _ in range(steps):
        tasks.step()
    assert stack.port.in_flight == 3 * steps
    with pytest.raises(ZeroDivisionError):
        tasks.step() if steps == 2 else tasks.clear()
    with suppress(ZeroDivisionError):
        tasks.clear()
    assert len(tasks) == 0


def test_a_reset_of_the_engine_ends_every_frame_though_a_filter_fails(stack: Stack) -> None:
    engine = SmmuTestEngine(stack.port)
    stack.attach(Witness(act={"completed": fail}))
    for frame in range(3):
        user = UserFrame(begin=IOVA, end_incl=IOVA + 7, stride=1, cmd=EngineCommand.RAND48)
        data = user.to_bytes()
        for offset in (*range(8, len(data), 8), 0):
            value = int.from_bytes(data[offset : offset + 8], "little")
            engine.write(0, user_frame(frame) + offset, 8 if offset else 4, value)
    for _ in range(3):
        engine.step()
    assert stack.port.in_flight == 3
    with pytest.raises(ZeroDivisionError):
        engine.reset()
    assert not engine.busy


# Coming and going in the middle


def test_a_transaction_holds_what_it_has_passed(stack: Stack) -> None:
    witness = Witness()
    device = stack.attach(witness)
    transfer = stack.port.begin(IOVA, 8, write=True)
    late = Witness()
    stack.attach(late)
    assert (stack.bottom.transactions, device.transactions) == (1, 1)
    stack.io.detach_device(device)
    assert stack.io.detach_device(stack.bottom) is NtStatus.SUCCESS
    assert stack.io.delete_device(device) is NtStatus.PENDING
    stack.write(b"87654321")
    assert witness.outcomes == [], "new ones do not pass it"
    transfer.write_from(b"12345678")
    transfer.done()
    assert (witness.outcomes, late.outcomes) == ([Outcome.MOVED], [])
    assert not device.deleted
    stack.io.settle()
    assert device.deleted


def test_a_filter_whose_driver_is_to_be_unloaded_is_passed_by(stack: Stack) -> None:
    witness = Witness()
    device = stack.attach(witness)
    stack.io.reference(device, "me")
    assert stack.io.unload_driver("filter") is NtStatus.PENDING
    stack.write(b"12345678")
    assert witness.seen == []
    assert stack.bottom.attached_device is device


def test_an_endpoint_whose_driver_is_to_be_unloaded_takes_no_more(stack: Stack) -> None:
    device = stack.attach(Filter())
    transfer = stack.port.begin(IOVA, 8, write=True)
    assert stack.io.unload_driver("endpoint") is NtStatus.PENDING
    with pytest.raises(DmaFault, match="the device is being removed"):
        stack.write(b"12345678")
    assert not stack.behind.rig.events(), "the SMMU sees nothing, as if Bus Master was off"
    transfer.write_from(b"12345678")
    transfer.done()
    assert stack.at(FIRST, 8) == b"12345678", "what was in flight lands"
    stack.io.settle()
    assert "endpoint" in stack.io.drivers, "the filter is a reference"
    stack.io.detach_device(stack.bottom)
    assert "endpoint" not in stack.io.drivers
    assert not device.deleted


# The tracing filter


def test_the_trace_has_each_transaction_once(stack: Stack) -> None:
    stack.attach(TracingFilter())
    stack.write(b"x" * 0x1800)
    with pytest.raises(DmaFault):
        stack.read(8, 0x9000)
    moved, refused = stack.of(TransactionTraced)
    assert moved == TransactionTraced(
        "filter1", hw.STREAM, None, IOVA, 0x1800, True,
        (FIRST, 0x1000, SECOND, 0x800), "MOVED", None,
    )  # fmt: skip
    assert isinstance(refused, TransactionTraced)
    assert (refused.iova, refused.size, refused.outcome) == (0x9000, 8, "ABORTED")
    assert (refused.runs, refused.why) == ((), stack.of(DmaRefused)[0].why)  # type: ignore[attr-defined]


# Anything at all


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["", "before", "after", "data"]), max_size=3),
    st.lists(st.tuples(st.booleans(), st.integers(0, 0x3000), st.integers(1, 0x2000))),
)
def test_each_transaction_completes_once(
    points: list[str], dma: list[tuple[bool, int, int]]
) -> None:
    stack = Stack()
    witnesses = [Witness(act={point: abort}) for point in points]
    for witness in witnesses:
        stack.attach(witness)
    for write, iova, size in dma:
        try:
            stack.write(bytes(size), iova) if write else stack.read(size, iova)
        except DmaFault as raised:
            fault = raised
        else:
            continue
        assert iova <= fault.address < iova + size
    for witness in witnesses:
        assert len(witness.outcomes) == witness.seen.count("witness before")
        assert stack.port.in_flight == 0


def test_a_port_without_an_smmu_has_filters_too() -> None:
    memory, ram = GuestMemory(), bytearray(0x1000)
    memory.add_region(0, 0x1000, memoryview(ram))
    port = DmaPort(memory, 0x10)
    port.bus_master = True
    io = IoManager()
    endpoint, filters = EndpointDriver("endpoint"), DriverObject("filter")
    io.load_driver(endpoint)
    io.load_driver(filters)
    bottom = EndpointDevice("e", port, Tracer(), plugged=lambda: False, withdraw=lambda: None)
    device = FilterDevice("f", CorruptingFilter(mask=2))
    io.create_device(endpoint, bottom)
    io.create_device(filters, device)
    io.attach_device(device, "e")
    with port.begin(0, 4, write=True) as transfer:
        transfer.write_from(b"1234")
    assert ram[:4] == b"3234"
