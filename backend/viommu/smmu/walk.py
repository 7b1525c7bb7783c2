"""The VMSAv8-64 stage 1 translation table walk (DDI 0487, D8.2; IHI 0070, 3.4)."""

from dataclasses import dataclass
from typing import NamedTuple

from viommu.layouts.records import EventType, FaultClass
from viommu.memory import BusError, GuestMemory
from viommu.smmu.faults import Access, Fault, translation_fault
from viommu.smmu.tlb import (
    FLAGS,
    PRIV_EXECUTE,
    PRIV_READ,
    PRIV_WRITE,
    USER_EXECUTE,
    USER_READ,
    USER_WRITE,
    VALID,
    Tag,
)

# Descriptor bits (D8.3). Masks, not layouts: this is the inner loop of an uncached translation.
_VALID = 1 << 0
_TABLE = 1 << 1
_AP_USER = 1 << 6
_AP_READ_ONLY = 1 << 7
_AF = 1 << 10
_NG = 1 << 11
_PXN = 1 << 53
_XN = 1 << 54
_PXN_TABLE = 1 << 59
_XN_TABLE = 1 << 60
_AP_TABLE_NO_USER = 1 << 61
_AP_TABLE_READ_ONLY = 1 << 62
_ADDRESS = ((1 << 48) - 1) & ~0xFFF
_LEAF_ATTRIBUTES = _VALID | _TABLE | _AP_USER | _AP_READ_ONLY | _AF | _NG | _PXN | _XN


@dataclass(frozen=True, slots=True)
class TableBase:
    """One of the two halves of the address space: TTB0 or TTB1 of a context descriptor (5.4).

    `input_bits` is 64 - TxSZ, `granule` log2 of bytes.
    """

    address: int
    input_bits: int
    granule: int
    enabled: bool
    top_byte_ignored: bool
    tag: Tag
    global_tag: Tag


@dataclass(frozen=True, slots=True)
class Regime:
    """What a context descriptor says of translation, decoded once."""

    low: TableBase
    high: TableBase
    output_bits: int
    access_flag_faults: bool
    write_implies_execute_never: bool
    privileged_access_never: bool
    record_faults: bool


class Leaf(NamedTuple):
    """What a walk ends in. `shift` is log2 of the bytes it maps, `slot` its output address and flags.

    For a page, `mask` and `expected` tell which of the neighbouring descriptors in `table` say the same.
    """

    shift: int
    slot: int
    is_global: bool
    table: int
    mask: int
    expected: int


def select_base(regime: Regime, access: Access, address: int) -> TableBase:
    """TTB0 or TTB1 for `address`, or F_TRANSLATION when it is in neither's range (3.4.1)."""
    base = regime.high if address >> 55 & 1 else regime.low
    top = 56 if base.top_byte_ignored else 64
    above = (address & (1 << top) - 1) >> base.input_bits
    if not base.enabled or above != (
        (1 << top - base.input_bits) - 1 if base is regime.high else 0
    ):
        raise translation_fault(EventType.F_TRANSLATION, access, address)
    return base


def walk(
    memory: GuestMemory, regime: Regime, base: TableBase, access: Access, address: int
) -> Leaf:
    """Find the leaf that maps `address`. Raises the fault that the walk meets; permissions are the caller's."""
    granule = base.granule
    stride = granule - 3
    level = 4 - -(-(base.input_bits - granule) // stride)
    shift = granule + stride * (3 - level)
    index = (address & (1 << base.input_bits) - 1) >> shift
    table = base.address
    inherited = 0
    while True:
        entry = table + index * 8
        try:
            descriptor = memory.load_u64(entry)
        except BusError:
            raise translation_fault(
                EventType.F_WALK_EABT, access, address, FaultClass.TTD, entry
            ) from None
        # Level 3 has pages only (both bits set), level 0 tables only.
        if not descriptor & _VALID or (
            not descriptor & _TABLE and (level == 3 or level == 0 or shift > 30)
        ):
            raise translation_fault(EventType.F_TRANSLATION, access, address)
        output = descriptor & _ADDRESS
        if output >> regime.output_bits:
            raise translation_fault(EventType.F_ADDR_SIZE, access, address)
        if level == 3 or not descriptor & _TABLE:
            break
        inherited |= descriptor
        table = output & ~((1 << granule) - 1)
        level += 1
        shift -= stride
        index = (address >> shift) & (1 << stride) - 1

    if not descriptor & _AF and regime.access_flag_faults:
        raise translation_fault(EventType.F_ACCESS, access, address)
    mask = _LEAF_ATTRIBUTES | _ADDRESS & ~((1 << regime.output_bits) - 1)
    if not regime.access_flag_faults:
        mask &= ~_AF
    return Leaf(
        shift=shift,
        slot=output & ~((1 << shift) - 1) | _flags(regime, descriptor, inherited),
        is_global=not descriptor & _NG,
        table=table,
        mask=mask,
        expected=descriptor & mask,
    )


def _flags(regime: Regime, leaf: int, tables: int) -> int:
    """Permissions of a leaf below tables with the attributes `tables` (DDI 0487, D8.4.1)."""
    user = leaf & _AP_USER and not tables & _AP_TABLE_NO_USER
    writable = not leaf & _AP_READ_ONLY and not tables & _AP_TABLE_READ_ONLY
    flags = VALID
    if not (user and regime.privileged_access_never):
        flags |= PRIV_READ | (PRIV_WRITE if writable else 0)
    if user:
        flags |= USER_READ | (USER_WRITE if writable else 0)
    never_if_writable = regime.write_implies_execute_never and writable
    # What EL0 can write, EL1 never executes.
    if not (leaf & _PXN or tables & _PXN_TABLE or never_if_writable or flags & USER_WRITE):
        flags |= PRIV_EXECUTE
    if not (leaf & _XN or tables & _XN_TABLE or (never_if_writable and user)):
        flags |= USER_EXECUTE
    return flags & FLAGS


def needed_flags(access: Access) -> int:
    """The flags that a slot must have for `access` to go through. A write is a data access (13.1.1)."""
    if access.write:
        return VALID | (PRIV_WRITE if access.privileged else USER_WRITE)
    if access.instruction:
        return VALID | (PRIV_EXECUTE if access.privileged else USER_EXECUTE)
    return VALID | (PRIV_READ if access.privileged else USER_READ)


__all__ = ["Fault", "Leaf", "Regime", "TableBase", "needed_flags", "select_base", "walk"]
