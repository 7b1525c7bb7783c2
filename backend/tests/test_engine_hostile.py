"""A guest that writes anything anywhere: nothing raises, nothing runs away, nothing is left in flight."""

from hypothesis import given, settings
from hypothesis import strategies as st

from viommu.endpoints.port import DmaAttributes, DmaPort, Transfer
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.layouts.test_engine import (
    BAR_SIZE,
    FRAME_COUNT,
    PRIVILEGED_PAGE,
    EngineCommand,
    user_frame,
)
from viommu.memory import GuestMemory
from viommu.smmu import Translation

BASE = 0x1_0000
SIZE = 0x4_0000
TOP = (1 << 64) - 0x1000
SETTLED = (EngineCommand.HALTED, EngineCommand.ERROR, EngineCommand.FRAME_MISCONFIGURED)
RUNNING = (EngineCommand.MEMCPY, EngineCommand.RAND48, EngineCommand.SUM64)

# Values of the kind that gets past the checks, so that commands run, next to any value at all.
addresses = st.builds(
    lambda base, offset: (base + offset) % (1 << 64),
    st.sampled_from([0, BASE, BASE + SIZE, TOP, 1 << 32, 1 << 63]),
    st.integers(-0x3000, 0x3000) | st.sampled_from([-1, 0, 7, 8, 0xFFF]),
)
values = (
    st.integers(0, 8)
    | addresses
    | st.integers(0, (1 << 64) - 1)
    | st.sampled_from([(1 << 64) - 1, 0xFFFF_FFFF, 0xFFFF_FFFE, 64 << 20, 1 << 16, 1 << 62])
)
sizes = st.sampled_from([4, 4, 8, 8, 1, 2]) | st.integers(0, 300)
offsets = (
    st.builds(
        lambda page, frame, field: page + frame * 128 + field,
        st.sampled_from([0, 0, 0, PRIVILEGED_PAGE]),
        st.integers(0, 2),
        st.sampled_from(range(0, 128, 4)) | st.integers(0, 127),
    )
    | st.integers(-16, BAR_SIZE + 16)
    | st.integers(-(1 << 64), 1 << 64)
)
writes = st.tuples(st.just("write"), st.sampled_from([0, 0, 0, 0, 1, 5]), offsets, sizes, values)
reads = st.tuples(st.just("read"), st.sampled_from([0, 0, 2]), offsets, sizes)


def mostly(strategy: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    """One time in sixteen any value: a command has nine, and most have to be good for it to run."""
    return st.integers(0, 15).flatmap(lambda number: strategy if number else values)


commands = st.tuples(
    st.just("command"),
    st.integers(0, 2) | st.integers(0, FRAME_COUNT - 1),
    st.sampled_from(RUNNING),
    mostly(addresses.map(lambda address: address & ~7) | addresses),
    mostly(st.integers(1, 0xA00).map(lambda n: 8 * n - 1) | st.integers(-8, 0x5000)),
    mostly(st.sampled_from([1, 1, 1, 8, 64, 1 << 32])),
    values,
    mostly(addresses),
    mostly(st.integers(0, 1)),
    mostly(st.integers(60, 70)),
)
others = st.sampled_from(
    [("step",), ("step",), ("steps",), ("reset",), ("bus_master",), ("unmap",)]
)


class CheckingPort(DmaPort):
    def move(self, translation: Translation, buffer: bytes | bytearray | memoryview) -> None:
        assert translation.size <= 0x4_0000
        super().move(translation, buffer)

    def begin(
        self,
        iova: int,
        size: int,
        *,
        write: bool,
        substream_id: int | None = None,
        attributes: DmaAttributes = DmaAttributes(),  # noqa: B008 – as the original has it
    ) -> Transfer:
        assert 0 <= iova < iova + size <= 1 << 64
        return super().begin(
            iova, size, write=write, substream_id=substream_id, attributes=attributes
        )


class Hostile:
    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.read_only = bytes(range(256)) * 16
        self.memory.add_region(0, 0x1000, None)
        self.map()
        self.memory.add_region(BASE + SIZE, 0x1000, memoryview(self.read_only), writable=False)
        self.memory.add_region(TOP, 0x1000, memoryview(bytearray(0x1000)))
        self.port = CheckingPort(self.memory, 0x10)
        self.port.bus_master = True
        self.engine = SmmuTestEngine(self.port)
        self.engine.interrupt = self._interrupt

    def _interrupt(self, vector: int) -> bool:
        assert 0 <= vector < self.engine.msix_vectors
        return bool(vector & 1)

    def map(self) -> None:
        self.memory.add_region(BASE, SIZE, memoryview(bytearray(SIZE)))
        self.mapped = True

    def apply(self, kind: str, *values: int) -> None:
        engine = self.engine
        if kind == "write":
            engine.write(*values)
        elif kind == "read":
            value = engine.read(*values)
            assert 0 <= value < 1 << 8 * values[2] or value == 0
        elif kind == "command":
            frame, command, begin, length, stride, seed, destination, msiaddress, msidata = values
            for offset, value in (
                (0x10, msiaddress),
                (0x18, msidata & 0xFFFF_FFFF),
                (0x20, seed << 32 & (1 << 64) - 1),
                (0x28, begin),
                (0x30, begin + length & (1 << 64) - 1),
                (0x38, stride),
                (0x40, destination),
            ):
                engine.write(0, user_frame(frame) + offset, 8, value)
            engine.write(0, user_frame(frame), 4, command)
        elif kind == "step":
            assert engine.step() == engine.busy
        elif kind == "steps":
            for _ in range(100):
                engine.step()
        elif kind == "reset":
            engine.reset()
        elif kind == "bus_master":
            self.port.bus_master = not self.port.bus_master
        elif self.mapped:
            self.memory.remove_region(BASE, SIZE)
            self.mapped = False
        else:
            self.map()

    def check(self) -> None:
        states = [self.engine.read(0, user_frame(frame), 4) for frame in range(FRAME_COUNT)]
        running = [state for state in states if state in RUNNING]
        assert all(state in RUNNING or state in SETTLED for state in states)
        assert bool(running) == self.engine.busy
        assert 0 <= self.port.in_flight <= len(running)
        assert self.engine.read(0, user_frame(FRAME_COUNT), 64) == 0


@settings(deadline=2000, max_examples=500)
@given(st.lists(writes | reads | commands | commands | others, min_size=5, max_size=60))
def test_no_access_and_no_step_raises_or_leaves_something_behind(
    actions: list[tuple[str, *tuple[int, ...]]],
) -> None:
    hostile = Hostile()
    for action in actions:
        hostile.apply(*action)
        hostile.check()
    hostile.engine.reset()
    assert hostile.port.in_flight == 0
    assert not hostile.engine.busy
    assert hostile.read_only == bytes(range(256)) * 16


@settings(deadline=2000, max_examples=300)
@given(commands)
def test_a_random_command_ends_or_goes_on_in_small_steps(
    command: tuple[str, *tuple[int, ...]],
) -> None:
    hostile = Hostile()
    hostile.apply(*command)
    for _ in range(2000):
        if not hostile.engine.step():
            break
    hostile.check()
    hostile.engine.reset()
    hostile.check()


def test_one_write_over_the_whole_bar() -> None:
    hostile = Hostile()
    for byte in (b"\xff", b"\x02", b"\0"):
        hostile.engine.write(0, 0, BAR_SIZE, int.from_bytes(byte * BAR_SIZE, "little"))
        hostile.engine.write(0, 0, 1 << 40, 1)
        hostile.check()
        assert not hostile.engine.busy
    assert hostile.engine.read(0, 0, 1 << 40) >> 8 * BAR_SIZE == 0
