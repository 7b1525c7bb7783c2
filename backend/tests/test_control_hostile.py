"""Looking at what a hostile guest has written: every look ends, says little, is JSON, and changes nothing."""

import json
from collections.abc import Iterator

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import smmu_rig as hw
from tests.control_rig import every_look, views
from tests.hostile_rig import (
    BASE,
    SIZE,
    Prey,
    addresses,
    everywhere,
    plain,
    pointers,
    quick,
    qwords,
    substreams,
)
from viommu.smmu import Features
from viommu.trace import Event

numbers = st.integers(0, (1 << 32) - 1)
fewer = settings(quick, max_examples=20)
FETCHES = 150_000
"""More than all looks together may need: thousands of entries of a table, with a walk each."""
TEXT = 2 << 20
"""More than the answers to all of them may have, bytes."""


def look(prey: Prey, address: int, substream: int | None, number: int) -> None:
    """Look at everything, twice: the first look must have changed nothing."""
    prey.dma(address, 64, substream, 0)  # something is cached, if that can be
    before = bytes(prey.host), len(prey.smmu.tlb), len(prey.smmu.configuration)
    events: list[Event] = []
    end = prey.smmu.tracer.subscribe(events.append)
    prey.memory.fetches = 0
    first = every_look(prey, address, substream, number)
    assert prey.memory.fetches < FETCHES
    text = json.dumps(first)
    assert len(text) < TEXT
    assert every_look(prey, address, substream, number) == first
    end()
    assert events == []
    assert (bytes(prey.host), len(prey.smmu.tlb), len(prey.smmu.configuration)) == before


@everywhere
@fewer
@given(st.lists(qwords, min_size=8, max_size=8), addresses, substreams, numbers)
def test_random_stes(
    features: Features, words: list[int], address: int, substream: int | None, number: int
) -> None:
    prey = Prey(features)
    for stream in (hw.STREAM, number % 256):
        prey.poke(BASE + 64 * stream, *words)
    plain(prey)
    look(prey, address, substream, number % 512)


@everywhere
@fewer
@given(
    st.lists(qwords, min_size=64, max_size=64),
    pointers,
    st.integers(0, 63),
    st.integers(0, 3),
    st.integers(0, 31),
    addresses,
)
def test_random_stream_tables(
    features: Features, words: list[int], base: int, size: int, fmt: int, split: int, address: int
) -> None:
    prey = Prey(features)
    for place in range(0, SIZE, 512):
        prey.poke(BASE + place, *words)
    prey.write(hw.STRTAB_BASE, 8, base)
    prey.write(hw.STRTAB_BASE_CFG, 4, size | split << 6 | fmt << 16)
    prey.write(hw.CR0, 4, 0xD)
    look(prey, address, None, split * 64)


@everywhere
@fewer
@given(
    st.lists(st.tuples(st.integers(0, SIZE // 8 - 1), qwords), max_size=24),
    st.sampled_from((hw.STE_S1, hw.STE_S2, hw.STE_NESTED)),
    st.integers(0, 31),
    st.integers(0, 3),
    addresses,
    substreams,
)
@example([(0xA00 + i, BASE + 0x5000 | 0x443) for i in range(512)], hw.STE_NESTED, 0, 0, 0, None)
@example([(0xA00 + i, BASE + 0x5000 | 0x443) for i in range(512)], hw.STE_S1, 20, 1, 1 << 40, 64)
def test_random_tables(
    features: Features,
    table: list[tuple[int, int]],
    config: int,
    substreams_log2: int,
    s1_format: int,
    address: int,
    substream: int | None,
) -> None:
    prey = Prey(features)
    for index, word in table:
        prey.poke(BASE + 8 * index, word)
    first = config | s1_format << 4 | BASE + 0xF000 | substreams_log2 << 59
    stage_2 = 25 << 32 | 1 << 38 | 1 << 51 | 1 << 58 | 5 << 48
    prey.poke(BASE + 64 * hw.STREAM, first, 2, stage_2, BASE + 0x5000)
    prey.poke(BASE + 0xF000, hw.CD_PLAIN, BASE + 0x5000, BASE + 0x5000)
    plain(prey)
    look(prey, address, substream, hw.STREAM)


@fewer
@given(
    st.integers(0, 31),
    st.integers(0, 0xFFFF_FFFF),
    st.integers(0, 0xFFFF_FFFF),
    pointers,
    st.lists(qwords, min_size=8, max_size=8),
)
def test_queues_of_any_size_and_position(
    log2: int, prod: int, cons: int, base: int, words: list[int]
) -> None:
    prey = Prey(Features(command_queue_log2=9, event_queue_log2=9))
    for place in range(0, SIZE, 64):
        prey.poke(BASE + place, *words)
    for register in (hw.CMDQ_BASE, hw.EVENTQ_BASE, 0xC0):
        prey.write(register, 8, base | log2)
    for register, value in _positions(prod, cons):
        prey.write(register, 4, value)
    look(prey, 0, None, 0)


def _positions(prod: int, cons: int) -> Iterator[tuple[int, int]]:
    for registers in ((hw.CMDQ_PROD, hw.CMDQ_CONS), (hw.EVENTQ_PROD, hw.EVENTQ_CONS)):
        yield from zip(registers, (prod, cons), strict=True)
    yield 0x1_00C8, prod
    yield 0x1_00CC, cons


def test_all_the_substreams_and_nothing_behind_them() -> None:
    """2^14 leaf tables, of which none is there."""
    prey = Prey(Features())
    prey.poke(BASE + 64 * hw.STREAM, hw.STE_S1 | 1 << 4 | BASE | 20 << 59, 2)
    plain(prey)
    methods = views(prey.smmu)
    prey.memory.fetches = 0
    found = methods.call("smmu.contexts", {"stream_id": hw.STREAM, "first": 1 << 14})
    assert (found["contexts"], found["next"]) == ([], (1 << 14) + 512 * 64)
    assert prey.memory.fetches < 4096
    look(prey, 0, 5, hw.STREAM)
