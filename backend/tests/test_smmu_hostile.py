"""Whatever the guest writes, wherever: no surprise comes out, every call ends, nothing outside its memory changes."""

import struct
from contextlib import suppress
from random import Random
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests import smmu_rig as hw
from tests.hostile_rig import (
    BASE,
    SIZE,
    Prey,
    addresses,
    edges,
    everywhere,
    plain,
    pointers,
    probe,
    quick,
    qwords,
    sizes,
    substreams,
)
from viommu.smmu import Access, Features, TransactionAborted


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
