"""What a device of one's own has from its base: generators that do DMA and take turns."""

from typing import Any

import pytest

from tests.engine_rig import BASE, RecordingPort
from viommu.endpoints.master import Bar, DmaAttributes, DmaFault, DmaMaster, Identity, Steps
from viommu.endpoints.port import DmaStalled, Transfer
from viommu.endpoints.transfers import Transfers
from viommu.memory import GuestMemory

PAGE = 0x1000
HOLE = BASE + PAGE


class Copier(DmaMaster):
    """Copies `size` bytes from `BASE` to the address that is written."""

    identity = Identity(0x1234, 0x5305, 0xFF_0000)
    bars = (Bar(0, PAGE),)
    size = 16

    def power_on(self) -> None:
        self.ended: list[str] = []

    def read(self, bar: int, offset: int, size: int) -> int:
        return len(self.ended)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.start(self.copy(value))

    def copy(self, target: int) -> Steps:
        try:
            data = yield from self.dma.read(BASE, self.size)
            yield from self.dma.write(target, data)
            self.ended.append(f"{target - BASE:#x}")
        except DmaFault as fault:
            self.ended.append(f"fault at {fault.address - BASE:#x}")
        self.interrupt(0)


class Rig:
    def __init__(self, kind: type[Copier] = Copier) -> None:
        self.ram = bytearray(b"0123456789abcdef" + bytes(4 * PAGE - 16))
        memory = GuestMemory()
        memory.add_region(BASE, len(self.ram), memoryview(self.ram))
        self.port = RecordingPort(memory)
        self.port.holes = {HOLE}
        self.model = kind(self.port, name="copier")
        self.model.reset()

    def run(self) -> int:
        steps = 0
        while self.model.busy:
            self.model.step()
            steps += 1
            assert steps < 1000
        return steps


def test_defaults() -> None:
    model = Rig().model
    assert (model.msix_vectors, model.capabilities, model.register_name(16)) == (0, (), "0x10")
    assert (model.busy, model.idle) == (False, True)
    assert not model.interrupt(0), "nobody listens yet"
    assert not model.pin_enabled()
    model.pin_released()
    assert not model.bars[0].prefetchable


def test_bytes_move_in_steps() -> None:
    rig = Rig()
    rig.model.write(0, 0, 8, BASE + 0x100)
    assert (rig.model.busy, rig.model.idle) == (True, False)
    assert rig.port.seen == [], "nothing happens in the access"
    rig.model.step()
    assert rig.port.in_flight == 1
    assert rig.ram[0x100] == 0
    rig.run()
    assert bytes(rig.ram[0x100:0x110]) == b"0123456789abcdef"
    assert [(iova - BASE, size, write) for iova, size, write, *_ in rig.port.seen] == [
        (0, 16, False),
        (0x100, 16, True),
    ]
    assert (rig.model.ended, rig.model.idle, rig.port.in_flight) == (["0x100"], True, 0)


def test_a_refused_dma_is_an_exception_in_the_generator() -> None:
    rig = Rig()
    rig.model.write(0, 0, 8, HOLE + 8)
    rig.run()
    assert rig.model.ended == ["fault at 0x1008"]


def test_several_take_turns() -> None:
    rig = Rig()
    for place in (0x100, 0x200):
        rig.model.write(0, 0, 8, BASE + place)
    rig.model.step()
    rig.model.step()
    assert rig.port.in_flight == 2
    rig.run()
    assert rig.model.ended == ["0x100", "0x200"]


def test_a_reset_ends_what_is_in_flight_and_powers_on() -> None:
    rig = Rig()
    rig.model.write(0, 0, 8, BASE + 0x100)
    rig.run()
    rig.model.write(0, 0, 8, BASE + 0x200)
    rig.model.step()
    assert rig.port.in_flight == 1
    rig.model.reset()
    assert (rig.port.in_flight, rig.model.idle, rig.model.read(0, 0, 4)) == (0, True, 0)
    rig.run()
    assert rig.ram[0x200] == 0


class Held:
    """A transaction that waits for software."""

    address = BASE
    resolution: str | None = None


@pytest.mark.parametrize(("answer", "ended"), [("retry", "0x100"), ("abort", "fault at 0x0")])
def test_a_stalled_dma_waits_for_software(answer: str, ended: str) -> None:
    rig, held = Rig(), Held()
    begin = rig.port.begin

    def stall(iova: int, size: int, **access: Any) -> Transfer:
        if iova == BASE and held.resolution != "retry":
            raise DmaStalled(held)
        return begin(iova, size, **access)

    rig.port.begin = stall  # type: ignore[method-assign]
    rig.model.write(0, 0, 8, BASE + 0x100)
    rig.run()
    assert (rig.model.busy, rig.model.idle, rig.model.ended) == (False, False, [])
    held.resolution = answer
    rig.run()
    assert rig.model.ended == [ended]


class Privileged(Copier):
    attributes = DmaAttributes(privileged=True, ats=True)


def test_what_its_transactions_say_of_themselves() -> None:
    rig = Rig(Privileged)
    rig.model.write(0, 0, 8, BASE + 0x100)
    rig.run()
    assert {said[3:] for said in rig.port.seen} == {(None, Privileged.attributes)}
    rig.port.seen.clear()
    rig.model.start(Transfers(rig.port, substream_id=5).write(BASE, b"x"))
    rig.run()
    assert rig.port.seen == [(BASE, 1, True, 5, DmaAttributes())]


def test_nothing_can_be_moved() -> None:
    rig = Rig()
    rig.model.size = 0
    rig.model.write(0, 0, 8, BASE + 0x100)
    rig.run()
    assert rig.model.ended == ["0x100"]
    assert rig.port.seen == []


def test_what_is_no_generator() -> None:
    rig = Rig()
    with pytest.raises(TypeError, match=r"start takes a generator: start\(self"):
        rig.model.start(rig.model.copy)  # type: ignore[arg-type]
