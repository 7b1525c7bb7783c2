"""Every feature that a profile can leave out, with it and without it (IHI 0070, 6.3.1 to 6.3.6), and overrides."""

from dataclasses import fields, replace
from itertools import product

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import STAGE_1
from tests.stages_rig import (
    IND,
    PNU,
    PS_48,
    RNW,
    S2_NORMAL,
    S2_PLAIN,
    S2_READ,
    S2R,
    Stages,
    Table,
    everything_but,
)
from viommu.smmu import Features, TransactionAborted

OUT = 0x5A_8000_0000
LEAF = hw.PLAIN | hw.PAGE

# IDR0: S1P, TTF, COHACC, ASID16, MSI, CD2L, TTENDIAN, TERM_MODEL, ST_LEVEL, and then S2P, HYP, HTTU, VMID16.
ALL = 0x0D48_301A & ~(1 << 24) | 1 << 0 | 1 << 9 | 2 << 6 | 1 << 18
# ATS, ATSRECERR, PRI, ATOS.
ALL |= 1 << 10 | 1 << 23 | 1 << 16 | 1 << 15
REGISTERS = {
    # feature: register, mask, value with everything, value without it
    "stage_1": (hw.IDR0, 1 << 1 | 1 << 9, 1 << 1 | 1 << 9, 0),
    "stage_2": (hw.IDR0, 1 << 0 | 1 << 9 | 1 << 18, 1 << 0 | 1 << 9 | 1 << 18, 0),
    "hyp": (hw.IDR0, 1 << 9, 1 << 9, 0),
    "httu": (hw.IDR0, 3 << 6, 2 << 6, 0),
    "asid_bits": (hw.IDR0, 1 << 12, 1 << 12, 0),
    "vmid_bits": (hw.IDR0, 1 << 18, 1 << 18, 0),
    "msi": (hw.IDR0, 1 << 13, 1 << 13, 0),
    "two_level_streams": (hw.IDR0, 3 << 27, 1 << 27, 0),
    "two_level_contexts": (hw.IDR0, 1 << 19, 1 << 19, 0),
    "stall_model": (hw.IDR0, 3 << 24, 0, 1 << 24),
    "stall_max": (hw.IDR5, 0xFFFF << 16, 64 << 16, 1 << 16),
    "hierarchical_disable": (hw.IDR3, 1 << 2, 1 << 2, 0),
    "stage_2_execute": (hw.IDR3, 1 << 4, 1 << 4, 0),
    "stage_2_write_back": (hw.IDR3, 1 << 8, 1 << 8, 0),
    "range_invalidation": (hw.IDR3, 1 << 10, 1 << 10, 0),
    "break_before_make_level": (hw.IDR3, 3 << 11, 2 << 11, 0),
    "permission_overrides": (hw.IDR1, 1 << 26, 1 << 26, 0),
    "attribute_overrides": (hw.IDR1, 1 << 27, 1 << 27, 0),
    "granules": (hw.IDR5, 7 << 4, 7 << 4, 1 << 4),
    "output_address_bits": (hw.IDR5, 7 | 3 << 10, 5, 0),
    "stream_id_bits": (hw.IDR1, 0x3F, 16, 0),
    "substream_id_bits": (hw.IDR1, 0x1F << 6, 20 << 6, 0),
    "command_queue_log2": (hw.IDR1, 0x1F << 21, 13 << 21, 0),
    "event_queue_log2": (hw.IDR1, 0x1F << 16 | 0x1F << 11, 12 << 16 | 12 << 11, 0),  # PRIQS follows
    "ats": (hw.IDR0, 1 << 10 | 1 << 23 | 1 << 16, 1 << 10 | 1 << 23 | 1 << 16, 0),
    "pri": (hw.IDR0, 1 << 16, 1 << 16, 0),
    "atos": (hw.IDR0, 1 << 15, 1 << 15, 0),
    "vatos": (hw.IDR0, 0xFFFF_FFFF, ALL, ALL),
    "endpoint_pasid": (hw.IDR0, 0xFFFF_FFFF, ALL, ALL),
    "caching": (hw.IDR0, 0xFFFF_FFFF, ALL, ALL),
}
LEAST = {
    "asid_bits": 8,
    "vmid_bits": 8,
    "stall_model": "terminate",
    "stall_max": 1,
    "granules": (12,),
    "output_address_bits": 32,
    "caching": "none",
}


def test_no_feature_is_forgotten_here() -> None:
    assert set(REGISTERS) == {field.name for field in fields(Features)}


@pytest.mark.parametrize("name", REGISTERS)
def test_each_feature_has_its_bits_and_no_others(name: str) -> None:
    register, mask, with_it, without = REGISTERS[name]
    full = Stages(on=0)
    value = LEAST.get(name, 0 if type(getattr(Features(), name)) is int else False)
    also = {"pri": False} if name == "ats" else {}
    less = Stages(everything_but(**{name: value}, **also), on=0)
    assert full.read(register) & mask == with_it
    assert less.read(register) & mask == without
    for offset in (hw.IDR0, hw.IDR1, hw.IDR3, hw.IDR5):
        changed = full.read(offset) ^ less.read(offset)
        if offset == register:
            assert changed & ~mask == 0 or name in ("stage_1", "stage_2", "stall_model")
        elif name in ("stage_1", "stage_2"):
            assert changed & ~(1 << 2 | 1 << 4 | 1 << 8) == 0
        elif name in ("ats", "pri"):
            assert changed & ~(0x1F << 11) == 0
        elif name == "stall_model":
            assert changed & ~(0xFFFF << 16) == 0
        else:
            assert changed == 0, hex(offset)


def test_52_bits_of_address_and_their_registers() -> None:
    rig = Stages(everything_but(output_address_bits=52), on=0)
    assert rig.read(hw.IDR5) & (7 | 3 << 10) == 6 | 1 << 10
    rig.write64(hw.STRTAB_BASE, hw.word(-1))
    assert rig.read64(hw.STRTAB_BASE) == 1 << 62 | (1 << 52) - 64
    rig = Stages(everything_but(output_address_bits=40), on=0)
    rig.write64(hw.STRTAB_BASE, hw.word(-1))
    assert rig.read64(hw.STRTAB_BASE) == 1 << 62 | (1 << 40) - 64


@pytest.mark.parametrize(
    ("features", "revision"),
    [
        ({}, 2),
        ({"range_invalidation": False}, 1),
        ({"hyp": False}, 1),
        ({"hyp": False, "stage_2": False}, 2),
        ({"break_before_make_level": 0}, 1),
        ({"stage_2_write_back": False}, 1),
        ({"stage_2_write_back": False, "stage_2": False}, 2),
        ({"hierarchical_disable": False}, 0),
        ({"stage_2_execute": False}, 0),
        ({"stage_2_execute": False, "stage_2": False}, 2),
        ({"hierarchical_disable": False, "stage_1": False}, 2),
    ],
)
def test_the_revision_is_one_whose_mandatory_features_are_there(
    features: dict[str, object], revision: int
) -> None:
    assert Stages(everything_but(**features), on=0).read(hw.AIDR) == revision


# What a stage that is absent takes with it

STAGE_1_COMMANDS = {0x05, 0x06, 0x10, 0x11, 0x12, 0x13}
STAGE_2_COMMANDS = {0x28, 0x2A}
EL2_COMMANDS = {0x20, 0x21, 0x22, 0x23}
STALL_COMMANDS = {0x44, 0x45}
ATS_COMMANDS, PRI_COMMANDS = {0x40}, {0x41}
ALWAYS = {0x01, 0x02, 0x03, 0x04, 0x30, 0x46}


@pytest.mark.parametrize(
    ("features", "absent"),
    [
        ({}, set()),
        ({"stage_1": False}, STAGE_1_COMMANDS | EL2_COMMANDS),
        ({"stage_2": False}, STAGE_2_COMMANDS | EL2_COMMANDS),
        ({"hyp": False}, EL2_COMMANDS),
        ({"stall_model": "terminate"}, STALL_COMMANDS),
        ({"stall_model": "stall"}, set()),
        ({"pri": False}, PRI_COMMANDS),
        ({"ats": False, "pri": False}, ATS_COMMANDS | PRI_COMMANDS),
    ],
    ids=str,
)
def test_commands_are_there_with_what_they_are_for(
    features: dict[str, object], absent: set[int]
) -> None:
    known = (
        ALWAYS
        | ATS_COMMANDS
        | PRI_COMMANDS
        | STAGE_1_COMMANDS
        | STAGE_2_COMMANDS
        | EL2_COMMANDS
        | STALL_COMMANDS
    )
    for opcode in range(256):
        rig = Stages(everything_but(**features), ram=1 << 20)
        rig.submit((opcode, 0))
        assert rig.consumed == (opcode in known - absent), hex(opcode)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_that_is_absent_is_illegal_to_configure(stage: int) -> None:
    rig = Stages(everything_but(**{f"stage_{stage}": False}))
    table, second = Table(rig, 12, 48), Table(rig, 12, 40)
    table.map(0, LEAF)
    second.map(0, S2_PLAIN | hw.PAGE)
    rig.put(rig.cd_address, rig.cd_word(table), table.pointer)
    words = rig.stage_2_words(second)
    for config in (hw.STE_S1 | rig.cd_address, hw.STE_S2, hw.STE_NESTED | rig.cd_address):
        rig.ste(config, 0, *words)
        if config & 1 << (stage) or config & 0xF == hw.STE_NESTED:
            assert rig.fault(0) == hw.configuration_record(0x04)
        else:
            assert rig.physical(0) == 0
    rig.ste(hw.STE_BYPASS)
    assert rig.physical(0) == 0


def test_without_stage_2_the_vmid_is_not_looked_at() -> None:
    rig = Stages(everything_but(stage_2=False, vmid_bits=8))
    table = Table(rig, 12, 48)
    place = table.map(0x1000, OUT | LEAF)
    rig.stage_1_only(table)
    for vmid in (0, 0x55, 0x5555):
        rig.put(hw.STRTAB + 64 * hw.STREAM + 16, vmid)
        rig.submit((0x04, 31))
        assert rig.physical(0x1000) == OUT
        rig.put(place, 0)
    rig.submit((0x10 | 0x77 << 32, 0))
    assert hw.number(rig.fault(0x1000)) == 0x10


# HAD


@pytest.mark.parametrize("had", [False, True])
@pytest.mark.parametrize(("had0", "had1"), list(product((0, 1), repeat=2)))
def test_hierarchical_attributes_can_be_disabled_in_each_half(
    had: bool, had0: int, had1: int
) -> None:
    rig = Stages(everything_but(hierarchical_disable=had))
    low, high = Table(rig, 12, 48), Table(rig, 12, 48)
    cd = hw.CD_PLAIN
    rig.put(rig.cd_address, cd, low.pointer | had0 << 1, high.pointer | had1 << 1)
    rig.ste(hw.STE_S1 | rig.cd_address)
    top = hw.word(-1 << 48)
    for half, table, off in ((0, low, had0), (top, high, had1)):
        for index, (attributes, access) in enumerate(
            (
                (1 << 61, {}),  # APTable[0]: no EL0 access
                (1 << 62, {"write": True}),  # APTable[1]: read-only
                (1 << 60, {"instruction": True}),  # XNTable
                (1 << 59, {"instruction": True, "privileged": True}),  # PXNTable
            )
        ):
            address = half | index << 39
            table.map(
                address, OUT | LEAF & ~hw.USER if index == 3 else OUT | LEAF, tables=attributes
            )
            if had and off:
                assert rig.physical(address, **access) == OUT
            else:
                assert hw.number(rig.fault(address, **access)) == 0x13


# PRIVCFG and INSTCFG


@pytest.mark.parametrize("implemented", [False, True])
@pytest.mark.parametrize(("privcfg", "instcfg"), list(product(range(4), repeat=2)))
def test_overrides_of_privilege_and_instruction(
    implemented: bool, privcfg: int, instcfg: int
) -> None:
    rig = Stages(everything_but(permission_overrides=implemented))
    table = Table(rig, 12, 48)
    leaves = {
        "nothing": 0,
        "privileged data": hw.AF | hw.NG | hw.PXN | hw.UXN | hw.PAGE,
        "user code": hw.READ_ONLY | hw.AF | hw.NG | hw.PXN | hw.PAGE,
    }
    for index, leaf in enumerate(leaves.values()):
        table.map(index << 12, leaf and OUT | leaf)
    rig.stage_1_only(table, second=0)
    rig.put(hw.STRTAB + 64 * hw.STREAM + 8, privcfg << 48 | instcfg << 50)
    rig.forget()
    for privileged, write, fetch in product((False, True), repeat=3):
        priv, inst = privileged, fetch
        if implemented:
            priv = {2: False, 3: True}.get(privcfg, privileged)
            inst = {2: False, 3: True}.get(instcfg, fetch)
        inst = inst and not write  # what is written is data
        second = hw.CLASS_IN | (0 if write else RNW) | (PNU if priv else 0) | (IND if inst else 0)
        allowed = (False, priv and not inst, not write and (inst != priv))
        for index, through in enumerate(allowed):
            address = index << 12
            try:
                rig.go(address, privileged=privileged, write=write, instruction=fetch)
                assert through, (index, privileged, write, fetch)
            except TransactionAborted:
                assert not through, (index, privileged, write, fetch)
                event = 0x10 if index == 0 else 0x13
                # The record tells the attributes that the override made.
                assert rig.events() == [hw.translation_record(event, address, second=second)]


def test_overrides_count_at_stage_2_too() -> None:
    rig = Stages()
    second = Table(rig, 12, 40)
    second.map(0x1000, OUT & (1 << 40) - 1 | S2_READ | S2_NORMAL | 2 << 53 | hw.AF | hw.PAGE)
    words = rig.stage_2_words(second, S2R | PS_48)
    rig.ste(hw.STE_S2, 3 << 50, *words)  # instruction
    assert hw.number(rig.fault(0x1000)) == 0x13
    rig.ste(hw.STE_S2, 2 << 50, *words)
    assert rig.physical(0x1000, instruction=True) == OUT & (1 << 40) - 1


def test_gbpa_stores_overrides_where_they_are_implemented() -> None:
    for implemented in (False, True):
        rig = Stages(everything_but(permission_overrides=implemented), on=0)
        rig.write(hw.GBPA, 1 << 31 | 0xF << 16 | 1 << 12)
        assert rig.read(hw.GBPA) == 1 << 12 | (0xF << 16 if implemented else 0)


def test_the_least_profile_and_the_full_one_agree_on_stage_1() -> None:
    for features in (STAGE_1, replace(STAGE_1, caching="none"), Features()):
        rig = Stages(features)
        table = Table(rig, 12, 48)
        rig.stage_1_only(table)
        table.map(0x1000, OUT | LEAF)
        assert rig.physical(0x1234) == OUT | 0x234
        assert rig.fault(0x2000) == hw.translation_record(0x10, 0x2000)
