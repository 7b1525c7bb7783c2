"""Driver objects and device objects: what each call does in each state, and random calls against a simple reference."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from viommu.layouts.ntstatus import NtStatus
from viommu.stack import DeviceObject, DriverObject, IoManager, Pending
from viommu.trace import Event, Tracer

SUCCESS, PENDING = NtStatus.SUCCESS, NtStatus.PENDING
GONE, BAD = NtStatus.NO_SUCH_DEVICE, NtStatus.INVALID_PARAMETER
DELETING, REFUSED = NtStatus.DELETE_PENDING, NtStatus.INVALID_DEVICE_REQUEST


class World:
    """A target, of driver `lower`, that `state` brings into a state; and a filter of another driver to attach."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        tracer = Tracer()
        tracer.subscribe(self.events.append)
        self.io = IoManager(tracer)
        self.lower, self.upper = DriverObject("lower"), DriverObject("upper")
        self.target = self.make("target", self.lower, alignment_requirement=63)
        self.filter = self.make("filter", self.upper)

    def make(self, name: str, driver: DriverObject, **options: int) -> DeviceObject:
        self.io.load_driver(driver)
        device = DeviceObject(name, **options)
        assert self.io.create_device(driver, device) is SUCCESS
        return device

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def attach_another(self) -> NtStatus:
        return self.io.attach_device(self.make("another", self.upper), "target")


State = Callable[[World], object]
Call = Callable[[World], NtStatus]

STATES: dict[str, State] = {
    "alone": lambda world: None,
    "held": lambda world: world.io.reference(world.target, "me"),
    "filtered": lambda world: world.attach_another(),
    "unload pending": lambda world: (
        world.io.reference(world.target, "me"),
        world.io.unload_driver("lower"),
    ),
    "delete pending": lambda world: (
        world.io.reference(world.target, "me"),
        world.io.delete_device(world.target),
    ),
    "remove pending": lambda world: (
        world.io.reference(world.target, "me"),
        world.io.remove_device(world.target),
    ),
    "pulled": lambda world: (
        world.io.reference(world.target, "me"),
        world.io.surprise_remove(world.target),
    ),
    "gone": lambda world: world.io.delete_device(world.target),
}
CALLS: dict[str, Call] = {
    "attach by name": lambda world: world.io.attach_device(world.filter, "target"),
    "attach": lambda world: world.io.attach_device_to_device_stack_safe(world.filter, world.target),
    "detach": lambda world: world.io.detach_device(world.target),
    "reference": lambda world: world.io.reference(world.target, "you"),
    "dereference": lambda world: world.io.dereference(world.target, "me"),
    "delete": lambda world: world.io.delete_device(world.target),
    "remove": lambda world: world.io.remove_device(world.target),
    "surprise": lambda world: world.io.surprise_remove(world.target),
    "unload": lambda world: world.io.unload_driver("lower"),
}
NOT_FOUND = NtStatus.OBJECT_NAME_NOT_FOUND
TABLE: dict[str, tuple[NtStatus, ...]] = {
    # alone, held, filtered, unload pending, delete pending, remove pending, pulled, gone
    "attach by name": (SUCCESS, SUCCESS, SUCCESS, GONE, GONE, GONE, GONE, NOT_FOUND),
    "attach": (SUCCESS, SUCCESS, SUCCESS, GONE, GONE, GONE, GONE, GONE),
    "detach": (REFUSED, REFUSED, SUCCESS, REFUSED, REFUSED, REFUSED, REFUSED, GONE),
    "reference": (SUCCESS, SUCCESS, SUCCESS, GONE, GONE, GONE, GONE, GONE),
    "dereference": (BAD, SUCCESS, BAD, SUCCESS, SUCCESS, SUCCESS, SUCCESS, GONE),
    "delete": (SUCCESS, PENDING, PENDING, PENDING, DELETING, PENDING, PENDING, GONE),
    "remove": (SUCCESS, PENDING, PENDING, PENDING, DELETING, DELETING, DELETING, GONE),
    "surprise": (SUCCESS, PENDING, PENDING, PENDING, PENDING, PENDING, DELETING, GONE),
    "unload": (SUCCESS, PENDING, PENDING, PENDING, PENDING, PENDING, PENDING, SUCCESS),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("state", STATES)
def test_the_status_of_each_call_in_each_state(call: str, state: str) -> None:
    world = World()
    STATES[state](world)
    expected = TABLE[call][list(STATES).index(state)]
    before = dict(world.target.references), world.target.pending, world.filter.attached_to
    assert CALLS[call](world) is expected
    if not expected.success:
        assert (
            dict(world.target.references),
            world.target.pending,
            world.filter.attached_to,
        ) == before, "nothing changes"


def test_the_values_are_those_of_windows() -> None:
    assert [int(status) for status in (PENDING, GONE, BAD, REFUSED, DELETING, NOT_FOUND)] == [
        0x103, 0xC000000E, 0xC000000D, 0xC0000010, 0xC0000056, 0xC0000034,
    ]  # fmt: skip
    assert PENDING.success
    assert not NtStatus.DEVICE_BUSY.success


# Attach


def test_a_device_attaches_at_the_top_and_takes_over_from_below() -> None:
    world = World()
    other = world.make("other", world.upper)
    assert world.io.attach_device_to_device_stack(world.filter, world.target) is world.target
    assert world.io.attach_device_to_device_stack(other, world.target) is world.filter
    assert (world.target.stack_size, world.filter.stack_size, other.stack_size) == (1, 2, 3)
    assert (world.filter.alignment_requirement, other.alignment_requirement) == (63, 63)
    assert list(world.target.above) == [world.filter, other]
    assert other.bottom is world.target
    assert world.target.references == {"filter": 1}


def test_the_result_is_none_when_it_cannot_be_attached() -> None:
    world = World()
    world.io.delete_device(world.target)
    assert world.io.attach_device_to_device_stack(world.filter, world.target) is None


def test_nothing_attaches_above_a_device_that_waits_for_its_unload() -> None:
    world = World()
    world.attach_another()
    world.io.unload_driver("lower")
    assert world.io.attach_device(world.filter, "target") is GONE
    assert world.io.attach_device(world.filter, "another") is GONE, "nor higher up"


def test_what_cannot_be_attached() -> None:
    world = World()
    io = world.io
    assert io.attach_device(world.target, "target") is BAD
    assert io.attach_device(world.filter, "target") is SUCCESS
    assert io.attach_device(world.filter, "target") is BAD
    assert io.attach_device(world.target, "filter") is BAD, "no rings"
    third = world.make("third", DriverObject("third"))
    assert io.attach_device(world.target, "third") is BAD, "a device with others above it"
    assert io.attach_device(third, "Target!") is NtStatus.OBJECT_NAME_INVALID
    assert io.attach_device(third, "nobody") is NOT_FOUND
    io.reference(third, "me")
    io.delete_device(third)
    assert io.attach_device(third, "target") is GONE


def test_names_and_drivers() -> None:
    world = World()
    io = world.io
    collision, invalid = NtStatus.OBJECT_NAME_COLLISION, NtStatus.OBJECT_NAME_INVALID
    assert io.load_driver(DriverObject("lower")) is collision
    assert io.load_driver(DriverObject("")) is invalid
    assert io.create_device(world.lower, DeviceObject("target")) is collision
    assert io.create_device(world.lower, DeviceObject("a b")) is invalid
    assert io.create_device(DriverObject("unknown"), DeviceObject("new")) is BAD
    assert io.unload_driver("unknown") is NOT_FOUND
    assert io.unload_driver("lower") is SUCCESS
    assert io.create_device(world.lower, DeviceObject("new")) is DELETING


def test_a_driver_without_an_unload_routine() -> None:
    world = World()
    world.lower.can_unload = False
    assert world.io.unload_driver("lower") is REFUSED
    assert not world.target.pending


# Going


def test_a_detach_unloads_the_driver_that_is_marked() -> None:
    world = World()
    world.io.attach_device(world.filter, "target")
    assert world.io.unload_driver("lower") is PENDING
    assert world.io.unload_driver("lower") is PENDING
    assert world.io.detach_device(world.target) is SUCCESS
    assert world.kinds()[-5:] == [
        "DeviceStopped", "DeviceDetached", "DriverUnloading", "DeviceDeleted", "DriverUnloaded",
    ]  # fmt: skip
    assert (list(world.io.drivers), list(world.io.devices)) == (["upper"], ["filter"])


def test_a_driver_waits_for_all_its_devices() -> None:
    world = World()
    second = world.make("second", world.lower)
    world.io.reference(second, "me")
    assert world.io.unload_driver("lower") is PENDING
    assert not world.target.deleted
    world.io.dereference(second, "me")
    assert world.target.deleted
    assert second.deleted
    assert world.kinds().count("DriverUnloaded") == 1


def test_a_filters_driver_is_unloaded_by_detaching_its_devices() -> None:
    world = World()
    world.io.attach_device(world.filter, "target")
    assert world.io.unload_driver("upper") is SUCCESS
    assert (world.target.attached_device, world.target.reference_count) == (None, 0)


def test_a_filter_is_detached_before_it_is_deleted() -> None:
    world = World()
    world.io.attach_device(world.filter, "target")
    assert world.io.delete_device(world.filter) is REFUSED
    assert world.io.remove_device(world.filter) is SUCCESS
    assert not world.target.reference_count


def test_a_detach_in_the_middle_takes_what_is_above_along() -> None:
    world = World()
    top = world.make("top", world.upper)
    world.io.attach_device(world.filter, "target")
    world.io.attach_device(top, "target")
    world.io.detach_device(world.target)
    assert list(world.target.above) == []
    assert list(world.filter.above) == [top]
    assert (world.filter.stack_size, top.stack_size) == (1, 2)
    assert world.io.delete_device(world.filter) is PENDING
    assert world.io.detach_device(world.filter) is SUCCESS
    assert world.filter.deleted


def test_a_transaction_is_a_reference() -> None:
    world = World()
    world.target.in_flight = 1
    assert world.io.unload_driver("lower") is PENDING
    world.io.settle()
    assert not world.target.deleted
    world.target.in_flight = 0
    assert not world.target.deleted, "not inside of what ends the transaction"
    world.io.settle()
    assert "lower" not in world.io.drivers
    assert not world.io.pending


class Slow(DriverObject):
    """A driver that lets its device go at the third time of asking."""

    asked = pulled = 0

    def remove_device(self, io: IoManager, device: DeviceObject) -> None:
        self.asked += 1
        if self.asked == 3:
            io.delete_device(device)

    def surprise_removal(self, device: DeviceObject) -> None:
        self.pulled += 1


@pytest.mark.parametrize("how", ["remove", "unload", "surprise"])
def test_a_driver_may_take_its_time(how: str) -> None:
    world, slow = World(), Slow("slow")
    device = world.make("device", slow)
    calls: dict[str, Callable[[], NtStatus]] = {
        "remove": lambda: world.io.remove_device(device),
        "unload": lambda: world.io.unload_driver("slow"),
        "surprise": lambda: world.io.surprise_remove(device),
    }
    assert calls[how]() is PENDING
    assert (slow.asked, slow.pulled) == (1, int(how == "surprise"))
    world.io.settle()
    assert world.io.pending == [device]
    world.io.settle()
    assert device.deleted
    assert ("slow" in world.io.drivers) == (how != "unload")


# Random calls

NAMES = ("a", "b", "c", "d")
names = st.sampled_from(NAMES)
holders = st.sampled_from(("me", "you"))


class Random(RuleBasedStateMachine):
    """Any calls. The reference is four facts of each device: whom it is above, who holds it, what it has in flight, and
    whether something is pending.
    """

    def __init__(self) -> None:
        super().__init__()
        self.deleted: Counter[str] = Counter()
        self.unloaded: Counter[str] = Counter()
        tracer = Tracer()
        tracer.subscribe(self.saw)
        self.io = IoManager(tracer)
        self.drivers = [DriverObject("x"), DriverObject("y")]
        self.devices: dict[str, DeviceObject] = {}
        self.below: dict[str, str] = {}
        self.held: Counter[tuple[str, str]] = Counter()
        self.flying: Counter[str] = Counter()
        self.going: set[str] = set()
        self.marked: set[str] = set()
        for driver in self.drivers:
            self.io.load_driver(driver)
        for index, name in enumerate(NAMES):
            device = self.devices[name] = DeviceObject(name)
            self.io.create_device(self.drivers[index % 2], device)

    def saw(self, event: Event) -> None:
        """Whatever goes must have no reference at that moment."""
        match event.as_dict():
            case {"kind": "DeviceDeleted", "device": name}:
                self.deleted[name] += 1
                assert name in self.going | self.marked
                assert not self.count(name), "it was referenced"
            case {"kind": "DeviceDetached", "device": name}:
                self.below.pop(name, None)
            case {"kind": "DriverUnloading", "driver": name}:
                mine = NAMES[0::2] if name == "x" else NAMES[1::2]
                assert not any(self.count(each) for each in mine if not self.deleted[each])
            case {"kind": "DriverUnloaded", "driver": name}:
                self.unloaded[name] += 1

    def count(self, name: str) -> int:
        held = sum(number for (device, _), number in self.held.items() if device == name)
        return held + self.flying[name] + list(self.below.values()).count(name)

    def usable(self, name: str) -> bool:
        return not self.deleted[name] and name not in self.going | self.marked

    def stack(self, name: str) -> list[str]:
        while name in self.below:
            name = self.below[name]
        found = [name]
        while above := [each for each, lower in self.below.items() if lower == found[-1]]:
            found += above
        return found

    @rule(source=names, onto=names)
    def attach(self, source: str, onto: str) -> None:
        stack = self.stack(onto)
        fits = all(self.usable(name) for name in (*stack, source))
        free = self.stack(source) == [source] and source not in stack
        status = self.io.attach_device_to_device_stack_safe(
            self.devices[source], self.devices[onto]
        )
        assert (status is SUCCESS) == (fits and free)
        if status is SUCCESS:
            self.below[source] = stack[-1]
            assert self.devices[source].stack_size == len(stack) + 1

    @rule(lower=names)
    def detach(self, lower: str) -> None:
        attached = lower in self.below.values()
        status = self.io.detach_device(self.devices[lower])
        assert (status is SUCCESS) == attached

    @rule(name=names, holder=holders)
    def reference(self, name: str, holder: str) -> None:
        status = self.io.reference(self.devices[name], holder)
        assert (status is SUCCESS) == self.usable(name)
        self.held[name, holder] += status is SUCCESS

    @rule(name=names, holder=holders)
    def dereference(self, name: str, holder: str) -> None:
        held = bool(self.held[name, holder])
        self.held[name, holder] -= held
        assert (self.io.dereference(self.devices[name], holder) is SUCCESS) == held

    @rule(name=names)
    def begin(self, name: str) -> None:
        if self.usable(name):
            self.devices[name].in_flight += 1
            self.flying[name] += 1

    @rule(name=names)
    def end(self, name: str) -> None:
        if self.flying[name]:
            self.devices[name].in_flight -= 1
            self.flying[name] -= 1
        self.io.settle()

    @rule(name=names, how=st.sampled_from(["delete_device", "remove_device", "surprise_remove"]))
    def go(self, name: str, how: str) -> None:
        if how == "delete_device" and name in self.below:
            assert self.io.delete_device(self.devices[name]) in (REFUSED, DELETING)
            return
        self.going.add(name)
        status = getattr(self.io, how)(self.devices[name])
        assert (status is SUCCESS) <= bool(self.deleted[name])

    @rule(driver=st.sampled_from([0, 1]))
    def unload(self, driver: int) -> None:
        self.marked |= set(NAMES[driver::2])
        status = self.io.unload_driver("xy"[driver])
        assert (status is PENDING) == (not self.unloaded["xy"[driver]])

    @invariant()
    def agrees(self) -> None:
        for name, device in self.devices.items():
            assert all(count > 0 for count in device.references.values())
            assert device.reference_count == self.count(name)
            assert device.deleted == bool(self.deleted[name])
            assert self.deleted[name] <= 1, "deleted once"
            assert device.deleted or device.stack_size == self.stack(name).index(name) + 1
            below = self.below.get(name)
            assert device.attached_to is (self.devices[below] if below else None)
            siblings = [each.name for each in device.driver.devices]
            if name in self.going:
                assert device.deleted or self.count(name), "nothing holds it, and it is there"
            if name in self.marked:
                assert device.deleted or any(map(self.count, siblings)), "nor its driver"
            assert self.usable(name) == (not device.deleted and device.pending is Pending.NOTHING)
        assert max(self.unloaded.values(), default=0) <= 1
        for driver in self.drivers:
            everything_went = driver.unload_pending and not driver.devices
            assert everything_went == bool(self.unloaded[driver.name])


Random.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRandom = Random.TestCase
