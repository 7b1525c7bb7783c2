"""The test engine's translation cache: what it asks, what it keeps, and when it has forgotten (PCIe, 10.2 and 10.3)."""

from dataclasses import replace

import pytest

from tests import smmu_rig as hw
from tests.ats_engine_rig import (
    ATC_INV,
    CFGI_STE,
    ERROR,
    HALTED,
    IOVA,
    RAND48,
    SUM64,
    SYNC,
    TLBI,
    Engine,
)
from tests.ats_rig import ATSCHK, BOTH, EATS_SPLIT, ON, S2_MEM, S2_RW
from viommu.endpoints.atc import CAPACITY, AddressTranslationCache, CachedTranslation, Requester
from viommu.endpoints.pattern import rand48
from viommu.layouts.test_engine import UserFrame, offset_of
from viommu.smmu import InvalidateRequest

NOBODY = Requester(None, False)


def test_dma_goes_by_the_cache() -> None:
    engine = Engine()
    assert engine.run(RAND48, 4 * 4096, seed=7) == HALTED
    assert b"".join(engine.content()) == rand48(7, IOVA, IOVA, 4 * 4096)
    assert len(engine.ats.cache) == 4
    assert engine.rig.events() == []
    # The SMMU has nothing to do with it any more: not even a broken table matters, until the ATC is invalidated.
    for index in range(4):
        engine.map(index, 0)
    engine.rig.submit(TLBI, SYNC)
    assert engine.run(RAND48, 4 * 4096, seed=8) == HALTED
    assert b"".join(engine.content()) == rand48(8, IOVA, IOVA, 4 * 4096)
    engine.rig.submit(ATC_INV, SYNC)
    assert engine.run(RAND48, 4 * 4096, seed=9) == ERROR
    assert b"".join(engine.content()) == rand48(8, IOVA, IOVA, 4 * 4096)
    # A refused Translation Request is no event.
    assert engine.rig.events() == []


@pytest.mark.parametrize("off", ["frame", "function"])
def test_where_ats_is_off_transactions_are_untranslated(off: str) -> None:
    engine = Engine(eats=0)
    if off == "function":
        engine.enable(False)
    assert engine.run(RAND48, 4096, flags=0 if off == "frame" else 1 << 8, seed=7) == HALTED
    assert len(engine.ats.cache) == 0
    assert engine.content()[0] == rand48(7, IOVA, IOVA, 4096)


def test_detach_is_a_detach_with_transfers_in_flight() -> None:
    engine = Engine()
    engine.start(RAND48, 4 * 4096, seed=7)
    engine.engine.step()
    engine.rig.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_ABORT)
    engine.rig.submit(CFGI_STE, ATC_INV)
    assert engine.rig.consumed
    engine.rig.submit(SYNC)
    assert not engine.rig.consumed
    while not engine.rig.consumed:
        assert engine.engine.step() or engine.rig.consumed
    before = engine.content()
    assert any(before[0])
    assert engine.drain() in (HALTED, ERROR)
    assert engine.run(RAND48, 4 * 4096, seed=8) == ERROR
    assert engine.content() == before


@pytest.mark.parametrize("ended_by", ["step", "reset"])
def test_an_invalidation_waits_for_the_transfers_that_used_what_it_names(ended_by: str) -> None:
    engine = Engine()
    engine.start(RAND48, 4096, seed=7)
    engine.engine.step()
    away, here = (0x40 | hw.STREAM << 32, IOVA + 0x1000), (0x40 | hw.STREAM << 32, IOVA)
    engine.rig.submit(away)
    assert len(engine.rig.smmu.ats_port) == 0
    engine.rig.submit((here[0] | 1 << 11 | 5 << 12, here[1]))  # another PASID's
    assert len(engine.rig.smmu.ats_port) == 0
    engine.rig.submit(here, here)
    assert len(engine.rig.smmu.ats_port) == 2
    if ended_by == "step":
        assert engine.drain() == HALTED
    else:
        engine.engine.reset()
    assert len(engine.rig.smmu.ats_port) == 0
    engine.rig.submit(SYNC)
    assert engine.rig.consumed


def test_no_access_is_an_error_at_its_address_without_an_event() -> None:
    engine = Engine()
    engine.map(2, hw.PLAIN | hw.READ_ONLY | hw.PAGE)
    assert engine.run(RAND48, 4 * 4096, seed=7) == ERROR
    assert engine.engine.read(0, offset_of(UserFrame.udata2), 8) == IOVA + 0x2000
    assert [any(page) for page in engine.content()] == [True, True, False, False]
    assert engine.run(SUM64, 4 * 4096) == HALTED
    assert engine.rig.events() == []


def test_a_request_for_writing_follows_one_for_reading() -> None:
    engine = Engine(replace(BOTH, stage_2=False, hyp=False, httu=2))
    engine.rig.context(hw.CD_PLAIN | hw.HA | hw.HD)
    leaf = engine.pages[0] | hw.PLAIN | hw.READ_ONLY | 1 << 51 | hw.PAGE
    entry = engine.rig.map(IOVA, leaf)
    assert engine.run(SUM64, 4096) == HALTED
    assert engine.rig.get(entry) == leaf
    assert engine.run(RAND48, 4096) == HALTED
    assert engine.rig.get(entry) == leaf & ~hw.READ_ONLY
    assert len(engine.ats.cache) == 1


@pytest.mark.parametrize("status", ["UR", "CA"])
def test_a_refused_request_is_an_error(status: str) -> None:
    engine = Engine(eats=0)
    if status == "CA":
        engine.rig.ste(0)
    assert engine.run(RAND48, 4096) == ERROR
    assert [event[0] for event in engine.rig.events()] == ([0x05] if status == "UR" else [])
    assert len(engine.ats.cache) == 0


def test_a_forbidden_translated_transaction_is_an_error() -> None:
    engine = Engine(on=ON | ATSCHK)
    assert engine.run(RAND48, 4096, seed=1) == HALTED
    engine.rig.ste(hw.STE_S1 | engine.rig.cd_address, 0)
    assert engine.run(RAND48, 4096, seed=2) == ERROR
    assert engine.engine.read(0, offset_of(UserFrame.udata2), 8) == IOVA
    (event,) = engine.rig.events()
    assert (event[0], int.from_bytes(event[16:24], "little")) == (0x07, engine.pages[0])
    assert engine.content()[0] == rand48(1, IOVA, IOVA, 4096)


def test_split_stage() -> None:
    engine = Engine(BOTH, on=ON | ATSCHK)
    engine.rig.nest(EATS_SPLIT)
    ipa = 0x1_4000_0000
    engine.rig.map(IOVA, ipa | hw.PLAIN | hw.PAGE)
    engine.rig.map_2(ipa, engine.pages[3] | S2_RW | S2_MEM | hw.AF | hw.PAGE)
    engine.rig.forget()
    assert engine.run(RAND48, 4096, seed=5) == HALTED
    assert engine.content()[3] == rand48(5, IOVA, IOVA, 4096)
    assert engine.ats.cache.find(NOBODY, IOVA) == CachedTranslation(
        IOVA, 4096, ipa, True, True, True
    )


@pytest.mark.parametrize("stu", [0, 2, 4, 9, 31])
def test_a_larger_unit_asks_for_it(stu: int) -> None:
    engine = Engine()
    engine.enable(stu=stu)
    assert engine.run(RAND48, 4 * 4096, seed=7) == HALTED
    assert b"".join(engine.content()) == rand48(7, IOVA, IOVA, 4 * 4096)


def test_disabling_ats_and_reset_forget_everything() -> None:
    engine = Engine()
    engine.run(RAND48, 4096)
    engine.enable(False)
    assert len(engine.ats.cache) == 0
    engine.enable()
    engine.run(RAND48, 4096)
    engine.engine.reset()
    assert len(engine.ats.cache) == 0
    assert not engine.ats.enabled


# The cache


def test_entries_of_several_sizes_are_found_and_forgotten() -> None:
    cache = AddressTranslationCache()
    small = CachedTranslation(0x5000, 0x1000, 0xA000, True, False, False)
    large = CachedTranslation(0x20_0000, 0x20_0000, 0x80_0000, True, True, False)
    for requester in (NOBODY, Requester(5, False), Requester(5, True)):
        cache.insert(requester, small)
        cache.insert(requester, large)
    assert cache.find(NOBODY, 0x5FFF) == small
    assert cache.find(NOBODY, 0x6000) is None
    assert cache.find(Requester(5, True), 0x3F_FFFF) == large
    assert cache.find(Requester(6, False), 0x5000) is None
    cache.invalidate(InvalidateRequest(5, 0x5000, 0x1000))
    assert cache.find(Requester(5, True), 0x5000) is None
    assert cache.find(NOBODY, 0x5000) == small
    # One byte of a large one is enough, and without a PASID it is everybody's.
    cache.invalidate(InvalidateRequest(None, 0x3F_F000, 0x1000))
    assert len(cache) == 1
    cache.invalidate(InvalidateRequest(9, 0, 1 << 64, True))
    assert len(cache) == 0


def test_the_cache_is_bounded() -> None:
    cache = AddressTranslationCache()
    for page in range(CAPACITY + 10):
        cache.insert(NOBODY, CachedTranslation(page << 12, 4096, 0, True, False, False))
    assert len(cache) == CAPACITY
    assert cache.find(NOBODY, 9 << 12) is None
    assert cache.find(NOBODY, 10 << 12) is not None
