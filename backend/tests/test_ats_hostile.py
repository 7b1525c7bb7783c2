"""ATS, PRI and ATOS before a guest and a function out of their minds: every call ends, nothing unexpected comes out."""

from contextlib import suppress
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import smmu_rig as hw
from tests.ats_engine_rig import ATS_ON, IOVA, PRI_ON, RAND48, SUM64, Engine
from tests.ats_rig import ATSCHK, ON, S2_WORD
from viommu.layouts.test_engine import EngineCommand
from viommu.smmu import Access, AtsStatus, Features, PageRequest, TransactionAborted
from viommu.smmu.ats_port import INVALIDATE_QUEUE_DEPTH

REGISTERS: tuple[int, ...] = (
    hw.CR0,
    hw.CR2,
    0xC0,
    0xC4,
    0xC8,
    0xCC,
    0xD0,
    0xD8,
    0xDC,
    0x100,
    0x108,
    0x10C,
    0x110,
    0x114,
    0x118,
)
REGISTERS += (hw.GERRORN, hw.IRQ_CTRL, hw.CMDQ_PROD, 0x1_00C8, 0x1_00CC, hw.EVENTQ_CONS)


def word(random: Random, engine: Engine) -> int:
    kind = random.random()
    if kind < 0.3:
        return random.getrandbits(64)
    base = random.choice((engine.rig.low, engine.rig.cd_address, hw.STRTAB, hw.COMMANDS, 0, IOVA))
    return (base | random.choice((0, 1, 3, 0x443, 0xC43, hw.STE_S1, hw.STE_NESTED))) & 2**64 - 1


def act(random: Random, engine: Engine) -> None:
    rig, smmu = engine.rig, engine.rig.smmu
    match random.randrange(11):
        case 0:
            rig.put(
                random.choice((hw.STRTAB + 64 * hw.STREAM, rig.cd_address, rig.low)),
                word(random, engine),
            )
        case 1:
            ste = hw.STE_NESTED | rig.cd_address, random.getrandbits(32), S2_WORD, rig.low
            rig.put(hw.STRTAB + 64 * hw.STREAM, *ste)
        case 2:
            size = random.choice((4, 8))
            smmu.write(random.choice(REGISTERS) & -size, size, word(random, engine))
        case 3:
            rig.write(hw.CR0, ON | random.choice((0, 2, ATSCHK, ATSCHK | 2)))
        case 4:
            command = (
                random.choice((0x40, 0x41, 0x46, 0x30, 3)) | random.getrandbits(32) << 8 & ~0xFF
            )
            stream = random.choice((hw.STREAM, hw.STREAM, random.getrandbits(32)))
            at = hw.COMMANDS + 16 * random.randrange(32)
            rig.put(at, command & 2**32 - 1 | stream << 32, word(random, engine))
            rig.write(hw.CMDQ_PROD, rig.read(hw.CMDQ_PROD) + 1 & 63)
        case 5:
            access = Access(
                hw.STREAM,
                random.choice((None, 0, 1, 2**20 - 1)),
                False,
                *random.choices((True, False), k=2),
            )
            answer = smmu.ats_translate(
                access, word(random, engine), random.getrandbits(10), no_write=random.random() < 0.5
            )
            if answer.status is AtsStatus.SUCCESS:
                assert answer.size >= 4096
                assert not answer.address & answer.size - 1
        case 6:
            request = PageRequest(
                hw.STREAM,
                random.choice((None, 5)),
                word(random, engine),
                random.randrange(512),
                random.random() < 0.5,
                random.random() < 0.5,
            )
            smmu.page_request(request)
        case 7:
            engine.start(
                random.choice((RAND48, SUM64, EngineCommand.MEMCPY)), 0x4000,
                flags=random.choice((0, ATS_ON, ATS_ON | PRI_ON)), substream=random.choice((-1, 0, 1)),
            )  # fmt: skip
        case 8:
            for capability in engine.ats.capabilities:
                body = bytearray(random.randbytes(len(capability.body)))
                body[0] |= 1
                capability.written(bytes(body))
        case 9:
            with suppress(TransactionAborted):
                rig.pass_through(
                    word(random, engine), random.randrange(1, 1 << 40), write=random.random() < 0.5
                )
        case _:
            random.choice((smmu.step, engine.engine.step, engine.engine.step, smmu.give_up))()
    assert len(smmu.ats_port) <= INVALIDATE_QUEUE_DEPTH
    if engine.ats.pri is not None:
        assert engine.ats.pri.outstanding <= 64


@pytest.mark.parametrize("caching", ["none", "normal", "hostile"])
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_long_sessions(caching: str, seed: int) -> None:
    random = Random(seed)
    engine = Engine(Features(granules=(12,), caching=caching))
    for _ in range(150):
        act(random, engine)
    engine.engine.reset()
    engine.rig.smmu.give_up()
    assert len(engine.rig.smmu.in_flight) == 0
    assert len(engine.rig.smmu.ats_port) == 0
