"""Address translation operations: software asks what a transaction would meet (IHI 0070, chapter 9).

The operation is complete when the write of RUN returns, so that RUN always reads 0. It records nothing and stalls
nothing. The model has one memory type: ATTR is Normal, Write-Back and SH Inner Shareable. With HTTUI no descriptor is
updated, the answer is as if it had been, and no ordinary transaction finds what was found.

Who has the VATOS page asks for stage 1 of the streams of one VMID, that of VATOS_SEL; every other stream is C_BAD_STE
(9.1.6).
"""

from dataclasses import dataclass
from enum import IntEnum

from viommu.layouts.atos import (
    INTERNAL_ERR,
    INV_REQ,
    INV_STAGE,
    AtosAddr,
    AtosFault,
    AtosResult,
    AtosSid,
    AtosType,
)
from viommu.layouts.records import EventRecord, EventType, FaultClass
from viommu.layouts.registers import Register
from viommu.layouts.tables import StreamTableEntry
from viommu.memory import GuestMemory
from viommu.smmu.configuration import Configuration
from viommu.smmu.context import (
    StreamContext,
    stream_context,
    translates_stage_1,
    translates_stage_2,
    vmid_of,
)
from viommu.smmu.faults import Access, Fault, configuration_fault, translation_fault
from viommu.smmu.features import Features
from viommu.smmu.onlooker import Onlooker
from viommu.smmu.tlb import OUTPUT, Entry, Tlb
from viommu.smmu.translation import Translator
from viommu.smmu.walk import Walker, needed_flags
from viommu.trace import Tracer

_NORMAL_WRITE_BACK, _INNER_SHAREABLE = 0xFF, 3
_SID_VALID = 1 << 52


ATOS_REGISTERS = frozenset(register for register in Register if "ATOS_" in register.name)
"""The registers of both groups, and VATOS_SEL."""
_GROUP = 0x20
# Bytes from one CTRL to the end of its group, which is aligned to as many.


class _Place(IntEnum):
    CTRL = 0x00
    SID = 0x08
    ADDR = 0x10
    PAR = 0x18


@dataclass(slots=True)
class _Group:
    virtual: bool
    sid: int = 0
    addr: int = 0
    par: int = 0


class _Refused(Exception):
    """INV_REQ or INV_STAGE."""

    def __init__(self, code: int) -> None:
        super().__init__(hex(code))
        self.code = code


class Atos:
    """The register groups that the profile has: GATOS, and VATOS with its VMID."""

    def __init__(
        self,
        memory: GuestMemory,
        features: Features,
        configuration: Configuration,
        translator: Translator,
    ) -> None:
        self.enabled = False
        """CR0.SMMUEN."""
        self._features = features
        self._configuration = configuration
        self._memory = memory
        self._translator = translator
        self._unit_bits = min(features.granules)
        substreams = (1 << features.substream_id_bits) - 1
        self._sid_mask = (1 << features.stream_id_bits) - 1 | substreams << 32
        self._sid_mask |= _SID_VALID if substreams else 0
        self._vmid_mask = (1 << features.vmid_bits) - 1 if features.vatos else 0
        self.reset()

    def reset(self) -> None:
        """All registers 0."""
        self.enabled = False
        self._vmid = 0
        self._groups: dict[int, _Group] = {}
        if self._features.atos:
            self._groups[Register.GATOS_CTRL] = _Group(virtual=False)
        if self._features.vatos:
            self._groups[Register.VATOS_CTRL] = _Group(virtual=True)

    def read(self, register: int) -> int:
        """One of `ATOS_REGISTERS`."""
        if register == Register.VATOS_SEL:
            return self._vmid
        group = self._groups.get(register & -_GROUP)
        if group is None:
            return 0
        return (0, group.sid, group.addr, group.par)[register % _GROUP >> 3]

    def write(self, register: int, value: int) -> None:
        """Write one of them; RUN does nothing while SMMUEN is 0 (6.3.37)."""
        if register == Register.VATOS_SEL:
            self._vmid = value & self._vmid_mask
            return
        group = self._groups.get(register & -_GROUP)
        if group is None:
            return
        match register % _GROUP:
            case _Place.SID:
                group.sid = value & self._sid_mask
            case _Place.ADDR:
                group.addr = value & ~0x3F
            case _Place.CTRL if value & 1 and self.enabled:
                group.par = self._run(group)

    def _run(self, group: _Group) -> int:
        sid, addr = AtosSid(group.sid), AtosAddr(group.addr)
        access = Access(
            sid.stream_id,
            sid.substream_id if sid.ssid_valid else None,
            not addr.rnw,
            addr.pnu,
            addr.ind and addr.rnw,
        )
        try:
            shift, slot = self._look_up(access, addr, virtual=group.virtual)
        except _Refused as refused:
            return AtosFault(fault=True, fault_code=refused.code).value
        except Fault as fault:
            record = fault.record if fault.record is not None else fault.hidden
            if record is None:
                return AtosFault(fault=True, fault_code=INTERNAL_ERR).value
            return _fault(record, addr.type).value
        size_flag = shift > 12
        address = slot & OUTPUT & -(1 << shift) | (1 << shift - 1 if size_flag else 0)
        return AtosResult(
            address=address, size_flag=size_flag, sh=_INNER_SHAREABLE, attr=_NORMAL_WRITE_BACK
        ).value

    def _look_up(self, access: Access, addr: AtosAddr, *, virtual: bool) -> Entry:
        """What maps the address; raises `_Refused` and `Fault` in the order of 9.1.5 and 9.1.6."""
        features, kind = self._features, addr.type
        possible = {
            AtosType.STAGE_1: features.stage_1,
            AtosType.STAGE_2: features.stage_2 and access.substream_id is None,
            AtosType.BOTH: features.stage_1 and features.stage_2,
        }
        if not possible.get(kind, False) or (virtual and kind != AtosType.STAGE_1):
            raise _Refused(INV_REQ)
        self._translator.refresh()
        ste = self._configuration.ste(access)
        if virtual and vmid_of(ste, features) != self._vmid:
            raise configuration_fault(EventType.C_BAD_STE, access)
        present = {
            AtosType.STAGE_1: translates_stage_1(ste),
            AtosType.STAGE_2: translates_stage_2(ste),
            AtosType.BOTH: translates_stage_1(ste) and translates_stage_2(ste),
        }
        if not present[kind]:
            raise _Refused(INV_STAGE)
        context = self._context(ste, access, addr)
        translator = self._onlooker() if addr.httui else self._translator
        if kind == AtosType.STAGE_1:
            return self._stage_1(translator, context, access, addr.address)
        assert context is not None
        if kind == AtosType.STAGE_2 and addr.address >> features.output_address_bits:
            raise translation_fault(EventType.F_ADDR_SIZE, access, addr.address)
        return translator.page(context, access, addr.address)

    def _onlooker(self) -> Translator:
        """One that updates no descriptor, with a TLB of its own."""
        memory, tlb, nobody = Onlooker(self._memory), Tlb(), Tracer()
        walker = Walker(memory, tlb, nobody, self._features)
        return Translator(memory, self._configuration, tlb, walker, self._features, nobody)

    def _context(
        self, ste: StreamTableEntry, access: Access, addr: AtosAddr
    ) -> StreamContext | None:
        if addr.type == AtosType.STAGE_2:
            return stream_context(ste, None, self._features)
        # Of the access that the STE would make of it nothing is used: overrides do not count (9.1.3).
        return self._configuration.lookup(access, addr.address)[1]

    def _stage_1(
        self,
        translator: Translator,
        context: StreamContext | None,
        access: Access,
        address: int,
    ) -> Entry:
        if context is None or context.stage_1 is None:  # S1DSS skips it
            if address >> self._features.output_address_bits:
                raise translation_fault(EventType.F_ADDR_SIZE, access, address)
            return Entry(self._unit_bits, address & -(1 << self._unit_bits))
        found = translator.first_stage(context, access, address)
        need = needed_flags(access)
        if found.slot & need != need:
            raise translation_fault(EventType.F_PERMISSION, access, address)
        return found


def _fault(record: EventRecord, kind: int) -> AtosFault:
    """ATOS_PAR of a fault, by the table of 9.1.4."""
    event = record.event
    related = EventType.F_TRANSLATION <= event <= EventType.F_PERMISSION
    reason = address = 0
    if kind == AtosType.STAGE_1 and record.s2:
        # Not the asker's business: told as an abort of what stage 2 was needed for.
        of_cd = record.fault_class == FaultClass.CD
        event = EventType.F_CD_FETCH if of_cd else EventType.F_WALK_EABT
    elif kind == AtosType.STAGE_2:
        reason = 3 if record.s2 or not related else 0
    elif kind == AtosType.BOTH and record.s2:
        reason = {FaultClass.CD: 1, FaultClass.TTD: 2}.get(record.fault_class, 3)
        address = record.ipa if related else 0
    return AtosFault(fault=True, reason=reason, fault_code=int(event), fault_address=address)
