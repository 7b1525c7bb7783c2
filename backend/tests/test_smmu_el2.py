"""The regimes of EL2, without and with E2H (IHI 0070, 5.2 STRW, 5.4.1, 13.4.1, 4.4.2)."""

from itertools import product

import pytest

from tests import smmu_rig as hw
from tests.stages_rig import IND, PNU, RNW, STRW_EL2, Stages, Table, everything_but
from viommu.smmu import TransactionAborted

OUT = 0x5A_8000_0000
LEAF = hw.PLAIN | hw.PAGE
E2H = 1 << 0
EL1, EL2, EL2_E2H = "EL1", "EL2", "EL2-E2H"


def make(world: str, **features: object) -> Stages:
    """The stream in one of the worlds; its CD is a plain one with two halves."""
    rig = Stages(everything_but(**features), on=0)
    rig.write(hw.CR2, 1 << 1 | (E2H if world == EL2_E2H else 0))
    rig.write(hw.CR0, 0xD)
    rig.ste(hw.STE_S1 | rig.cd_address, 0 if world == EL1 else STRW_EL2)
    return rig


HIGH = hw.word(-1 << 48)


@pytest.mark.parametrize("world", [EL1, EL2, EL2_E2H])
def test_el2_has_one_half(world: str) -> None:
    rig = make(world)
    rig.map(0x1000, 0xA000 | LEAF)
    rig.map(HIGH | 0x1000, 0xB000 | LEAF)
    assert rig.physical(0x1000) == 0xA000
    if world == EL2:
        assert rig.fault(HIGH | 0x1000) == hw.translation_record(0x10, HIGH | 0x1000)
    else:
        assert rig.physical(HIGH | 0x1000) == 0xB000


@pytest.mark.parametrize("world", [EL1, EL2, EL2_E2H])
def test_el2_looks_neither_at_epd_nor_at_the_second_half_nor_at_the_asid(world: str) -> None:
    rig = make(world, asid_bits=8)
    rig.map(0x1000, 0xA000 | LEAF)
    low = 0x0010 | hw.CD_V | 5 << 32 | hw.AA64 | hw.RECORD | hw.ABORT
    cases = {
        "EPD0": (low | hw.EPD0 | 16 << 16 | hw.TG1_4K, 0, 0x10),
        "T1SZ and TG1": (low, 0, 0x0A),
        "TTB1": (low | 16 << 16 | hw.TG1_4K, 1 << 50, 0x0A),
        "ASID of 16 bits": (low | hw.EPD1 | 0x100 << 48, 0, 0x0A),
        "ENDI without tables": (low | hw.ENDI | hw.EPD0 | hw.EPD1, 0, 0x10),
    }
    for name, (cd, ttb1, elsewhere) in cases.items():
        rig.put(rig.cd_address, cd, rig.low, ttb1)
        rig.forget()
        rig.submit((0x20, 0))
        if world != EL2:
            assert hw.number(rig.fault(0x1000)) == elsewhere, name
        elif name.startswith("ENDI"):
            assert rig.fault(0x1000) == hw.configuration_record(0x0A)
        else:
            assert rig.physical(0x1000) == 0xA000, name


@pytest.mark.parametrize("world", [EL1, EL2, EL2_E2H])
def test_strw_and_e2h_say_whose_permissions_count(world: str) -> None:
    rig = make(world)
    for ap, uxn, pxn, ap_table, pxn_table in product(range(4), (0, 1), (0, 1), range(4), (0, 1)):
        index = ap << 5 | uxn << 4 | pxn << 3 | ap_table << 1 | pxn_table
        address = index << 21
        word = 0xA000 | ap << 6 | uxn << 54 | pxn << 53 | hw.AF | hw.PAGE
        rig.map(address, word)
        table = rig.get(rig.get(rig.low) & ~0xFFF) & ~0xFFF
        place = table + (address >> 21) * 8
        rig.put(place, rig.get(place) | ap_table << 61 | pxn_table << 59)
        read_only = bool(ap & 2 or ap_table & 2)
        user = bool(ap & 1) and not ap_table & 1
        for privileged, write, fetch in product((False, True), repeat=3):
            fetch = fetch and not write
            if world == EL2:  # AP[1], APTable[0] and PXN mean nothing, nor who asks
                allowed = not read_only if write else not uxn if fetch else True
            elif write:
                allowed = not read_only and (privileged or user)
            elif not fetch:
                allowed = privileged or user
            elif privileged:
                allowed = not pxn and not pxn_table and not (user and not read_only)
            else:
                allowed = not uxn
            try:
                rig.go(address, privileged=privileged, write=write, instruction=fetch)
                assert allowed, (ap, uxn, pxn, ap_table, privileged, write, fetch)
            except TransactionAborted:
                assert not allowed, (ap, uxn, pxn, ap_table, privileged, write, fetch)
                second = hw.CLASS_IN | (0 if write else RNW) | (PNU if privileged else 0)
                second |= IND if fetch else 0
                assert rig.events() == [hw.translation_record(0x13, address, second=second)]


@pytest.mark.parametrize(("world", "allowed"), [(EL1, False), (EL2, True), (EL2_E2H, False)])
def test_pan_is_not_for_el2(world: str, allowed: bool) -> None:
    rig = make(world)
    rig.put(rig.cd_address, hw.CD_PLAIN | hw.PAN)
    rig.forget()
    rig.map(0x1000, 0xA000 | LEAF)
    if allowed:
        assert rig.physical(0x1000, privileged=True) == 0xA000
    else:
        assert hw.number(rig.fault(0x1000, privileged=True)) == 0x13


@pytest.mark.parametrize("strw", range(4))
def test_strw_is_checked_where_it_counts(strw: int) -> None:
    rig = make(EL1)
    rig.map(0x1000, 0xA000 | LEAF)
    rig.ste(hw.STE_S1 | rig.cd_address, strw << 30)
    if strw & 1:
        assert rig.fault(0x1000) == hw.configuration_record(0x04)
    else:
        assert rig.physical(0x1000) == 0xA000
    rig.ste(hw.STE_BYPASS, strw << 30)
    assert rig.physical(0x1000) == 0x1000
    # Without an EL2 it is RES0.
    rig = make(EL1, hyp=False)
    rig.map(0x1000, 0xA000 | hw.READ_ONLY | hw.AF | hw.PAGE)
    rig.ste(hw.STE_S1 | rig.cd_address, strw << 30)
    assert hw.number(rig.fault(0x1000)) == 0x13


def test_e2h_is_there_where_hyp_is() -> None:
    for hyp in (False, True):
        rig = Stages(everything_but(hyp=hyp), on=0)
        rig.write(hw.CR2, 7)
        assert rig.read(hw.CR2) == 6 | hyp
        assert rig.read(hw.IDR0) >> 9 & 1 == hyp
    rig = Stages(everything_but(stage_1=False), on=0)
    rig.write(hw.CR2, 7)
    assert (rig.read(hw.CR2), rig.read(hw.IDR0) >> 9 & 1) == (6, 0)


def test_no_world_sees_the_entries_of_another() -> None:
    """The same address and ASID 0, in EL1, EL2 and EL2-E2H (3.17)."""
    rig = Stages(on=0)
    rig.write(hw.CR2, 1 << 1)
    rig.write(hw.CR0, 0xD)
    tables = {}
    outputs = {EL1: 0xA000, EL2: 0xB000, EL2_E2H: 0xC000}
    for world, output in outputs.items():
        table = tables[world] = Table(rig, 12, 48)
        table.map(0x1000, output | LEAF)
        table.map(0x2000, output | LEAF & ~hw.NG)  # global
    for _ in range(2):
        for world, output in outputs.items():
            rig.write(hw.CR0, 0xC)
            rig.write(hw.CR2, 1 << 1 | (world == EL2_E2H))
            rig.write(hw.CR0, 0xD)
            cd = rig.cd_word(tables[world]) & ~(0xFFFF << 48)
            rig.put(rig.cd_address, cd, tables[world].pointer)
            second = 0 if world == EL1 else STRW_EL2
            rig.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_S1 | rig.cd_address, second)
            rig.submit((0x04, 31), (0x46, 0))  # configuration, and no translation
            assert rig.physical(0x1000) == output
            assert rig.physical(0x2000) == output
            for address in (0x1000, 0x2000):  # from now on the TLB alone has them
                tables[world].map(address, 0)


WORLDS = [(EL1, 0), (EL2, 2), (EL2_E2H, 2)]
COMMANDS = {
    # command: what goes, of ASID 7 and of global, by world
    "EL2_ALL": ((0x20, 0), {EL2: "7 8 g", EL2_E2H: "7 8 g"}),
    "EL2_ASID 7": ((0x21 | 7 << 48, 0), {EL2_E2H: "7"}),
    "EL2_ASID 9": ((0x21 | 9 << 48, 0), {}),
    "EL2_VA 7": ((0x22 | 7 << 48, 0x1000), {EL2: "7 8 g", EL2_E2H: "7 g"}),
    "EL2_VA 9": ((0x22 | 9 << 48, 0x1000), {EL2: "7 8 g", EL2_E2H: "g"}),
    "EL2_VA 7, elsewhere": ((0x22 | 7 << 48, 0x8000), {}),
    "EL2_VA 7, VMID": ((0x22 | 7 << 48 | 5 << 32, 0x1000), {EL2: "7 8 g", EL2_E2H: "7 g"}),
    "EL2_VAA": ((0x23 | 9 << 48, 0x1000), {EL2: "7 8 g", EL2_E2H: "7 8 g"}),
    "NH_ALL": ((0x10, 0), {EL1: "7 8 g"}),
    "NH_ASID 7": ((0x11 | 7 << 48, 0), {EL1: "7"}),
    "NH_VA 7": ((0x12 | 7 << 48, 0x1000), {EL1: "7 g"}),
    "NH_VAA": ((0x13, 0x1000), {EL1: "7 8 g"}),
    "S12_VMALL": ((0x28, 0), {EL1: "7 8 g"}),
    "S2_IPA": ((0x2A, 0x1000), {}),
    "NSNH_ALL": ((0x30, 0), {EL1: "7 8 g"}),
}


@pytest.mark.parametrize("world", [EL1, EL2, EL2_E2H])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_tlbi_takes_in_each_world(world: str, name: str) -> None:
    """CDs of ASID 7 and 8, each with an entry of its own at 0x1000, and an ASID-less one from a table both have."""
    rig = make(world)
    places = {}
    found = {}
    command, gone = COMMANDS[name]
    for entry, asid in (("7", 7), ("8", 8), ("g", 7)):
        rig.submit((0x20, 0), (0x30, 0))
        table = Table(rig, 12, 48)
        leaf = 0xA000 | (LEAF & ~hw.NG if entry == "g" else LEAF)
        places[entry] = table.map(0x1000, leaf)
        rig.put(rig.cd_address, rig.cd_word(table) & ~(0xFFFF << 48) | asid << 48, table.pointer)
        rig.submit((0x04, 31))
        assert rig.physical(0x1000) == 0xA000
        rig.put(places[entry], 0)
        rig.submit(command, (0x46, 0))
        try:
            rig.physical(0x1000)
            found[entry] = True
        except TransactionAborted:
            found[entry] = False
    expected = gone.get(world, "").split()
    assert {entry for entry, there in found.items() if not there} == set(expected)


def test_global_entries_stay_within_their_set_of_asids() -> None:
    """CD.ASET (3.17.1): one set does not see the global entries of the other; a TLBI takes both."""
    rig = Stages()
    table = Table(rig, 12, 48)
    place = table.map(0x1000, 0xA000 | LEAF & ~hw.NG)
    aset = 1 << 47
    for bits in (0, aset):
        rig.stage_1_only(table, cd=bits)
        assert rig.physical(0x1000) == 0xA000
    rig.put(place, 0xB000 | LEAF & ~hw.NG)
    rig.put(rig.cd_address, rig.cd_word(table) | aset)
    rig.submit((0x04, 31))
    assert rig.physical(0x1000) == 0xA000
    rig.forget()
    rig.put(place, 0xC000 | LEAF & ~hw.NG)
    assert rig.physical(0x1000) == 0xC000
    rig.put(rig.cd_address, rig.cd_word(table))
    rig.submit((0x04, 31))
    rig.put(place, 0xD000 | LEAF & ~hw.NG)
    assert rig.physical(0x1000) == 0xD000
    rig.put(place, 0)
    rig.submit((0x12 | 0x55 << 48, 0x1000))
    for bits in (0, aset):
        rig.put(rig.cd_address, rig.cd_word(table) | bits)
        rig.submit((0x04, 31))
        assert hw.number(rig.fault(0x1000)) == 0x10
