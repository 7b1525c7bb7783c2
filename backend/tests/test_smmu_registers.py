"""Registers: reset values, sizes of accesses, handshakes, and what may not be written now (IHI 0070, 6.2 and 6.3)."""

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.smmu import Features

ALL = 0xFFFF_FFFF
ALL64 = 0xFFFF_FFFF_FFFF_FFFF
# 48 bits of output addresses: what is above is RES0 in every address.
ADDRESS = (1 << 48) - 1


@pytest.fixture
def fresh() -> Rig:
    """Everything as after reset, but the tables are in memory."""
    rig = Rig(on=0)
    rig.smmu.reset()
    return rig


def test_reset_values(fresh: Rig) -> None:
    expected = {
        hw.CR0: 0,
        hw.CR0ACK: 0,
        hw.CR1: 0,
        hw.CR2: 0,
        hw.GBPA: 0x1000,  # SHCFG: use incoming
        hw.IRQ_CTRL: 0,
        hw.IRQ_CTRLACK: 0,
        hw.GERROR: 0,
        hw.GERRORN: 0,
        hw.STRTAB_BASE_CFG: 0,
        hw.CMDQ_PROD: 0,
        hw.CMDQ_CONS: 0,
        hw.EVENTQ_PROD: 0,
        hw.EVENTQ_CONS: 0,
        hw.IIDR: 0,
        hw.AIDR: 0,  # SMMUv3.0
        0x40: 0,
        0x48: 0,
    }
    assert {offset: fresh.read(offset) for offset in expected} == expected
    for offset in (hw.STRTAB_BASE, hw.CMDQ_BASE, hw.EVENTQ_BASE, hw.GERROR_IRQ_CFG0):
        assert fresh.read64(offset) == 0


# offset, width, the bits that stay: every other one is RES0 or belongs to an absent feature.
WRITABLE = [
    (hw.CR1, 4, 0xFFF),
    (hw.CR2, 4, 0x6),
    (hw.IRQ_CTRL, 4, 0x5),
    (hw.GERRORN, 4, 0x1B5),
    (hw.GERROR_IRQ_CFG0, 8, ADDRESS & ~3),
    (hw.GERROR_IRQ_CFG1, 4, ALL),
    (hw.GERROR_IRQ_CFG2, 4, 0x3F),
    (hw.STRTAB_BASE, 8, 1 << 62 | ADDRESS & ~0x3F),
    (hw.STRTAB_BASE_CFG, 4, 0x3_07FF),
    (hw.CMDQ_BASE, 8, 1 << 62 | ADDRESS),
    (hw.CMDQ_PROD, 4, 0xF_FFFF),
    (hw.EVENTQ_BASE, 8, 1 << 62 | ADDRESS),
    (hw.EVENTQ_CONS, 4, 0x800F_FFFF),
    (hw.EVENTQ_IRQ_CFG0, 8, ADDRESS & ~3),
    (hw.EVENTQ_IRQ_CFG1, 4, ALL),
    (hw.EVENTQ_IRQ_CFG2, 4, 0x3F),
]


@pytest.mark.parametrize(("offset", "size", "kept"), WRITABLE)
def test_writable_bits(fresh: Rig, offset: int, size: int, kept: int) -> None:
    fresh.smmu.write(offset, size, ALL64 >> (64 - 8 * size))
    assert fresh.smmu.read(offset, size) == kept
    fresh.smmu.write(offset, size, 0)
    assert fresh.smmu.read(offset, size) == 0


READ_ONLY = [0x0, 0x4, 0x8, 0xC, 0x10, 0x14, 0x18, 0x1C, 0x24, 0x40, 0x54, 0x60]
RESERVED = [0x30, 0x38, 0x5C, 0xC0, 0xC8, 0x100, 0x108, 0xE00, 0xFD0, 0xFFC, 0x8000, 0x1_0000]


@pytest.mark.parametrize("offset", READ_ONLY + RESERVED + [0x1_0020, 0x1_0098, 0x1_FFF8])
def test_what_is_not_writable_stays(fresh: Rig, offset: int) -> None:
    before = fresh.read(offset)
    if offset not in READ_ONLY:
        assert before == 0
    fresh.write(offset, ALL)
    assert fresh.read(offset) == before


@pytest.mark.parametrize("offset", [hw.STRTAB_BASE, hw.CMDQ_BASE, hw.GERROR_IRQ_CFG0, 0xA0, 0xB0])
def test_halves_of_a_64_bit_register(fresh: Rig, offset: int) -> None:
    fresh.write(offset, 0x1234_5600)
    fresh.write(offset + 4, 0x1357)
    assert fresh.read64(offset) == 0x1357_1234_5600
    assert (fresh.read(offset), fresh.read(offset + 4)) == (0x1234_5600, 0x1357)
    fresh.write(offset + 4, 0)
    assert fresh.read64(offset) == 0x1234_5600


def test_64_bit_access_to_two_32_bit_registers(fresh: Rig) -> None:
    fresh.write64(hw.CR1, 0x2_0000_0ABC)
    assert (fresh.read(hw.CR1), fresh.read(hw.CR2)) == (0xABC, 2)
    assert fresh.read64(hw.CR1) == 0x2_0000_0ABC


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        *((0x22, 4), (0x84, 8), (0x81, 4), (-8, 8), (0x2_0000, 4), (0x1_FFFC, 8), (1 << 70, 4)),
        *((0x80, size) for size in (0, 1, 2, 3, 5, 16)),
    ],
)
def test_unsupported_accesses_do_nothing(fresh: Rig, offset: int, size: int) -> None:
    before = [fresh.read(address) for address in range(0, 0x100, 4)]
    fresh.smmu.write(offset, size, ALL)
    assert fresh.smmu.read(offset, size) == 0
    assert [fresh.read(address) for address in range(0, 0x100, 4)] == before


def test_event_queue_indices_are_seen_from_page_0_too(fresh: Rig) -> None:
    fresh.write(0xA8, 1)
    fresh.write(hw.EVENTQ_CONS, 4)
    assert (fresh.read(hw.EVENTQ_PROD), fresh.read(0xAC)) == (1, 4)


# The last words that a reader may see of indices: RAZ above the wrap bit (6.3.28, 6.3.95).
def test_indices_of_the_smmu_hide_bits_above_the_wrap_bit(fresh: Rig) -> None:
    fresh.write64(hw.CMDQ_BASE, hw.COMMANDS | 3)
    fresh.write64(hw.EVENTQ_BASE, hw.EVENTS | 2)
    fresh.write(hw.CMDQ_CONS, ALL)
    fresh.write(hw.EVENTQ_PROD, ALL)
    assert fresh.read(hw.CMDQ_CONS) == 0x7F00_000F
    assert fresh.read(hw.EVENTQ_PROD) == 0x8000_0007


# Handshakes


@pytest.mark.parametrize("value", [0, 1, 4, 8, 0xC, 0xD])
def test_cr0_is_acknowledged(fresh: Rig, value: int) -> None:
    fresh.write(hw.CR0, value)
    assert (fresh.read(hw.CR0), fresh.read(hw.CR0ACK)) == (value, value)
    fresh.write(hw.CR0, 0)
    assert (fresh.read(hw.CR0), fresh.read(hw.CR0ACK)) == (0, 0)


def test_cr0_bits_of_absent_features_are_never_acknowledged(fresh: Rig) -> None:
    fresh.write(hw.CR0, ALL)
    assert (fresh.read(hw.CR0), fresh.read(hw.CR0ACK)) == (0xD, 0xD)


def test_irq_ctrl_is_acknowledged(fresh: Rig) -> None:
    for value in (1, 4, 5, 0):
        fresh.write(hw.IRQ_CTRL, value)
        assert (fresh.read(hw.IRQ_CTRL), fresh.read(hw.IRQ_CTRLACK)) == (value, value)


def test_gbpa_needs_update_and_clears_it(fresh: Rig) -> None:
    fresh.write(hw.GBPA, 1 << 20)
    assert fresh.read(hw.GBPA) == 0x1000
    fresh.write(hw.GBPA, 1 << 31 | 1 << 20 | 0x2_0000)
    assert fresh.read(hw.GBPA) == 1 << 20


def test_gbpa_abort_is_silent() -> None:
    rig = Rig(on=hw.EVENTQEN)
    assert rig.physical(0x1234) == 0x1234
    rig.write(hw.GBPA, 1 << 31 | 1 << 20)
    assert rig.fault(0x1234) is None
    rig.write(hw.GBPA, 1 << 31)
    assert rig.physical(0x1234) == 0x1234


def test_gbpa_update_waits_for_what_is_in_flight() -> None:
    rig = Rig(on=hw.EVENTQEN)
    old = rig.begin(0x1000)
    rig.write(hw.GBPA, 1 << 31 | 1 << 20)
    assert rig.read(hw.GBPA) == 1 << 31 | 1 << 20
    rig.write(hw.GBPA, 1 << 31)  # while an update is under way: ignored
    assert rig.read(hw.GBPA) == 1 << 31 | 1 << 20
    assert rig.fault(0x1000) is None
    rig.smmu.retire(old)
    assert rig.read(hw.GBPA) == 1 << 20


def test_disabled_smmu_aborts_above_its_output_size_without_an_event() -> None:
    rig = Rig(Features(output_address_bits=36), on=hw.EVENTQEN)
    assert rig.go((1 << 36) - 4, 64) == [((1 << 36) - 4, 4)]
    assert rig.fault(1 << 36) is None
    assert rig.physical(0x1000, substream=3) == 0x1000


def test_smmuen_is_acknowledged_as_cleared_when_translated_transactions_are_done() -> None:
    rig = Rig()
    rig.map(0x1000, hw.BASE | hw.PLAIN | hw.PAGE)
    old = rig.begin(0x1000)
    rig.write(hw.CR0, hw.CMDQEN | hw.EVENTQEN)
    assert (rig.read(hw.CR0), rig.read(hw.CR0ACK)) == (0xC, 0xD)
    # What comes now bypasses already, and does not hold up the acknowledgement.
    new = rig.begin(0x1000)
    assert new.runs[0] == 0x1000
    rig.smmu.retire(old)
    assert rig.read(hw.CR0ACK) == 0xC
    rig.smmu.retire(new)


def test_smmuen_toggled_twice_waits_for_the_later_transactions_too() -> None:
    rig = Rig()
    rig.map(0x1000, hw.BASE | hw.PLAIN | hw.PAGE)
    first = rig.begin(0x1000)
    rig.write(hw.CR0, 0)
    rig.write(hw.CR0, hw.SMMUEN)
    second = rig.begin(0x1000)
    for _ in range(1000):
        rig.write(hw.CR0, 0)
        rig.write(hw.CR0, hw.SMMUEN)
    assert len(rig.smmu.in_flight._waiters) == 1  # they do not pile up
    rig.write(hw.CR0, 0)
    rig.smmu.retire(first)
    assert rig.read(hw.CR0ACK) == hw.SMMUEN
    rig.smmu.retire(second)
    assert rig.read(hw.CR0ACK) == 0
    assert len(rig.smmu.in_flight._waiters) == 0


# Guards


GUARDED = [
    (hw.SMMUEN, hw.CR2, 4),
    (hw.SMMUEN, hw.STRTAB_BASE, 8),
    (hw.SMMUEN, hw.STRTAB_BASE_CFG, 4),
    (hw.CMDQEN, hw.CMDQ_BASE, 8),
    (hw.CMDQEN, hw.CMDQ_CONS, 4),
    (hw.EVENTQEN, hw.EVENTQ_BASE, 8),
    (hw.EVENTQEN, hw.EVENTQ_PROD, 4),
]


@pytest.mark.parametrize(("enable", "offset", "size"), GUARDED)
def test_enables_guard_their_registers(enable: int, offset: int, size: int) -> None:
    rig = Rig(on=0)
    others = (hw.SMMUEN | hw.CMDQEN | hw.EVENTQEN) & ~enable
    before = rig.smmu.read(offset, size)
    rig.write(hw.CR0, enable)
    rig.smmu.write(offset, size, 0x1_2346)
    if size == 8:
        rig.write(offset + 4, 0x55)
    assert rig.smmu.read(offset, size) == before
    rig.write(hw.CR0, others)
    rig.smmu.write(offset, size, 0x1_2346)
    assert rig.smmu.read(offset, size) != before


@pytest.mark.parametrize(
    ("offset", "value"), [(hw.CR2, 4), (hw.STRTAB_BASE, 0x4000), (hw.STRTAB_BASE_CFG, 3)]
)
def test_an_unacknowledged_smmuen_guards_too(offset: int, value: int) -> None:
    rig = Rig()
    rig.map(0x1000, hw.BASE | hw.PLAIN | hw.PAGE)
    before = rig.read(offset)
    held = rig.begin(0x1000)
    rig.write(hw.CR0, 0)
    rig.write(offset, value)
    assert rig.read(offset) == before
    rig.smmu.retire(held)
    rig.write(offset, value)
    assert rig.read(offset) == value


def test_cr1_queue_fields_and_table_fields_have_their_own_guards() -> None:
    rig = Rig(on=0)
    for enable, free in [(hw.SMMUEN, 0x03F), (hw.CMDQEN, 0xFC0), (hw.EVENTQEN, 0xFC0)]:
        rig.write(hw.CR0, enable)
        rig.write(hw.CR1, 0xFFF)
        assert rig.read(hw.CR1) == free
        rig.write(hw.CR0, 0)
        rig.write(hw.CR1, 0)


@pytest.mark.parametrize(("enable", "base"), [(1, hw.GERROR_IRQ_CFG0), (4, hw.EVENTQ_IRQ_CFG0)])
def test_irq_enables_guard_the_msi_configuration(enable: int, base: int) -> None:
    rig = Rig()
    rig.write(hw.IRQ_CTRL, enable)
    rig.write64(base, 0x1000)
    rig.write(base + 8, 1)
    rig.write(base + 12, 1)
    assert (rig.read64(base), rig.read(base + 8), rig.read(base + 12)) == (0, 0, 0)
    rig.write(hw.IRQ_CTRL, 5 & ~enable)
    rig.write64(base, 0x1000)
    rig.write(base + 8, 1)
    rig.write(base + 12, 1)
    assert (rig.read64(base), rig.read(base + 8), rig.read(base + 12)) == (0x1000, 1, 1)


def test_recinvsid_decides_whether_c_bad_streamid_is_recorded() -> None:
    rig = Rig(on=0)
    for recinvsid in (0, 2):
        rig.write(hw.CR2, recinvsid)
        rig.write(hw.CR0, 0xD)
        event = rig.fault(0, stream=1 << 8)
        assert event == (hw.record(0x02 | 1 << 40) if recinvsid else None)
        rig.write(hw.CR0, 0)


# Reset


def test_reset_forgets_everything_but_what_is_in_flight() -> None:
    rig = Rig()
    rig.map(0x1000, hw.BASE | hw.PLAIN | hw.PAGE)
    held = rig.begin(0x1000)
    rig.submit((0x30, 0), (0x46 | 1 << 12 | 0xABCD << 32, hw.FREE))
    assert rig.read(hw.CMDQ_CONS) == 1
    rig.write(hw.CR0, 0)
    rig.smmu.reset()
    assert rig.read(hw.CR0ACK) == 0
    assert (rig.read(hw.CMDQ_CONS), rig.read(hw.CMDQ_PROD)) == (0, 0)
    assert (len(rig.smmu.tlb), len(rig.smmu.configuration), len(rig.smmu.in_flight)) == (0, 0, 1)
    # Programmed anew, the first sync does not care for what was, and nobody completes the old one.
    rig.program()
    rig.write(hw.CR0, 0xD)
    before = rig.get(hw.FREE)
    rig.submit((0x46, 0))
    assert rig.consumed
    rig.smmu.retire(held)
    assert rig.get(hw.FREE) == before
    assert rig.read(hw.CMDQ_CONS) == 1
