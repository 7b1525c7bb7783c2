"""Who may do what: AP, APTable, XN, PXN, WXN, PAN against every kind of access (DDI 0487, D8.4; IHI 0070, 13.4.1)."""

from itertools import product

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.smmu import TransactionAborted

AP = {"rw / -": 0, "rw / rw": 1 << 6, "r / -": 2 << 6, "r / r": 3 << 6}
"""AP[2:1], and what it gives EL1 / EL0."""

ACCESSES = {
    "privileged read": (True, False, False),
    "privileged write": (True, True, False),
    "privileged fetch": (True, False, True),
    "user read": (False, False, False),
    "user write": (False, True, False),
    "user fetch": (False, False, True),
}


def allowed(rig: Rig, address: int) -> set[str]:
    """Which of the six kinds of access go through; each other one must be F_PERMISSION, its attributes recorded."""
    through = set()
    for name, (privileged, write, instruction) in ACCESSES.items():
        second = hw.CLASS_IN | (0 if write else hw.RNW)
        second |= (hw.PNU if privileged else 0) | (hw.IND if instruction else 0)
        try:
            rig.go(address, privileged=privileged, write=write, instruction=instruction)
            through.add(name)
        except TransactionAborted:
            assert rig.events() == [hw.translation_record(0x13, address, second=second)]
    return through


# The table of D8.4 for stage 1 of EL1&0 without hierarchical attributes, spelled out.
DIRECT = {
    # AP, UXN, PXN: privileged rwx, user rwx
    ("rw / -", 0, 0): ("rwx", "x"),
    ("rw / -", 0, 1): ("rw", "x"),
    ("rw / -", 1, 0): ("rwx", ""),
    ("rw / -", 1, 1): ("rw", ""),
    ("rw / rw", 0, 0): ("rw", "rwx"),  # what EL0 can write, EL1 never executes
    ("rw / rw", 0, 1): ("rw", "rwx"),
    ("rw / rw", 1, 0): ("rw", "rw"),
    ("rw / rw", 1, 1): ("rw", "rw"),
    ("r / -", 0, 0): ("rx", "x"),
    ("r / -", 0, 1): ("r", "x"),
    ("r / -", 1, 0): ("rx", ""),
    ("r / -", 1, 1): ("r", ""),
    ("r / r", 0, 0): ("rx", "rx"),
    ("r / r", 0, 1): ("r", "rx"),
    ("r / r", 1, 0): ("rx", "r"),
    ("r / r", 1, 1): ("r", "r"),
}


def named(privileged: str, user: str) -> set[str]:
    verbs = {"r": "read", "w": "write", "x": "fetch"}
    return {f"privileged {verbs[c]}" for c in privileged} | {f"user {verbs[c]}" for c in user}


@pytest.mark.parametrize("key", DIRECT)
@pytest.mark.parametrize(("level", "kind"), [(1, hw.BLOCK), (2, hw.BLOCK), (3, hw.PAGE)])
def test_direct_permissions(key: tuple[str, int, int], level: int, kind: int) -> None:
    ap, uxn, pxn = key
    rig = Rig()
    rig.map(0x1000, AP[ap] | uxn << 54 | pxn << 53 | hw.AF | hw.NG | kind, level=level)
    assert allowed(rig, 0x1000) == named(*DIRECT[key])


@pytest.mark.parametrize(
    ("ap", "expected"),
    {
        "rw / -": ("rw", "x"),
        "rw / rw": ("rw", "rw"),
        "r / -": ("rx", "x"),
        "r / r": ("rx", "rx"),
    }.items(),
)
def test_wxn_what_is_writable_is_not_executable(ap: str, expected: tuple[str, str]) -> None:
    rig = Rig(cd=hw.CD_PLAIN | hw.WXN)
    rig.map(0x1000, AP[ap] | hw.AF | hw.NG | hw.PAGE)
    assert allowed(rig, 0x1000) == named(*expected)


@pytest.mark.parametrize(
    ("ap", "expected"),
    {
        "rw / -": ("rwx", "x"),
        "rw / rw": ("", "rwx"),
        "r / -": ("rx", "x"),
        "r / r": ("x", "rx"),
    }.items(),
)
def test_pan_keeps_el1_data_accesses_from_what_el0_can_reach(
    ap: str, expected: tuple[str, str]
) -> None:
    rig = Rig(cd=hw.CD_PLAIN | hw.PAN)
    rig.map(0x1000, AP[ap] | hw.AF | hw.NG | hw.PAGE)
    assert allowed(rig, 0x1000) == named(*expected)


@pytest.mark.parametrize(
    ("ap_table", "expected"),
    [
        (0, ("rw", "rwx")),
        (1, ("rwx", "x")),  # no EL0 access to data
        (2, ("rx", "rx")),  # read-only
        (3, ("rx", "x")),
    ],
)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_aptable_binds_what_is_below(level: int, ap_table: int, expected: tuple[str, str]) -> None:
    rig = Rig()
    rig.map(0x1000, AP["rw / rw"] | hw.AF | hw.NG | hw.PAGE)
    table = rig.low
    for _ in range(level):
        table = rig.get(table) & ~0xFFF
    rig.put(table, rig.get(table) | ap_table << 61)
    assert allowed(rig, 0x1000) == named(*expected)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(1 << 59, ("rw", "x")), (1 << 60, ("rwx", "")), (3 << 59, ("rw", ""))],
)
def test_pxntable_and_xntable(bits: int, expected: tuple[str, str]) -> None:
    rig = Rig()
    rig.map(0x1000, AP["rw / -"] | hw.AF | hw.NG | hw.PAGE, tables=bits)
    assert allowed(rig, 0x1000) == named(*expected)


def test_nstable_and_reserved_bits_of_a_table_do_nothing() -> None:
    rig = Rig()
    rig.map(0x1000, AP["r / r"] | hw.AF | hw.NG | hw.PAGE, tables=1 << 63 | 0x7F << 52 | 0xFFC)
    assert allowed(rig, 0x1000) == named("rx", "rx")


def by_hand(
    ap: int, uxn: int, pxn: int, ap_table: int, xn_table: int, pxn_table: int, wxn: int, pan: int
) -> set[str]:
    """The rules one after the other, as rights that are taken away."""
    rights = set(ACCESSES)
    no_user = not ap & 1 or ap_table & 1
    read_only = ap & 2 or ap_table & 2
    user_writes = not no_user and not read_only
    if no_user:
        rights -= {"user read", "user write"}
    if read_only:
        rights -= {"user write", "privileged write"}
    if uxn or xn_table or (wxn and user_writes):
        rights -= {"user fetch"}
    if pxn or pxn_table or user_writes or (wxn and not read_only):
        rights -= {"privileged fetch"}
    if pan and not no_user:
        rights -= {"privileged read", "privileged write"}
    return rights


@pytest.mark.parametrize(("wxn", "pan"), list(product((0, 1), repeat=2)))
def test_all_combinations(wxn: int, pan: int) -> None:
    rig = Rig(cd=hw.CD_PLAIN | wxn * hw.WXN | pan * hw.PAN)
    for ap_table, xn_table, pxn_table in product(range(4), (0, 1), (0, 1)):
        region = (ap_table << 2 | xn_table << 1 | pxn_table) << 21
        for ap, uxn, pxn in product(range(4), (0, 1), (0, 1)):
            address = region | (ap << 2 | uxn << 1 | pxn) << 12
            leaf = 0x8000_0000 | ap << 6 | uxn << 54 | pxn << 53 | hw.AF | hw.NG | hw.PAGE
            entry = rig.map(address, leaf)
            assert entry
            upper = rig.get(rig.get(rig.low) & ~0xFFF) & ~0xFFF
            rig.put(
                upper + 8 * (region >> 21),
                rig.get(upper + 8 * (region >> 21)) & 0xFFFF_FFFF_FFFF
                | ap_table << 61
                | xn_table << 60
                | pxn_table << 59,
            )
            expected = by_hand(ap, uxn, pxn, ap_table, xn_table, pxn_table, wxn, pan)
            assert allowed(rig, address) == expected, hex(address)


def test_a_write_is_never_an_instruction_access() -> None:
    rig = Rig()
    rig.map(0x1000, AP["rw / rw"] | hw.UXN | hw.AF | hw.NG | hw.PAGE)
    assert rig.physical(0x1000, write=True, instruction=True) == 0
    rig.map(0x2000, AP["r / r"] | hw.AF | hw.NG | hw.PAGE)
    assert rig.fault(0x2000, write=True, instruction=True) == hw.translation_record(
        0x13, 0x2000, second=hw.CLASS_IN
    )


def test_a_cached_translation_keeps_its_permissions() -> None:
    rig = Rig()
    entry = rig.map(0x1000, 0xA000 | AP["r / r"] | hw.AF | hw.NG | hw.PAGE)
    block = rig.map(0x20_0000, AP["r / r"] | hw.AF | hw.NG | hw.BLOCK, level=2)
    for address in (0x1000, 0x20_0000):
        assert hw.number(rig.fault(address, write=True)) == 0x13
    rig.put(entry, 0xA000 | AP["rw / rw"] | hw.AF | hw.NG | hw.PAGE)
    rig.put(block, AP["rw / rw"] | hw.AF | hw.NG | hw.BLOCK)
    for address in (0x1000, 0x20_0000):
        assert hw.number(rig.fault(address, write=True)) == 0x13
    rig.forget()
    for address in (0x1000, 0x20_0000):
        rig.physical(address, write=True)


def test_a_range_ends_where_permission_ends() -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | AP["rw / rw"] | hw.AF | hw.NG | hw.PAGE)
    rig.map(0x2000, 0xB000 | AP["r / r"] | hw.AF | hw.NG | hw.PAGE)
    assert rig.go(0x1800, 0x1000) == [(0xA800, 0x1000)]
    assert rig.go(0x1800, 0x1000, write=True) == [(0xA800, 0x800)]
    assert rig.fault(0x2000, write=True) == hw.translation_record(0x13, 0x2000, second=hw.CLASS_IN)
