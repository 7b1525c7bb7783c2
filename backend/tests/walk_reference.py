"""A second opinion on a translation: slow, of one piece, and written from the text alone.

IHI 0070, 3.4, 3.13, 5.2, 5.4, 7.3.22; DDI 0487, D8. It knows nothing of caches, and of legality only what its caller
keeps to.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests import smmu_rig as hw

BLOCK_LEVELS = {12: {1, 2}, 14: {2}, 16: {2}}


@dataclass(frozen=True)
class Regime:
    """One stage, as it is configured. `world` is for stage 1: "EL1", "EL2" or "EL2-E2H"."""

    granule: int
    bits: int
    base: int
    start: int
    output_bits: int
    affd: bool = False
    ha: bool = False
    hd: bool = False
    records: bool = True
    # Stage 1
    world: str = "EL1"
    wxn: bool = False
    pan: bool = False
    had: bool = False
    tbi: bool = False
    # Stage 2
    ptw: bool = False
    fwb: bool = False
    xnx: bool = True


@dataclass(frozen=True)
class Asked:
    """What a transaction asks for."""

    address: int
    privileged: bool = False
    write: bool = False
    fetch: bool = False


class ElsewhereError(Exception):
    """The CD is fetched from where there is none: what it says is not for the reference to know."""


class RefusedError(Exception):
    """A fault; `record` is what has to be in the event queue, None for silence."""

    def __init__(self, record: bytes | None) -> None:
        super().__init__("" if record is None else record.hex())
        self.record = record


@dataclass
class Reference:
    """The SMMU with one stream. `load` raises `LookupError` where there is no memory."""

    load: Callable[[int], int]
    oas: int
    stage_1: Regime | None
    stage_2: Regime | None
    cd: int
    """The physical address of the CD. It is a whole page, or a part of one, at `cd_ipa`."""
    cd_ipa: int | None

    def translate(self, asked: Asked) -> tuple[int, dict[int, int]]:
        """The physical address, and the descriptors that the SMMU has to change: address to new value."""
        self.asked = asked
        self.changed: dict[int, int] = {}
        if self.stage_2 is not None and self.stage_1 is not None and self.cd_ipa is not None:
            found = self.second(self.cd_ipa, "CD", write=False)
            try:
                self.load(found)
            except LookupError:
                raise RefusedError(hw.configuration_record(0x09, fetch=found)) from None
            if found != self.cd:
                raise ElsewhereError
        ipa = asked.address
        if self.stage_1 is not None:
            ipa = self.first()
        elif ipa >> self.oas:
            raise self.fault(0x11, "IN", None)
        if self.stage_2 is None:
            return ipa, self.changed
        return self.second(ipa, "IN", write=asked.write), self.changed

    # Records

    def fault(
        self, event: int, kind: str, ipa: int | None, *, tt_read: bool = False, fetch: int = 0
    ) -> RefusedError:
        asked = self.asked
        second = {"CD": 0, "TT": 1 << 40, "IN": 2 << 40}[kind]
        second |= asked.privileged << 33 | (asked.fetch and not asked.write) << 34
        second |= (not asked.write) << 35 | tt_read << 44
        if ipa is not None:
            second |= 1 << 39
            regime = self.stage_2
        else:
            regime = self.stage_1
        last = fetch if event == 0x0B else (ipa or 0) & ~0xFFF
        if event != 0x0B and regime is not None and not regime.records:
            return RefusedError(None)
        return RefusedError(hw.record(event | hw.STREAM << 32, second, asked.address, last))

    # Walks

    def walk(
        self,
        regime: Regime,
        address: int,
        where: Callable[[int], int],
        refuse: Callable[[int], RefusedError],
        abort: Callable[[int], RefusedError],
    ) -> tuple[int, int, int, int, list[int]]:
        """Down the tables: descriptor, its address in its own space, output, size, and the tables' descriptors."""
        table = regime.base
        passed: list[int] = []
        for level in range(regime.start, 4):
            low = regime.granule + (regime.granule - 3) * (3 - level)
            high = regime.bits if level == regime.start else low + regime.granule - 3
            index = (address % (1 << high)) >> low
            entry = table + index * 8
            place = where(entry)
            try:
                descriptor = self.changed.get(place, self.load(place))
            except LookupError:
                raise abort(place) from None
            output = descriptor & ((1 << 48) - (1 << regime.granule))
            if regime.granule == 16 and self.oas == 52:
                output |= (descriptor >> 12 & 0xF) << 48
            blocks = BLOCK_LEVELS[regime.granule] | (
                {1} if regime.granule == 16 and self.oas == 52 else set()
            )
            kind = descriptor & 3
            if kind in (0, 2) or (kind == 1 and level not in blocks):
                raise refuse(0x10)
            if output >= 1 << regime.output_bits:
                raise refuse(0x11)
            if level == 3 or kind == 1:
                return descriptor, entry, output >> low << low, 1 << low, passed
            passed.append(descriptor)
            table = output
        raise AssertionError("a walk ends at level 3")

    def second(self, ipa: int, kind: str, *, write: bool) -> int:
        regime, asked = self.stage_2, self.asked
        assert regime is not None
        fetch = kind == "IN" and asked.fetch and not asked.write

        def refuse(event: int) -> RefusedError:
            tt_read = event == 0x13 and kind == "TT" and not write
            return self.fault(event, kind, ipa, tt_read=tt_read)

        if ipa >= 1 << regime.bits:
            raise refuse(0x10)
        descriptor, place, output, size, _ = self.walk(
            regime,
            ipa,
            lambda entry: entry,
            refuse,
            lambda place: self.fault(0x0B, kind, ipa, fetch=place),
        )
        new = descriptor
        if not descriptor >> 10 & 1:
            if regime.ha:
                new |= 1 << 10
            elif not regime.affd:
                raise refuse(0x12)
        if write and not descriptor >> 7 & 1 and descriptor >> 51 & 1 and regime.ha and regime.hd:
            new |= 1 << 7
        readable, writable = new >> 6 & 1, new >> 7 & 1
        never = descriptor >> 53 & 3
        if not regime.xnx:
            never &= 2
        executable = {0: True, 1: not asked.privileged, 2: False, 3: asked.privileged}[never]
        allowed = writable if write else executable if fetch else readable
        attributes = descriptor >> 2 & 0xF
        device = not attributes & 4 if regime.fwb else attributes < 4
        if not allowed or (regime.ptw and device and kind != "IN"):
            raise refuse(0x13)
        if new != descriptor:
            self.changed[place] = new
        return output + ipa % size

    def first(self) -> int:
        regime, asked = self.stage_1, self.asked
        assert regime is not None

        def refuse(event: int) -> RefusedError:
            return self.fault(event, "IN", None)

        above = asked.address >> regime.bits
        if regime.tbi:
            above &= (1 << 56 - regime.bits) - 1
        if above:
            raise refuse(0x10)

        def where(entry: int) -> int:
            return entry if self.stage_2 is None else self.second(entry, "TT", write=False)

        descriptor, entry, output, size, tables = self.walk(
            regime,
            asked.address,
            where,
            refuse,
            lambda place: self.fault(0x0B, "TT", None, fetch=place),
        )
        new = descriptor
        if not descriptor >> 10 & 1:
            if regime.ha:
                new |= 1 << 10
            elif not regime.affd:
                raise refuse(0x12)
        hierarchy = 0
        for table in tables:
            hierarchy |= 0 if regime.had else table
        if not self.first_allows(regime, descriptor, hierarchy):
            raise refuse(0x13)
        if asked.write:
            new &= ~(1 << 7)  # it was writable, or is clean
        if new != descriptor:
            place = entry if self.stage_2 is None else self.second(entry, "TT", write=True)
            self.changed[place] = new
        return output + asked.address % size

    def first_allows(self, regime: Regime, descriptor: int, hierarchy: int) -> bool:
        asked = self.asked
        dirty_managed = regime.ha and regime.hd and descriptor >> 51 & 1
        read_only = hierarchy >> 62 & 1 or (descriptor >> 7 & 1 and not dirty_managed)
        for_user = descriptor >> 6 & 1 and not hierarchy >> 61 & 1
        never = descriptor >> 54 & 1 or hierarchy >> 60 & 1
        never_privileged = descriptor >> 53 & 1 or hierarchy >> 59 & 1
        if regime.world == "EL2":  # one privilege: neither AP[1], APTable[0], PXN nor PAN
            if asked.write:
                return not read_only
            return not asked.fetch or not (never or (regime.wxn and not read_only))
        if asked.write or not asked.fetch:
            if asked.write and read_only:
                return False
            return not (for_user and regime.pan) if asked.privileged else bool(for_user)
        if asked.privileged:
            by_user = for_user and not read_only
            return not (never_privileged or by_user or (regime.wxn and not read_only))
        return not (never or (regime.wxn and for_user and not read_only))
