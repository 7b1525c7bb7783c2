"""Hostile tables of both stages: pointing at themselves, at each other, at nothing, and changing under the SMMU."""

import struct
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import smmu_rig as hw
from tests.hostile_rig import (
    BASE,
    MANY,
    ROM,
    SIZE,
    Prey,
    addresses,
    everywhere,
    plain,
    probe,
    quick,
    qwords,
    substreams,
)
from tests.stages_rig import S2AA64, S2HA, S2HD, S2PTW, S2R, S2S, S2TG, TG0
from viommu.smmu import Access, Features

STREAM = 0x10
CD = BASE + 0xF000
TABLES = BASE + 0x4000
OFFSETS = st.sampled_from([0, BASE, BASE - 0x1000, 1 << 32, 1 << 39])


@st.composite
def stage_2_words(draw: Any) -> tuple[int, int]:
    """The third and fourth word of an STE whose stage 2 is legal, or would be but for one bit."""
    granule = draw(st.sampled_from([12, 14, 16]))
    sl0 = draw(st.integers(0, 2))
    below = granule + (granule - 3) * (1 + sl0 if granule == 12 else sl0)
    bits = draw(st.integers(max(below + 1, 25), min(below + granule - 3 + 4, 48)))
    word = (64 - bits) << 32 | sl0 << 38 | S2TG[granule] | S2AA64 | 5 << 48
    for flag in (S2HA, S2HD, S2PTW, S2R, S2S):
        word |= flag * draw(st.booleans())
    if draw(st.integers(0, 7)) == 0:
        word ^= 1 << draw(st.integers(0, 63))
    return word, TABLES + draw(st.integers(0, 8)) * 0x400


@everywhere
@quick
@given(
    stage_2_words(),
    st.sampled_from([hw.STE_S2, hw.STE_NESTED, hw.STE_NESTED]),
    st.lists(st.tuples(st.integers(0, SIZE // 8 - 1), qwords), max_size=24),
    addresses,
    substreams,
)
def test_random_tables_of_stage_2(
    features: Features,
    words: tuple[int, int],
    config: int,
    table: list[tuple[int, int]],
    address: int,
    substream: int | None,
) -> None:
    prey = Prey(features)
    for index, word in table:
        prey.poke(BASE + 8 * index, word)
    prey.poke(CD, hw.CD_PLAIN | hw.HA | hw.HD, TABLES, TABLES)
    prey.poke(BASE + 64 * STREAM, config | CD, 0, *words)
    plain(prey)
    probe(prey, address, substream)


def everything(word: int) -> bytes:
    return struct.pack("<Q", word) * (SIZE // 8)


SELVES = {
    "one table, which is its own": TABLES | 0x7C3,
    "one block": BASE & ~0x3FFF_FFFF | 0x7C1,
    "a page of RAM": BASE | 0x7C3,
    "a page of the ROM": ROM | 0x7C3,
    "a table in the ROM": ROM | 3,
    "clean and cold": TABLES | 1 << 51 | 0x0C3 & ~0x480 | 0x40,
    "reserved": TABLES | 1,
    "all ones": (1 << 64) - 1,
}


@everywhere
@pytest.mark.parametrize("word", SELVES.values(), ids=SELVES)
@pytest.mark.parametrize("granule", [12, 14, 16])
def test_memory_full_of_one_word(features: Features, word: int, granule: int) -> None:
    """Whatever the SMMU looks at, tables of both stages and the CD's page too, says the same."""
    for sl0 in range(3):
        below = granule + (granule - 3) * (1 + sl0 if granule == 12 else sl0)
        bits = min(max(below + 4, 32), 48)
        for config in (hw.STE_S1, hw.STE_S2, hw.STE_NESTED):
            prey = Prey(features)
            prey.ram[:] = everything(word)
            s2 = (64 - bits) << 32 | sl0 << 38 | S2TG[granule] | S2AA64 | S2R | 5 << 48
            cd = hw.CD_PLAIN & ~(3 << 6) | TG0[granule] | hw.EPD1
            if features.httu:
                s2 |= S2HA | S2HD
                cd |= hw.HA | hw.HD
            if not features.stage_2 and config != hw.STE_S1:
                continue
            prey.poke(CD, cd, TABLES, TABLES)
            prey.poke(BASE + 64 * STREAM, config | CD, 0, s2, TABLES)
            plain(prey)
            prey.poke(CD, cd, TABLES, TABLES)
            for address in (0, 0x1000, BASE, CD, (1 << bits) - 0x1000, 1 << 40):
                prey.translate(Access(STREAM, None, True), address, 1 << 21, hold=False)
                prey.dma(address, 0x3000, None, 1)
            assert prey.memory.fetches < MANY
            prey.finish()


@everywhere
@settings(max_examples=60, deadline=None)
@given(st.integers(0, (1 << 32) - 1))
@example(0)
def test_tables_that_change_between_any_two_loads(features: Features, seed: int) -> None:
    """Another CPU scribbles while the SMMU walks."""
    random = Random(seed)
    prey = Prey(features)
    memory = prey.memory
    words = [TABLES | 0x7C3, TABLES | 3, BASE | 0x443, ROM | 0x7C3, 0, 1 << 51 | TABLES | 0x7C3, 5]
    load = memory.load_u64

    def scribble(address: int) -> int:
        if random.random() < 0.5:
            place = random.choice((address, TABLES + random.randrange(0x1000)))
            if BASE <= place < BASE + SIZE:
                prey.poke(place, random.choice(words) ^ (1 << random.randrange(64)))
        return load(address)

    memory.load_u64 = scribble  # type: ignore[method-assign]
    prey.ram[:] = everything(TABLES | 0x7C3)
    s2 = 24 << 32 | 1 << 38 | S2AA64 | S2R | 5 << 48 | (S2HA | S2HD if features.httu else 0)
    for config in (hw.STE_S1, hw.STE_NESTED):
        prey.poke(BASE + 64 * STREAM, config | CD, 0, s2, TABLES)
        prey.poke(CD, hw.CD_PLAIN | (hw.HA | hw.HD if features.httu else 0), TABLES, TABLES)
        plain(prey)
        for _ in range(30):
            address = random.choice((0, 0x1000, BASE, random.getrandbits(39)))
            access = Access(STREAM, None, random.random() < 0.5)
            prey.translate(access, address, random.choice((1, 1 << 21)), hold=random.random() < 0.1)
            prey.write(hw.CMDQ_PROD, 4, 0)
        prey.finish()


@everywhere
@settings(max_examples=60, deadline=None)
@given(st.integers(0, (1 << 32) - 1))
def test_long_sessions_with_both_stages(features: Features, seed: int) -> None:
    """Streams of all kinds over tables that mean something, any command, stalls answered at random."""
    random = Random(seed)
    prey = Prey(features, traced=seed % 4 == 0)
    for place in range(TABLES, CD, 8):
        kind = random.random()
        page = BASE + random.randrange(SIZE >> 12) * 0x1000
        if kind < 0.6:
            prey.poke(place, page | random.choice((3, 0x7C3, 0x7C1, 0x443, 0xC3 | 1 << 51)))
        elif kind < 0.7:
            prey.poke(place, random.getrandbits(64))
    for stream in range(16, 24):
        s2 = random.choice((24 << 32 | 1 << 38, 25 << 32 | 1 << 38, 30 << 32, 16 << 32 | 2 << 38))
        s2 |= S2AA64 | 5 << 48 | random.choice((0, S2R, S2S, S2R | S2PTW, S2HA | S2HD))
        config = random.choice((hw.STE_S1, hw.STE_S2, hw.STE_NESTED))
        second = random.choice((0, 0, 2 << 30, 1 << 19))
        prey.poke(BASE + 64 * stream, config | CD, second, s2 | stream % 3, TABLES)
    stall = hw.STALL if features.stalls and random.random() < 0.7 else 0
    prey.poke(CD, hw.CD_PLAIN | stall, TABLES, TABLES + 0x1000)
    plain(prey)
    opcodes = [*range(0x10, 0x14), *range(0x20, 0x24), 0x28, 0x2A, 0x30, 3, 4, 5, 6, 0x46, 0x46]
    for _ in range(120):
        kind = random.randrange(10)
        if kind < 6:
            access = Access(random.randrange(16, 24), None, *(random.random() < 0.4 for _ in "123"))
            address = random.choice((random.getrandbits(24), random.getrandbits(39), BASE))
            prey.translate(access, address, random.choice((1, 0x3000)), hold=random.random() < 0.2)
        elif kind < 8:
            opcode = random.choice(opcodes)
            low = opcode | random.getrandbits(64) & ~0x4FF
            high = random.getrandbits(64)
            if prey.stalled and random.random() < 0.5:
                stalled = random.choice(prey.stalled)
                low = random.choice((0x44, 0x45)) | 1 << random.choice((12, 13, 14))
                low |= stalled.access.stream_id << 32
                high = stalled.stag or 0
            prod = prey.smmu.read(hw.CMDQ_PROD, 4)
            prey.poke(BASE + 0x8000 + (prod & 15) * 16, low, high)
            prey.write(hw.CMDQ_PROD, 4, prod + 1)
            prey.write(hw.GERRORN, 4, prey.smmu.read(hw.GERROR, 4))
        elif kind == 8:
            prey.retire(random.randrange(9))
        else:
            prey.write(hw.EVENTQ_CONS, 4, prey.smmu.read(hw.EVENTQ_PROD, 4))
    prey.finish()
