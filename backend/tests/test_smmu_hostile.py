"""Whatever the guest writes, wherever: no surprise comes out, every call ends, nothing outside its memory changes."""

import struct
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests import smmu_rig as hw
from viommu.endpoints.port import PORT_CHUNK, DmaAttributes, DmaFault, DmaPort, DmaStalled
from viommu.memory import GuestMemory
from viommu.smmu import (
    Access,
    Features,
    Smmu,
    Stalled,
    TransactionAborted,
    TransactionStalled,
    Translation,
)
from viommu.trace import Event, Tracer

BASE = 0x8000_0000
SIZE = 0x1_0000
ROM, ROM_SIZE = BASE + 0x2_0000, 0x4000
NOWHERE = BASE + 0x3_0000
MARGIN = 0x1000
CANARY = b"\xc5" * MARGIN
MANY = 20_000
"""More fetches than any one call may need: 256 commands, or 512 pages of four levels each."""

PROFILES = {
    "stage 1": hw.STAGE_1,
    "everything": Features(),
    "52 bits, hostile caches": Features(output_address_bits=52, caching="hostile", stall_max=2),
    "stalls, no caches": Features(stall_model="stall", caching="none"),
}
everywhere = pytest.mark.parametrize("features", PROFILES.values(), ids=PROFILES)


class CountedMemory(GuestMemory):
    """Counts what the SMMU fetches: work that is bounded is counted work."""

    def __init__(self) -> None:
        super().__init__()
        self.fetches = 0

    def load_u64(self, address: int) -> int:
        self.fetches += 1
        return super().load_u64(address)

    def read(self, address: int, size: int) -> bytes:
        self.fetches += 1
        return super().read(address, size)


class Prey:
    """An SMMU and a port over 64 KiB of RAM between canaries, a ROM, and a range without memory behind it."""

    def __init__(self, features: Features | None = None, *, traced: bool = False) -> None:
        self.host = bytearray(CANARY + bytes(SIZE) + CANARY + bytes(range(256)) * 64 + CANARY)
        self.rest = bytes(self.host[MARGIN + SIZE :])
        view = memoryview(self.host)
        self.ram = view[MARGIN : MARGIN + SIZE]
        self.memory = CountedMemory()
        self.memory.add_region(BASE, SIZE, self.ram)
        rom = MARGIN + SIZE + MARGIN
        self.memory.add_region(ROM, ROM_SIZE, view[rom : rom + ROM_SIZE], writable=False)
        self.memory.add_region(NOWHERE, 0x1000, None)
        tracer = Tracer()
        if traced:
            tracer.subscribe(self._read_along)
        self.smmu = Smmu(self.memory, features, tracer)
        self.port = DmaPort(self.memory, 0x10, self.smmu, tracer)
        self.port.bus_master = True
        self.held: list[Translation] = []
        self.stalled: list[Stalled] = []

    @staticmethod
    def _read_along(event: Event) -> None:
        event.as_dict()

    def poke(self, address: int, *words: int) -> None:
        """Write into RAM, as the guest does: at any aligned place of it."""
        for index, word in enumerate(words):
            offset = (address + 8 * index) % SIZE & ~7
            struct.pack_into("<Q", self.ram, offset, word & 2**64 - 1)

    def check(self) -> None:
        """What must hold after every call."""
        assert self.memory.fetches < MANY
        self.memory.fetches = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.smmu.write(offset, size, value)
        self.check()

    def read(self, offset: int, size: int) -> None:
        assert 0 <= self.smmu.read(offset, size) < 1 << 8 * max(size, 1)
        self.check()

    def step(self) -> None:
        self.smmu.step()
        self.check()

    def translate(self, access: Access, address: int, size: int, *, hold: bool) -> None:
        try:
            translation = self.smmu.translate(access, address, size)
        except TransactionAborted:
            self.check()
            return
        except TransactionStalled as held:
            self.check()
            self.stall(held.stalled)
            return
        self.check()
        assert 0 < translation.size <= min(size, 1 << 21)
        assert sum(translation.runs[1::2]) == translation.size
        limit = 1 << self.smmu.features.output_address_bits
        assert all(
            start + length <= limit
            for start, length in zip(translation.runs[::2], translation.runs[1::2], strict=True)
        )
        if hold:
            self.held.append(translation)
        else:
            self.smmu.retire(translation)

    def stall(self, stalled: Stalled) -> None:
        assert self.smmu.features.stalls
        assert stalled.resolution is None
        assert len(self.smmu.stalls) <= self.smmu.features.stall_max
        self.stalled.append(stalled)

    def dma(self, address: int, size: int, substream: int | None, flags: int) -> None:
        with suppress(DmaFault, DmaStalled):
            attributes = DmaAttributes(bool(flags & 2), bool(flags & 4))
            write = bool(flags & 1)
            with self.port.begin(
                address, size, write=write, substream_id=substream, attributes=attributes
            ) as transfer:
                assert 0 < transfer.size <= min(size, PORT_CHUNK)
                if write:
                    transfer.write_from(bytes(transfer.size))
                else:
                    transfer.read_into(bytearray(transfer.size))
        self.check()

    def end_stalls(self) -> None:
        """Everyone who waits is told something when the SMMU is disabled."""
        self.write(hw.CR0, 4, 1)
        self.write(hw.CR0, 4, 0)
        assert len(self.smmu.stalls) == 0
        assert all(stalled.resolution for stalled in self.stalled)

    def retire(self, index: int) -> None:
        if self.held:
            self.smmu.retire(self.held.pop(index % len(self.held)))
            self.check()

    def finish(self) -> None:
        """Everything ends: what is in flight, what waits for it, and the queue, which is empty or stopped."""
        while self.held:
            self.retire(0)
        assert len(self.smmu.in_flight) == 0
        for _ in range(10_000):
            if not self.smmu.busy:
                break
            self.step()
        assert not self.smmu.busy
        self.end_stalls()
        cr0, ack = self.smmu.read(hw.CR0, 4), self.smmu.read(hw.CR0ACK, 4)
        assert cr0 == ack
        assert not self.smmu.read(hw.GBPA, 4) & 1 << 31
        assert self.host[:MARGIN] == CANARY
        assert self.host[MARGIN + SIZE :] == self.rest


# What hostile values are made of: pointers into, beside and beyond memory, alone or with bits set.

edges = [BASE, BASE + SIZE - 8, BASE + SIZE, BASE - 8, ROM, ROM + ROM_SIZE - 8, NOWHERE, 0]
edges += [1 << 32, 1 << 48, (1 << 48) - 8, (1 << 52) - 0x1000, (1 << 52) - 1, (1 << 64) - 8]
pointers = st.one_of(
    st.sampled_from(edges),
    st.integers(0, SIZE // 64 - 1).map(lambda n: BASE + 64 * n),
    st.integers(0, SIZE // 4096 - 1).map(lambda n: BASE + 4096 * n),
)
qwords = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.builds(
        lambda pointer, low, high: pointer | low | high << 52, pointers, st.integers(0, 4095), st.integers(0, 4095)
    ),
    st.integers(0, 63).map(lambda n: 1 << n),
)  # fmt: skip
addresses = st.one_of(pointers, st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 30))
substreams = st.one_of(st.none(), st.integers(0, 3), st.integers(0, (1 << 20) - 1))
sizes = st.one_of(st.integers(1, 0x3000), st.sampled_from([1 << 21, 1 << 40, (1 << 64) - 1]))

quick = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plain(prey: Prey) -> None:
    """Registers that make sense, so that what is hostile lies behind them."""
    prey.write(hw.STRTAB_BASE, 8, BASE)
    prey.write(hw.STRTAB_BASE_CFG, 4, 8)
    prey.write(hw.CR2, 4, 2)
    prey.write(hw.CMDQ_BASE, 8, BASE + 0x8000 | 4)
    prey.write(hw.EVENTQ_BASE, 8, BASE + 0x9000 | 3)
    prey.write(hw.CR0, 4, 0xD)


def probe(prey: Prey, address: int, substream: int | None) -> None:
    for flags in range(8):
        prey.dma(address, 0x2000, substream, flags)
    prey.finish()


@everywhere
@quick
@given(st.lists(qwords, min_size=8, max_size=8), addresses, substreams)
def test_random_stes(
    features: Features, words: list[int], address: int, substream: int | None
) -> None:
    prey = Prey(features)
    prey.poke(BASE + 64 * 0x10, *words)
    plain(prey)
    probe(prey, address, substream)


@everywhere
@quick
@given(st.lists(qwords, min_size=4, max_size=4), st.integers(0, 63), addresses, substreams)
def test_almost_good_cds(
    features: Features, words: list[int], flipped: int, address: int, substream: int | None
) -> None:
    prey = Prey(features)
    prey.poke(BASE + 64 * 0x10, hw.STE_S1 | BASE + 0x5000 | 1 << 59, 2)
    for index in range(2):
        prey.poke(BASE + 0x5000 + 64 * index, hw.CD_PLAIN ^ 1 << flipped ^ 1 << 63, *words)
    plain(prey)
    probe(prey, address, None if substream is None else substream & 1)


@everywhere
@quick
@given(
    st.lists(st.tuples(st.integers(0, SIZE // 8 - 1), qwords), max_size=24),
    st.integers(16, 39),
    addresses,
)
@example([(0xA00 + i, BASE + 0x5000 | 0x443) for i in range(512)], 16, 0)  # points at itself
@example([(0xA00 + i, BASE + 0x5000 | 0x443) for i in range(512)], 39, 0x1FF_FFFF)
def test_random_tables(
    features: Features, table: list[tuple[int, int]], t0sz: int, address: int
) -> None:
    prey = Prey(features)
    for index, word in table:
        prey.poke(BASE + 8 * index, word)
    cd = hw.CD_PLAIN & ~0x3F | t0sz
    prey.poke(BASE + 64 * 0x10, hw.STE_S1 | BASE + 0xF000, 0)
    prey.poke(BASE + 0xF000, cd, BASE + 0x5000, BASE + 0x5000)
    plain(prey)
    probe(prey, address & (1 << 64 - t0sz) - 1, None)


@everywhere
@quick
@given(st.lists(st.tuples(qwords, qwords), min_size=1, max_size=16), st.integers(0, 0xFFFF_FFFF))
def test_random_commands(features: Features, commands: list[tuple[int, int]], prod: int) -> None:
    prey = Prey(features)
    plain(prey)
    prey.poke(BASE + 64 * 0x10, hw.STE_BYPASS)
    prey.translate(Access(0x10), 0x1000, 1, hold=True)
    for index, command in enumerate(commands):
        prey.poke(BASE + 0x8000 + 16 * index, *command)
    prey.write(hw.CMDQ_PROD, 4, prod)
    for _ in range(len(commands)):
        # Acknowledge every error: the next command, or the same again.
        cons = prey.smmu.read(hw.CMDQ_CONS, 4)
        if prey.smmu.read(hw.GERROR, 4) != prey.smmu.read(hw.GERRORN, 4):
            prey.poke(BASE + 0x8000 + 16 * (cons & 15), 0x46, 0)
        prey.write(hw.GERRORN, 4, prey.smmu.read(hw.GERROR, 4))
        prey.step()
    prey.finish()


@quick
@given(
    st.integers(0, 31), st.integers(0, 31), st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFFFF_FFFF), pointers, pointers
)  # fmt: skip
@example(31, 31, 0xFFFF_FFFF, 0, BASE, BASE)
@example(31, 31, 0x8_0000, 0x7_FFFF, BASE - 8, BASE + SIZE)
def test_queues_of_any_size_and_position(
    command_log2: int, event_log2: int, first: int, second: int, commands: int, events: int
) -> None:
    prey = Prey(Features(command_queue_log2=9, event_queue_log2=9))
    prey.write(hw.STRTAB_BASE_CFG, 4, 0)
    prey.write(hw.CR2, 4, 2)
    prey.write(hw.CMDQ_BASE, 8, commands | command_log2)
    prey.write(hw.EVENTQ_BASE, 8, events | event_log2)
    for offset, value in (
        (hw.CMDQ_PROD, first),
        (hw.CMDQ_CONS, second),
        (hw.EVENTQ_PROD, first),
        (hw.EVENTQ_CONS, second),
    ):
        prey.write(offset, 4, value)
    prey.write(hw.CR0, 4, 0xD)
    for stream in range(4):
        prey.translate(Access(stream), 0x1000, 1, hold=False)
        prey.write(hw.CMDQ_PROD, 4, second + stream)
        prey.write(hw.EVENTQ_CONS, 4, first + stream)
        prey.write(hw.GERRORN, 4, prey.smmu.read(hw.GERROR, 4))
    prey.finish()


actions = st.one_of(
    st.tuples(
        st.just("write"),
        st.one_of(st.integers(0, 0xE0 // 4).map(lambda n: 4 * n), st.integers(-16, 0x2_0010)),
        st.sampled_from([4, 8, 4, 8, 0, 1, 2, 3, 16]),
        qwords,
    ),
    st.tuples(st.just("read"), st.integers(-16, 0x2_0010), st.sampled_from([0, 1, 2, 4, 8])),
    st.tuples(st.just("poke"), st.integers(0, SIZE - 1), qwords),
    st.tuples(st.just("dma"), addresses, sizes, substreams, st.integers(0, 7)),
    st.tuples(st.just("hold"), st.integers(0, 0xFFFF_FFFF), addresses, sizes),
    st.tuples(st.just("retire"), st.integers(0, 9)),
    st.tuples(st.just("step")),
    st.tuples(st.just("reset")),
)


@everywhere
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(actions, max_size=16), st.booleans())
def test_any_sequence(features: Features, sequence: list[tuple[Any, ...]], traced: bool) -> None:
    prey = Prey(features, traced=traced)
    plain(prey)
    for action, *parameters in sequence:
        perform(prey, action, parameters)
    prey.finish()


def perform(prey: Prey, action: str, parameters: list[Any]) -> None:
    match action:
        case "hold":
            stream, address, size = parameters
            prey.translate(Access(stream), address, size, hold=True)
        case "reset":
            prey.smmu.reset()
        case _:
            getattr(prey, action)(*parameters)


def wild(random: Random) -> int:
    """A 64-bit word that might mean something."""
    kind = random.random()
    if kind < 0.2:
        return random.getrandbits(64)
    pointer = BASE + random.randrange(SIZE // 64) * 64 if kind < 0.9 else random.choice(edges)
    if random.random() < 0.5:
        pointer &= ~0xFFF
    valid = random.choice((0, 1, 3, 3, 3, 0x443, 0xC43, 0x441, 0xC3, hw.STE_S1, hw.STE_BYPASS))
    return pointer | valid | (random.getrandbits(12) << 52 if random.random() < 0.2 else 0)


@everywhere
@settings(max_examples=120, deadline=None)
@given(st.integers(0, (1 << 32) - 1))
def test_long_wild_sessions(features: Features, seed: int) -> None:
    """RAM full of plausible words, and 150 actions of a guest out of its mind."""
    random = Random(seed)
    prey = Prey(features, traced=seed % 4 == 0)
    words = [wild(random) for _ in range(64)]
    struct.pack_into(f"<{SIZE // 8}Q", prey.ram, 0, *random.choices(words, k=SIZE // 8))
    for offset in range(0, SIZE, 64 * 7):  # contexts here and there
        prey.poke(BASE + offset, hw.CD_PLAIN ^ (1 << random.randrange(64)), *words[:3])
    # The port's own stream gets through to the tables, until something is written over it.
    prey.poke(BASE + 64 * 0x10, hw.STE_S1 | BASE + 0xF000, 0)
    prey.poke(BASE + 0xF000, hw.CD_PLAIN & ~0x3F | 25, BASE + 0x4000, BASE + 0x4000)
    plain(prey)
    commands = (1, 2, 3, 4, 5, 6, *range(0x10, 0x14), *range(0x20, 0x24), 0x28, 0x2A, 0x30)
    commands += (0x44, 0x45, 0x46, 0x46, 0x46, 0x46)
    for _ in range(150):
        kind = random.randrange(12)
        if kind < 4:
            size = random.choice((1, 8, 0x1000, 0x5123, 1 << 21))
            address = random.choice((wild(random), random.getrandbits(24), random.getrandbits(39)))
            stream = random.choice((0x10, 0x10, random.randrange(300)))
            substream = random.choice((None, None, random.randrange(4)))
            access = Access(stream, substream, *(random.random() < 0.4 for _ in range(3)))
            prey.translate(access, address, size, hold=random.random() < 0.2)
        elif kind < 6:
            prey.dma(
                random.getrandbits(random.choice((24, 31, 39, 64))),
                random.choice((1, 0x1800, 1 << 21)),
                random.choice((None, None, None, 1)),
                random.randrange(8),
            )
        elif kind < 8:
            prod = prey.smmu.read(hw.CMDQ_PROD, 4)
            command = random.choice(commands) | random.getrandbits(64) & ~0x4FF
            prey.poke(BASE + 0x8000 + (prod & 15) * 16, command, wild(random))
            prey.write(hw.CMDQ_PROD, 4, prod + 1)
            prey.write(hw.GERRORN, 4, prey.smmu.read(hw.GERROR, 4))
        elif kind == 8:
            prey.retire(random.randrange(9))
        elif kind == 9:
            prey.poke(random.randrange(SIZE), wild(random))
        elif kind == 10 and random.random() < 0.3:
            offset = random.choice((4 * random.randrange(0x40), random.randrange(0x2_0000)))
            prey.write(offset, random.choice((4, 8)), random.choice((wild(random), 0xD, 8)))
        else:
            prey.step()
    prey.finish()


def test_caches_stay_small_whatever_is_prefetched() -> None:
    """CMD_PREFETCH names any stream and substream: what it fills is bounded."""
    prey = Prey()
    plain(prey)
    prey.write(hw.CR0, 4, 0)
    prey.write(hw.STRTAB_BASE_CFG, 4, 16)
    prey.write(hw.CR0, 4, 1)
    prey.memory.clear()
    ste = struct.pack("<8Q", hw.STE_S1 | BASE + (8 << 20) | 13 << 59, 2, *(0,) * 6)
    cd = struct.pack("<8Q", hw.CD_PLAIN, BASE, BASE, *(0,) * 5)
    big = bytearray(ste * (8 << 14) + cd * (8 << 10))
    prey.memory.add_region(BASE, len(big), memoryview(big))
    for number in range(20_000):
        access = Access(number % 0x4000, number * 7 % 0x2000)
        with suppress(TransactionAborted):
            prey.smmu.translate(access, 0x1000, 1)
    assert 4096 < len(prey.smmu.configuration) <= 2 * 4096
