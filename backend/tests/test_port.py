"""The port of an endpoint: what goes through, what is refused, and what is in flight."""

import random
from collections.abc import Iterator

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.endpoints.port import (
    PORT_CHUNK,
    DmaAttributes,
    DmaFault,
    DmaMoved,
    DmaPort,
    DmaRefused,
)
from viommu.memory import GuestMemory
from viommu.trace import Event, Tracer

BASE = 0x4000_0000
SIZE = 4 << 20
LEAF = hw.PLAIN | hw.PAGE
CFGI_STE_SYNC = (0x03 | hw.STREAM << 32, 1), (0x46, 0)


class Bare:
    """A port that no SMMU is in front of."""

    def __init__(self) -> None:
        self.ram = bytearray(random.Random(1).randbytes(SIZE))
        self.memory = GuestMemory()
        self.memory.add_region(BASE, SIZE, memoryview(self.ram))
        self.events: list[Event] = []
        tracer = Tracer()
        tracer.subscribe(self.events.append)
        self.port = DmaPort(self.memory, 0x10, None, tracer)
        self.port.bus_master = True


@pytest.fixture
def bare() -> Bare:
    return Bare()


class Behind:
    """A port behind an SMMU that maps IOVA 0x1000 and 0x2000 to pages that are not adjacent."""

    PAGES = hw.BASE + 0x30_0000, hw.BASE + 0x20_0000

    def __init__(self) -> None:
        self.events: list[Event] = []
        tracer = Tracer()
        self.rig = Rig(tracer=tracer)
        for iova, page in zip((0x1000, 0x2000), self.PAGES, strict=True):
            self.rig.map(iova, page | LEAF)
        tracer.subscribe(self.events.append)
        self.port = DmaPort(self.rig.memory, hw.STREAM, self.rig.smmu, tracer)
        self.port.bus_master = True


@pytest.fixture
def behind() -> Iterator[Behind]:
    made = Behind()
    yield made
    assert not len(made.rig.smmu.in_flight), "every transaction has ended"


def test_bytes_move_both_ways(bare: Bare) -> None:
    buffer = bytearray(0x123)
    with bare.port.begin(BASE + 0x45, 0x123, write=False) as transfer:
        assert (transfer.iova, transfer.size) == (BASE + 0x45, 0x123)
        transfer.read_into(buffer)
    assert buffer == bare.ram[0x45 : 0x45 + 0x123]
    before = bytes(bare.ram)
    with bare.port.begin(BASE + 0x1001, 5, write=True) as transfer:
        transfer.write_from(b"abcdefgh")
    assert bytes(bare.ram) == before[:0x1001] + b"abcde" + before[0x1006:]
    assert bare.events == [
        DmaMoved(0x10, None, BASE + 0x45, 0x123, write=False, first=BASE + 0x45, transaction=0),
        DmaMoved(0x10, None, BASE + 0x1001, 5, write=True, first=BASE + 0x1001, transaction=0),
    ]


def test_a_transaction_has_a_largest_size(bare: Bare) -> None:
    with bare.port.begin(BASE, SIZE, write=False) as transfer:
        assert transfer.size == PORT_CHUNK == 2 << 20


@pytest.mark.parametrize("size", [0, -1])
def test_a_transaction_of_nothing(bare: Bare, size: int) -> None:
    with pytest.raises(ValueError, match=f"a transaction of {size} bytes"):
        bare.port.begin(BASE, size, write=True)


def test_a_transfer_has_one_direction(bare: Bare) -> None:
    read, write = (bare.port.begin(BASE, 8, write=write) for write in (False, True))
    with read, pytest.raises(ValueError, match="other direction"):
        read.write_from(bytes(8))
    with write, pytest.raises(ValueError, match="other direction"):
        write.read_into(bytearray(8))
    assert not bare.events


def test_a_transfer_that_is_done(bare: Bare) -> None:
    transfer = bare.port.begin(BASE, 8, write=True)
    transfer.done()
    transfer.done()
    for use in (lambda: transfer.size, lambda: transfer.write_from(bytes(8))):
        with pytest.raises(ValueError, match="the transfer is done"):
            use()


def test_nothing_goes_out_while_bus_master_is_off(behind: Behind) -> None:
    behind.port.bus_master = False
    with pytest.raises(DmaFault, match="aborted at 0x1000: Bus Master is off") as raised:
        behind.port.begin(0x1000, 8, write=True)
    assert (raised.value.address, raised.value.done) == (0x1000, 0)
    assert behind.events == [DmaRefused(hw.STREAM, 0x1000, write=True, why="Bus Master is off")]
    assert not behind.rig.events(), "the SMMU sees nothing"


@pytest.mark.parametrize("write", [False, True])
def test_memory_that_ends_inside_a_transfer(bare: Bare, write: bool) -> None:
    buffer = bytearray(b"\x77" * 0x2000)
    transfer = bare.port.begin(BASE + SIZE - 0x800, 0x2000, write=write)
    with transfer, pytest.raises(DmaFault) as raised:
        (transfer.write_from if write else transfer.read_into)(buffer)
    assert (raised.value.address, raised.value.done) == (BASE + SIZE, 0x800)
    if write:
        assert bare.ram[-0x800:] == b"\x77" * 0x800
    else:
        assert buffer[:0x800] == bare.ram[-0x800:]
    (event,) = bare.events
    assert isinstance(event, DmaRefused)
    assert (event.iova, event.write) == (BASE + SIZE, write)


def test_scattered_pages(behind: Behind) -> None:
    data = random.Random(2).randbytes(0x1000)
    with behind.port.begin(0x1800, 0x1000, write=True) as transfer:
        assert transfer.size == 0x1000
        transfer.write_from(data)
    first, second = (page - hw.BASE for page in Behind.PAGES)
    assert behind.rig.ram[first + 0x800 : first + 0x1000] == data[:0x800]
    assert behind.rig.ram[second : second + 0x800] == data[0x800:]
    buffer = bytearray(0x1000)
    with behind.port.begin(0x1800, 0x1000, write=False) as transfer:
        transfer.read_into(buffer)
    assert buffer == data


def test_a_later_page_that_does_not_translate(behind: Behind) -> None:
    with behind.port.begin(0x2F00, 0x1000, write=True) as transfer:
        assert transfer.size == 0x100, "what goes through before the fault"
        transfer.write_from(bytes(0x100))
    assert not behind.rig.events()
    with pytest.raises(DmaFault, match="aborted at 0x3000") as raised:
        behind.port.begin(0x3000, 0xF00, write=True)
    assert (raised.value.address, raised.value.done) == (0x3000, 0)
    (record,) = behind.rig.events()
    assert record[0] == 0x10, "F_TRANSLATION"
    assert [event.kind for event in behind.events if "Dma" in event.kind] == [
        "DmaMoved",
        "DmaRefused",
    ]


def test_what_a_transaction_says_of_itself(behind: Behind) -> None:
    behind.rig.map(0x5000, Behind.PAGES[0] | hw.AF | hw.NG | hw.PAGE)  # for the privileged alone
    with pytest.raises(DmaFault):
        behind.port.begin(0x5000, 8, write=False)
    behind.port.begin(0x5000, 8, write=False, attributes=DmaAttributes(privileged=True)).done()
    behind.rig.map(0x6000, Behind.PAGES[0] | LEAF | hw.UXN)
    behind.port.begin(0x6000, 8, write=False).done()
    with pytest.raises(DmaFault):
        behind.port.begin(0x6000, 8, write=False, attributes=DmaAttributes(instruction=True))
    with pytest.raises(DmaFault):
        behind.port.begin(0x1000, 8, write=False, substream_id=3)
    assert [record[0] for record in behind.rig.events()] == [0x13, 0x13, 0x08]


def test_a_held_transfer_is_in_flight(behind: Behind) -> None:
    transfer = behind.port.begin(0x1000, 0x1000, write=True)
    behind.rig.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_ABORT)
    behind.rig.submit(*CFGI_STE_SYNC)
    assert behind.rig.read(hw.CMDQ_CONS) == 1, "CMD_SYNC waits"
    transfer.write_from(b"\x5a" * 0x1000)  # it was translated before
    assert behind.rig.read(hw.CMDQ_CONS) == 1
    transfer.done()
    behind.rig.run()
    assert behind.rig.consumed
    assert behind.rig.ram[Behind.PAGES[0] - hw.BASE] == 0x5A
    with pytest.raises(DmaFault):
        behind.port.begin(0x1000, 0x1000, write=True)


def test_a_transfer_that_fails_is_not_left_in_flight(behind: Behind) -> None:
    behind.rig.map(0x7000, 0xF_0000_0000 | LEAF)  # no memory there
    transfer = behind.port.begin(0x7010, 8, write=False)
    with pytest.raises(DmaFault, match="aborted at 0x7010"), transfer:
        transfer.read_into(bytearray(8))
    behind.rig.submit(*CFGI_STE_SYNC)
    assert behind.rig.consumed


def test_there_is_nothing_beyond_64_bits() -> None:
    for port in (Bare().port, Behind().port):
        with pytest.raises(DmaFault, match="64 bits"):
            port.begin(1 << 64, 64, write=False)
        assert port.in_flight == 0
