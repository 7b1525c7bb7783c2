"""The VMSAv8-64 translation table walks of both stages (DDI 0487, D8.2; IHI 0070, 3.4 and 3.13)."""

from typing import NamedTuple

from viommu.layouts.records import EventType, FaultClass
from viommu.memory import BusError, GuestMemory
from viommu.smmu.context import Stage1, Stage2, TableBase
from viommu.smmu.faults import Access, Fault, translation_fault
from viommu.smmu.features import Features
from viommu.smmu.points import Structure, StructureRead
from viommu.smmu.tlb import (
    CLEAN,
    DEVICE,
    OUTPUT,
    PRIV_EXECUTE,
    PRIV_READ,
    PRIV_WRITE,
    USER_EXECUTE,
    USER_READ,
    USER_WRITE,
    VALID,
    Entry,
    Tlb,
)
from viommu.trace import BusAbort, Replace, Tracer

# Descriptor bits (D8.3). Masks, not layouts: this is the inner loop of an uncached translation.
_VALID = 1 << 0
_TABLE = 1 << 1
_MEMATTR = 0b11 << 4
_AP_USER = 1 << 6
_AP_READ_ONLY = 1 << 7
_S2AP_READ = 1 << 6
_S2AP_WRITE = 1 << 7
_AF = 1 << 10
_NG = 1 << 11
_DBM = 1 << 51
_PXN = 1 << 53
_XN = 1 << 54
_PXN_TABLE = 1 << 59
_XN_TABLE = 1 << 60
_AP_TABLE_NO_USER = 1 << 61
_AP_TABLE_READ_ONLY = 1 << 62
_ADDRESS = ((1 << 48) - 1) & ~0xFFF
_HIGH_ADDRESS = 0xF << 12  # bits 51:48 of a 64 KiB granule's addresses, at bits 15:12
_LEAF_ATTRIBUTES = _VALID | _TABLE | _AP_USER | _AP_READ_ONLY | _AF | _NG | _DBM | _PXN | _XN
_READ = PRIV_READ | USER_READ
_WRITE = PRIV_WRITE | USER_WRITE
_UPDATE_TRIES = 16
# How often a walk begins again because software changed the descriptor that it was about to update.


class Leaf(NamedTuple):
    """What a walk ends in. `entry` is what it maps, and how; `whole` is log2 of what the descriptor maps.

    For a page, `mask` and `expected` tell which of its neighbours, the `entries` descriptors from the physical address
    `table` on, say the same. With a mask of 0 none is to be asked.
    """

    entry: Entry
    whole: int
    is_global: bool
    table: int
    entries: int
    mask: int
    expected: int


class _Changed(Exception):
    """The descriptor is no longer what it was: walk again."""


def select_base(stage: Stage1, access: Access, address: int) -> TableBase:
    """TTB0 or TTB1 for `address`, or F_TRANSLATION when it is in neither's range (3.4.1)."""
    upper = bool(address >> 55 & 1) and not stage.single_privilege
    base = stage.high if upper else stage.low
    top = 56 if base.top_byte_ignored else 64
    above = (address & (1 << top) - 1) >> base.input_bits
    if not base.enabled or above != ((1 << top - base.input_bits) - 1 if upper else 0):
        raise translation_fault(EventType.F_TRANSLATION, access, address)
    return base


def needed_flags(access: Access) -> int:
    """The flags that a slot must have for `access` to go through. A write is a data access (13.1.1)."""
    if access.write:
        return VALID | (PRIV_WRITE if access.privileged else USER_WRITE)
    if access.instruction:
        return VALID | (PRIV_EXECUTE if access.privileged else USER_EXECUTE)
    return VALID | (PRIV_READ if access.privileged else USER_READ)


class Walker:
    """Walks tables in guest memory. Stage 2 translations go through the TLB, since nested walks repeat them."""

    def __init__(self, memory: GuestMemory, tlb: Tlb, tracer: Tracer, features: Features) -> None:
        self._memory = memory
        self._tlb = tlb
        self._tracer = tracer
        self._wide = features.output_address_bits == 52
        self._execute_never_2 = features.stage_2_execute

    # Stage 1

    def stage_1(
        self, stage: Stage1, below: Stage2 | None, base: TableBase, access: Access, address: int
    ) -> Leaf:
        """Find the leaf of stage 1 that maps `address`, its output an IPA when there is a stage 2 `below`.

        The access flag and dirty state are updated if need be. Raises the fault that the walk meets; but whether the
        access has permission is told by the leaf's flags when there is no `below`.
        """
        for _ in range(_UPDATE_TRIES):
            try:
                return self._stage_1(stage, below, base, access, address)
            except _Changed:
                continue
        raise translation_fault(EventType.F_WALK_EABT, access, address, FaultClass.TTD)

    def _stage_1(
        self, stage: Stage1, below: Stage2 | None, base: TableBase, access: Access, address: int
    ) -> Leaf:
        granule = base.granule
        stride = granule - 3
        level = 4 - -(-(base.input_bits - granule) // stride)
        shift = granule + stride * (3 - level)
        table = base.address
        index = (address & (1 << base.input_bits) - 1) >> shift
        inherited = 0
        while True:
            entry = table + index * 8
            if below is not None:
                entry = self.ipa_to_pa(below, entry, access, address, FaultClass.TTD)
            descriptor = self._load(
                entry, access, address, level, stage_2=False, fault_class=FaultClass.TTD
            )
            if not self._is_valid(descriptor, granule, level, shift):
                raise translation_fault(EventType.F_TRANSLATION, access, address)
            output = self._output(descriptor, granule)
            if output >> stage.output_bits:
                raise translation_fault(EventType.F_ADDR_SIZE, access, address)
            if level == 3 or not descriptor & _TABLE:
                break
            if base.hierarchical:
                inherited |= descriptor
            table = output & -(1 << granule)
            level += 1
            shift -= stride
            index = (address >> shift) & (1 << stride) - 1

        updated = descriptor
        if not descriptor & _AF:
            if stage.updates_access_flag:
                updated |= _AF
            elif stage.access_flag_faults:
                raise translation_fault(EventType.F_ACCESS, access, address)
        flags = _stage_1_flags(stage, updated, inherited)
        need = needed_flags(access)
        if flags & need != need and flags & CLEAN:
            # Writable, and clean: the write makes it dirty.
            dirty = _stage_1_flags(stage, updated & ~_AP_READ_ONLY, inherited)
            if dirty & need == need:
                updated &= ~_AP_READ_ONLY
                flags = dirty
        if flags & need != need and below is not None:
            raise translation_fault(EventType.F_PERMISSION, access, address)
        if updated != descriptor:
            place = table + index * 8
            if below is not None:
                place = self.ipa_to_pa(below, place, access, address, FaultClass.TTD, write=True)
            self._update(place, descriptor, updated, access, address, stage_2=False)
        position = index & (1 << stride) - 1
        entries = 1 << min(base.input_bits - shift, stride)
        return self._leaf(
            updated, granule, shift, flags, entry - 8 * position, entries, stage.output_bits
        )

    # Stage 2

    def stage_2(
        self,
        stage: Stage2,
        ipa: int,
        access: Access,
        address: int,
        fault_class: FaultClass,
        *,
        alone: bool = False,
    ) -> Leaf:
        """Find the leaf of stage 2 that maps `ipa`; `access` is what is done to that IPA.

        `address` is the input address of the transaction, for the record. Raises the fault that the walk meets; but
        whether the access has permission is told by the leaf's flags when this stage is `alone`.
        """
        for _ in range(_UPDATE_TRIES):
            try:
                return self._stage_2(stage, ipa, access, address, fault_class, alone)
            except _Changed:
                continue
        raise translation_fault(EventType.F_WALK_EABT, access, address, fault_class, stage_2=True)

    def _stage_2(
        self,
        stage: Stage2,
        ipa: int,
        access: Access,
        address: int,
        fault_class: FaultClass,
        alone: bool,
    ) -> Leaf:
        def fault(event: EventType) -> Fault:
            return translation_fault(event, access, address, fault_class, stage_2=True, ipa=ipa)

        if ipa >> stage.input_bits:
            raise fault(EventType.F_TRANSLATION)
        granule = stage.granule
        stride = granule - 3
        level = stage.start_level
        shift = granule + stride * (3 - level)
        table = stage.address
        index = ipa >> shift
        while True:
            entry = table + index * 8
            descriptor = self._load(
                entry, access, address, level, stage_2=True, fault_class=fault_class
            )
            if not self._is_valid(descriptor, granule, level, shift):
                raise fault(EventType.F_TRANSLATION)
            output = self._output(descriptor, granule)
            if output >> stage.output_bits:
                raise fault(EventType.F_ADDR_SIZE)
            if level == 3 or not descriptor & _TABLE:
                break
            table = output & -(1 << granule)
            level += 1
            shift -= stride
            index = (ipa >> shift) & (1 << stride) - 1

        updated = descriptor
        if not descriptor & _AF:
            if stage.updates_access_flag:
                updated |= _AF
            elif stage.access_flag_faults:
                raise fault(EventType.F_ACCESS)
        flags = self._stage_2_flags(stage, updated)
        need = needed_flags(access)
        if access.write and flags & CLEAN:
            updated |= _S2AP_WRITE
            flags = self._stage_2_flags(stage, updated)
        protected = stage.protected_walk and fault_class != FaultClass.IN and flags & DEVICE
        if (flags & need != need or protected) and not alone:
            raise fault(EventType.F_PERMISSION)
        if updated != descriptor:
            self._update(entry, descriptor, updated, access, address, fault_class, stage_2=True)
        position = index & (1 << stride) - 1
        entries = 1 << min(stage.input_bits - shift, stride)
        return self._leaf(
            updated, granule, shift, flags, entry - 8 * position, entries, stage.output_bits
        )

    def _stage_2_flags(self, stage: Stage2, leaf: int) -> int:
        """Permissions of a stage 2 leaf (DDI 0487, D8.4.2)."""
        flags = VALID
        if leaf & _S2AP_READ:
            flags |= _READ
        if leaf & _S2AP_WRITE:
            flags |= _WRITE
        elif stage.updates_dirty and leaf & _DBM:
            flags |= CLEAN
        if not leaf & stage.device_mask:
            flags |= DEVICE
        low = leaf & _PXN if self._execute_never_2 else 0
        if leaf & _XN:
            flags |= PRIV_EXECUTE if low else 0
        else:
            flags |= USER_EXECUTE if low else PRIV_EXECUTE | USER_EXECUTE
        return flags

    def ipa_to_pa(
        self,
        stage: Stage2,
        ipa: int,
        access: Access,
        address: int,
        fault_class: FaultClass,
        *,
        write: bool = False,
    ) -> int:
        """The physical address of a structure of stage 1 (a CD, a descriptor) that lies at `ipa`.

        Reading it needs permission to read, updating it to write; the record tells of the transaction all the same.
        """
        need = VALID | (PRIV_WRITE if write else PRIV_READ)
        found = self._tlb.find(stage.tag, ipa)
        protected = found is not None and stage.protected_walk and found.slot & DEVICE
        if found is None or found.slot & need != need or protected:
            inner = access._replace(write=write, privileged=True, instruction=False)
            try:
                found = self.stage_2(stage, ipa, inner, address, fault_class).entry
            except Fault as fault:
                raise _of_transaction(fault, access, write) from None
            self._tlb.insert(stage.tag, ipa, found)
        inside = (1 << found.shift) - 1
        return found.slot & OUTPUT & ~inside | ipa & inside

    # Both

    def _load(
        self,
        entry: int,
        access: Access,
        address: int,
        level: int,
        *,
        stage_2: bool,
        fault_class: FaultClass,
    ) -> int:
        try:
            descriptor = self._memory.load_u64(entry)
            if self._tracer.meddler is not None:
                return self._meddled(entry, access, address, level, stage_2, descriptor)
            return descriptor
        except BusError:
            raise translation_fault(
                EventType.F_WALK_EABT, access, address, fault_class, entry, stage_2=stage_2
            ) from None

    def _meddled(
        self,
        entry: int,
        access: Access,
        address: int,
        level: int,
        stage_2: bool,
        descriptor: int,
    ) -> int:
        assert self._tracer.meddler is not None
        point = StructureRead(
            Structure.DESCRIPTOR,
            access.stream_id,
            access.substream_id,
            address,
            access.write,
            entry,
            8,
            descriptor,
            level,
            2 if stage_2 else 1,
        )
        match self._tracer.meddler(point):
            case BusAbort():
                raise BusError(entry, 8)
            case Replace(value):
                return int(value)
            case _:
                return descriptor

    def _is_valid(self, descriptor: int, granule: int, level: int, shift: int) -> bool:
        """Neither invalid nor reserved: level 3 has pages only, and blocks exist on some levels (D8.3.1)."""
        if not descriptor & _VALID:
            return False
        if descriptor & _TABLE:
            return True
        if level == 3:
            return False
        # 4 KiB: 2 MiB and 1 GiB; 16 KiB: 32 MiB; 64 KiB: 512 MiB, and 4 TiB with 52-bit addresses.
        return shift <= 30 or (granule == 16 and shift == 42 and self._wide)

    def _output(self, descriptor: int, granule: int) -> int:
        address = descriptor & _ADDRESS & -(1 << granule)
        if granule == 16 and self._wide:
            address |= (descriptor & _HIGH_ADDRESS) << 36
        return address

    def _update(
        self,
        entry: int,
        descriptor: int,
        updated: int,
        access: Access,
        address: int,
        fault_class: FaultClass = FaultClass.TTD,
        *,
        stage_2: bool,
    ) -> None:
        """Write the access flag or the dirty state back, unless software was faster (3.13)."""
        try:
            if not self._memory.compare_exchange_u64(entry, descriptor, updated):
                raise _Changed
        except BusError:
            raise translation_fault(
                EventType.F_WALK_EABT, access, address, fault_class, entry, stage_2=stage_2
            ) from None

    def _leaf(
        self,
        descriptor: int,
        granule: int,
        shift: int,
        flags: int,
        table: int,
        entries: int,
        output_bits: int,
    ) -> Leaf:
        mask = _LEAF_ATTRIBUTES | _MEMATTR | _ADDRESS & ~((1 << output_bits) - 1)
        if granule == 16:
            mask |= _HIGH_ADDRESS  # neighbours share these bits, or are walked on their own
        output = self._output(descriptor, granule) & -(1 << shift)
        return Leaf(
            Entry(shift, output | flags),
            shift,
            not descriptor & _NG,
            table,
            entries,
            mask,
            descriptor & mask,
        )


def _of_transaction(fault: Fault, access: Access, write: bool) -> Fault:
    """The fault of a fetch or `write` of a structure, told of the transaction that it was made for (7.3)."""
    record = fault.record
    if record is not None:
        record.rnw = not access.write
        record.pnu = access.privileged
        record.ind = access.instruction and not access.write
        if record.event == EventType.F_PERMISSION and record.fault_class == FaultClass.TTD:
            record.tt_rnw = not write
    return fault


def _stage_1_flags(stage: Stage1, leaf: int, tables: int) -> int:
    """Permissions of a leaf below tables with the attributes `tables` (DDI 0487, D8.4.1).

    A clean page of which the SMMU updates the dirty state is as good as writable, but for the write itself.
    """
    clean = (
        stage.updates_dirty
        and leaf & (_DBM | _AP_READ_ONLY) == _DBM | _AP_READ_ONLY
        and not tables & _AP_TABLE_READ_ONLY
    )
    if not clean:
        return _direct_flags(stage, leaf, tables)
    flags = _direct_flags(stage, leaf & ~_AP_READ_ONLY, tables)
    return flags & ~_WRITE | CLEAN if flags & _WRITE else flags


def _direct_flags(stage: Stage1, leaf: int, tables: int) -> int:
    read_only = bool(leaf & _AP_READ_ONLY or tables & _AP_TABLE_READ_ONLY)
    flags = VALID
    never_if_writable = stage.write_implies_execute_never and not read_only
    if stage.single_privilege:
        flags |= _READ if read_only else _READ | _WRITE
        if not (leaf & _XN or tables & _XN_TABLE or never_if_writable):
            flags |= PRIV_EXECUTE | USER_EXECUTE
        return flags
    user = leaf & _AP_USER and not tables & _AP_TABLE_NO_USER
    if not (user and stage.privileged_access_never):
        flags |= PRIV_READ if read_only else PRIV_READ | PRIV_WRITE
    if user:
        flags |= USER_READ if read_only else USER_READ | USER_WRITE
    # What EL0 can write, EL1 never executes.
    if not (leaf & _PXN or tables & _PXN_TABLE or never_if_writable or flags & USER_WRITE):
        flags |= PRIV_EXECUTE
    if not (leaf & _XN or tables & _XN_TABLE or (never_if_writable and user)):
        flags |= USER_EXECUTE
    return flags
