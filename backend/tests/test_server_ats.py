"""ATS, PRI and PASID of a served function: what its config space shows, and what its enables do."""

import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import smmu_rig as hw
from tests.client import CONFIG
from tests.server_rig import BASE, ERROR, HALTED, Function, Machine, Make
from viommu.smmu import Features

ATS, PRI, PASID = 0x0F, 0x13, 0x1B
TABLE = BASE + 0x20_0000
IOVA = 0x5000


@pytest.fixture
def make() -> Iterator[Make]:
    with tempfile.TemporaryDirectory(prefix="vs-", dir="/tmp") as path, ExitStack() as stack:
        yield lambda **options: stack.enter_context(Machine(Path(path), **options))


def capabilities(function: Function) -> dict[int, int]:
    """Offset of each extended capability."""
    found, place = {}, 0x100
    while place:
        header = function.read_int(CONFIG, place, 4)
        if not header:
            break
        found[header & 0xFFFF] = place
        assert header >> 16 & 0xF == 1
        place = header >> 20
    return found


def attach(machine: Machine) -> tuple[Function, Function]:
    """Stream 0x10 with two CDs, `IOVA` mapped to the same place, ATS allowed."""
    smmu, engine = machine.connect("smmu"), machine.connect("engine0", bus_master=True)

    def put(address: int, *words: int) -> None:
        struct.pack_into(f"<{len(words)}Q", machine.ram, address - BASE, *words)

    contexts, level = TABLE + 0x1000, TABLE + 0x2000
    put(TABLE + 64 * 0x10, hw.STE_S1 | contexts | 1 << 59, 1 << 28 | 2)
    for index in range(2):
        put(contexts + 64 * index, hw.CD_PLAIN | hw.EPD1, level)
    put(level, level + 0x1000 | 3)
    put(level + 0x1000, level + 0x2000 | 3)
    put(level + 0x2000, level + 0x3000 | 3)
    put(level + 0x3000 + 8 * 5, BASE + 0x10_0000 | hw.PLAIN | hw.PAGE)
    smmu.put(hw.STRTAB_BASE, TABLE, 8)
    smmu.put(hw.STRTAB_BASE_CFG, 8)
    smmu.put(hw.CMDQ_BASE, TABLE + 0x8000 | 4, 8)
    smmu.put(hw.CR0, hw.SMMUEN | hw.CMDQEN)
    return smmu, engine


def fill(machine: Machine, engine: Function, **fields: Any) -> int:
    engine.fill(0x1000, at=IOVA, **fields)
    engine.start()
    machine.run()
    return engine.status()


def test_the_capabilities_are_laid_out(make: Make) -> None:
    engine = make(features=Features(endpoint_pasid=True, substream_id_bits=16)).connect("engine0")
    found = capabilities(engine)
    assert found.keys() == {ATS, PRI, PASID}
    assert struct.unpack("<HH", engine.read(CONFIG, found[ATS] + 4, 4)) == (0x60, 0)
    assert struct.unpack("<HHII", engine.read(CONFIG, found[PRI] + 4, 12)) == (0, 0x100, 64, 0)
    assert struct.unpack("<HH", engine.read(CONFIG, found[PASID] + 4, 4)) == (0x1006, 0)
    # What is read-only stays, what is not is kept.
    for place, size in ((found[ATS], 8), (found[PRI], 16), (found[PASID], 8)):
        engine.write(CONFIG, place + 4, b"\xff" * (size - 4))
    assert struct.unpack("<HH", engine.read(CONFIG, found[ATS] + 4, 4)) == (0x60, 0x801F)
    assert struct.unpack("<HHII", engine.read(CONFIG, found[PRI] + 4, 12)) == (
        1,
        0,
        64,
        0xFFFF_FFFF,
    )
    assert struct.unpack("<HH", engine.read(CONFIG, found[PASID] + 4, 4)) == (0x1006, 7)
    place = engine.read_int(CONFIG, 0x34, 1)
    assert engine.read_int(CONFIG, place, 1) == 0x10
    assert engine.read_int(CONFIG, place + 0x24, 4) >> 21 & 1
    engine.reset()
    assert struct.unpack("<HHII", engine.read(CONFIG, found[PRI] + 4, 12)) == (0, 0x100, 64, 0)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (Features(), {ATS, PRI}),
        (Features(pri=False), {ATS}),
        (Features(ats=False, pri=False), set()),
        (Features(ats=False, pri=False, endpoint_pasid=True), {PASID}),
    ],
)
def test_a_profile_chooses(make: Make, features: Features, expected: set[int]) -> None:
    machine = make(features=features)
    assert capabilities(machine.connect("engine0")).keys() == expected
    assert capabilities(machine.connect("smmu")).keys() == set()


def test_ats_enable_is_obeyed(make: Make) -> None:
    machine = make()
    _, engine = attach(machine)
    control = capabilities(engine)[ATS] + 6
    engine.put(0x1_0000, 1 << 8)  # the frame asks for it
    assert fill(machine, engine) == HALTED
    assert "TranslationCompleted" not in machine.kinds()
    engine.write(CONFIG, control, b"\x00\x80")
    assert fill(machine, engine) == HALTED
    assert machine.kinds().count("TranslationCompleted") == 1
    engine.reset()
    engine.set_bus_master(True)
    engine.put(0x1_0000, 1 << 8)
    assert fill(machine, engine) == HALTED
    assert machine.kinds().count("TranslationCompleted") == 1


def test_pasid_enable_is_obeyed(make: Make) -> None:
    machine = make(features=Features(endpoint_pasid=True, substream_id_bits=16))
    _, engine = attach(machine)
    engine.put(0x1_000C, 1)
    assert fill(machine, engine) == ERROR
    engine.write(CONFIG, capabilities(engine)[PASID] + 6, b"\x01\x00")
    assert fill(machine, engine) == HALTED
    engine.put(0x1_000C, 1 << 16)
    assert fill(machine, engine) == ERROR


def test_pri_shows_its_status(make: Make) -> None:
    machine = make()
    _, engine = attach(machine)
    found = capabilities(engine)
    engine.write(CONFIG, found[ATS] + 6, b"\x00\x80")
    engine.write(CONFIG, found[PRI] + 0xC, struct.pack("<I", 8))
    engine.write(CONFIG, found[PRI] + 4, b"\x01\x00")
    assert engine.read_int(CONFIG, found[PRI] + 6, 2) == 0
    machine.ram[0x20_5000 + 0x28 : 0x20_5000 + 0x30] = bytes(8)  # not mapped any more
    engine.put(0x1_0000, 3 << 8)
    assert fill(machine, engine) == ERROR  # PRIQEN is 0: Response Failure
    assert engine.read_int(CONFIG, found[PRI] + 6, 2) == 1
    engine.write(CONFIG, found[PRI] + 6, b"\x01\x00")
    assert engine.read_int(CONFIG, found[PRI] + 6, 2) == 0


@pytest.mark.parametrize("by_call", [False, True])
def test_the_server_gives_up_a_function_that_does_not_answer(make: Make, by_call: bool) -> None:
    machine = make(invalidation_timeout=60.0 if by_call else 0.0)
    smmu, engine = attach(machine)
    engine.write(CONFIG, capabilities(engine)[ATS] + 6, b"\x00\x80")
    service = machine.server._functions[1].port.ats  # type: ignore[union-attr]
    service.invalidate = lambda _request, _complete: None  # type: ignore[method-assign,union-attr]
    struct.pack_into("<4Q", machine.ram, TABLE + 0x8000 - BASE, 0x40 | 0x10 << 32, 52, 0x46, 0)
    smmu.put(hw.CMDQ_PROD, 2)
    for _ in range(10):
        machine.server.turn()
    if by_call:
        assert smmu.get(hw.GERROR) == 0
        assert machine.server.methods.call("server.invalidation_timeout", {}) == 1
        machine.server.turn()
    assert (smmu.get(hw.CMDQ_CONS), smmu.get(hw.GERROR)) == (1 | 3 << 24, 1)
