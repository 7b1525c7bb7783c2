"""Random tables of every granule and both stages, before the model and before the reference: they must agree.

Compared are the physical address, the event record bit by bit, and what became of the descriptors.
"""

import struct
from contextlib import suppress
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests import smmu_rig as hw
from tests.stages_rig import (
    S2_PLAIN,
    S2AFFD,
    S2HA,
    S2HD,
    S2PTW,
    S2R,
    STRW_EL2,
    Stages,
    Table,
    everything_but,
    high_word,
)
from tests.walk_reference import Asked, ElsewhereError, Reference, RefusedError, Regime
from viommu.smmu import TransactionAborted

SIZES = (32, 36, 40, 42, 44, 48, 52)
GRANULES = (12, 14, 16)
AF, NG, DBM = 1 << 10, 1 << 11, 1 << 51
granules = st.sampled_from(GRANULES)
slots = st.integers(0, 5)
flag = st.booleans()
mostly = st.integers(0, 63).map(lambda number: number % 8 != 5)
rarely = st.integers(0, 63).map(lambda number: number % 16 == 5)


class Tables(Stages):
    """Remembers where descriptors were written."""

    def __init__(self, *args: Any, **features: Any) -> None:
        self.known: dict[int, int] = {}
        super().__init__(*args, **features)

    def put(self, address: int, *words: int) -> None:
        super().put(address, *words)
        if len(words) == 1:
            self.known[address] = words[0]

    def forget(self) -> None:
        """CMD_TLBI_EL2_ALL too."""
        self.submit((0x20, 0))
        super().forget()


class Walks(RuleBasedStateMachine):
    """One stream. Whatever is changed is invalidated, so that no cache may show."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Table | None = None
        self.second: Table | None = None

    @initialize(data=st.data())
    def configure(self, data: st.DataObject) -> None:
        draw = data.draw
        self.oas = draw(st.sampled_from([40, 48, 52]))
        caching = draw(st.sampled_from(["none", "normal", "hostile"]))
        xnx = draw(mostly)
        self.rig = Tables(
            everything_but(output_address_bits=self.oas, caching=caching, stage_2_execute=xnx)
        )
        self.rig.known.clear()
        shape = draw(st.sampled_from(["1", "2", "nested", "nested", "nested"]))
        one = two = None
        second_word = 0
        offset = self.rig.OFFSET if shape == "nested" else 0
        if shape != "1":
            granule = draw(granules)
            widest = min(self.oas, 52 if granule == 16 else 48)
            bits = draw(st.integers(40, widest))
            least = max(0, 3 - -(-(bits - granule - 4) // (granule - 3)) + 1)
            top = (0 if granule == 12 else 1) + (self.oas < 44)
            starts = [
                level
                for level in range(max(least - 1, top), 3)
                if 1 <= bits - (granule + (granule - 3) * (3 - level)) <= granule - 3 + 4
            ]
            self.second = Table(self.rig, granule, bits, start=draw(st.sampled_from(starts)))
            ps = draw(st.sampled_from([size for size in SIZES if size >= 40]))
            two = Regime(
                granule, bits, self.second.pointer, self.second.start, min(ps, self.oas),
                affd=draw(rarely), ha=draw(flag), hd=draw(flag), records=draw(mostly),
                ptw=draw(rarely), fwb=draw(rarely), xnx=xnx,
            )  # fmt: skip
            word = S2R * two.records | S2AFFD * two.affd | S2HA * two.ha | S2HD * two.hd
            word |= S2PTW * two.ptw | SIZES.index(ps) << 48
            second_word |= two.fwb << 25
            for address in range(hw.BASE, hw.BASE + len(self.rig.ram), 1 << self.second.shift(2)):
                leaf = address & -(1 << self.second.shift(2)) | S2_PLAIN | hw.BLOCK
                self.second.map(address + offset, leaf, level=2)
            self.s2 = word
        if shape != "2":
            granule = draw(granules)
            bits = draw(st.integers(25, 52 if granule == 16 and self.oas == 52 else 48))
            self.first = Table(self.rig, granule, bits, offset=offset)
            ips = draw(st.sampled_from([size for size in SIZES if size >= 40]))
            world = "EL1" if shape == "nested" else draw(st.sampled_from(["EL1", "EL2", "EL2-E2H"]))
            one = Regime(
                granule, bits, self.first.pointer, self.first.start, min(ips, self.oas),
                affd=draw(rarely), ha=draw(flag), hd=draw(flag), records=draw(mostly),
                world=world, wxn=draw(rarely), pan=draw(rarely), had=draw(rarely), tbi=draw(rarely),
            )  # fmt: skip
            cd = self.rig.cd_word(self.first) & ~(7 << 32) & ~hw.RECORD
            cd |= SIZES.index(ips) << 32 | hw.RECORD * one.records | hw.AFFD * one.affd
            cd |= hw.HA * one.ha | hw.HD * one.hd | hw.WXN * one.wxn | hw.PAN * one.pan
            cd |= hw.TBI0 * one.tbi
            self.rig.put(self.rig.cd_address, cd, self.first.pointer | one.had << 1)
            if world != "EL1":
                second_word |= STRW_EL2
                self.rig.write(hw.CR0, 0xC)
                self.rig.write(hw.CR2, 2 | (world == "EL2-E2H"))
                self.rig.write(hw.CR0, 0xD)
        config = {"1": hw.STE_S1, "2": hw.STE_S2, "nested": hw.STE_NESTED}[shape]
        if shape != "2":
            config |= self.rig.cd_address + offset
        words: tuple[int, ...] = ()
        if self.second is not None:
            words = self.rig.stage_2_words(self.second, self.s2)
        self.rig.ste(config, second_word, *words)
        cd_ipa = self.rig.cd_address + offset if shape == "nested" else None
        self.reference = Reference(self.load, self.oas, one, two, self.rig.cd_address, cd_ipa)
        self.top = 1 << (one or two).bits  # type: ignore[union-attr]
        for slot in range(6):  # something to begin with
            if self.first is not None:
                self.map_first(slot, slot, 3 - slot // 4, 1, True, False, True, 0, 0, False)
            if self.second is not None:
                self.map_second(slot, 3 - slot // 4, 3, 0, True, False, 15, False)

    def load(self, address: int) -> int:
        if not hw.BASE <= address < hw.BASE + len(self.rig.ram):
            raise LookupError
        return self.rig.get(address)

    # Addresses: a few, so that what is mapped is met again

    def input(self, slot: int) -> int:
        stride = max(self.top >> 3, 1 << 16)
        return (slot * stride + slot * 0x3_4000 + 0x1_0000) % self.top

    def middle(self, slot: int) -> int:
        """An IPA, or the final output where there is no stage 2."""
        return (1 << 36) + slot * ((1 << 32) + 0x21_0000)

    def write(self, table: Table, address: int, leaf: int, level: int, tables: int) -> None:
        level = max(level, table.start)
        with suppress(struct.error, AssertionError):  # the way there was damaged, or RAM is full
            table.map(address, leaf, level=level, tables=tables)
        self.rig.forget()

    @precondition(lambda self: self.first is not None)
    @rule(
        slot=slots, to=slots, level=st.sampled_from([3, 3, 3, 2, 1, 0]),
        bits=st.integers(0, 15), af=flag, dbm=flag, ng=flag, never=st.integers(0, 7),
        tables=st.sampled_from([0] * 9 + [1 << 59, 1 << 60, 1 << 61, 1 << 62]), far=rarely,
    )  # fmt: skip
    def map_first(
        self, slot: int, to: int, level: int, bits: int, af: bool, dbm: bool, ng: bool,
        never: int, tables: int, far: bool,
    ) -> None:  # fmt: skip
        assert self.first is not None
        output = self.middle(to) + ((1 << 45) if far else 0)
        word = self.address_word(self.first, output, level)
        word |= hw.PAGE if level == 3 else hw.BLOCK
        word |= (bits & 3) << 6 | AF * af | NG * ng | DBM * dbm
        word |= (1 << 53 if never == 1 else 1 << 54 if never == 2 else 0) | (
            0 if never else 3 << 53
        )
        self.write(self.first, self.input(slot), word, level, tables)

    @precondition(lambda self: self.second is not None)
    @rule(
        slot=slots, level=st.sampled_from([3, 3, 3, 2, 1, 0]), s2ap=st.sampled_from([3, 3, 3, 2, 1, 0]),
        xn=st.integers(0, 3), af=flag, dbm=flag, memory=st.integers(0, 15), far=rarely,
    )  # fmt: skip
    def map_second(
        self, slot: int, level: int, s2ap: int, xn: int, af: bool, dbm: bool, memory: int, far: bool
    ) -> None:
        assert self.second is not None
        address = self.middle(slot) if self.first is not None else self.input(slot)
        output = (3 << 37) + (slot << 30) + ((1 << 43) if far else 0)
        word = self.address_word(self.second, output, level)
        word |= hw.PAGE if level == 3 else hw.BLOCK
        word |= s2ap << 6 | xn << 53 | AF * af | DBM * dbm | memory << 2
        self.write(self.second, address, word, level, 0)

    def address_word(self, table: Table, address: int, level: int) -> int:
        address &= -(1 << table.shift(max(level, table.start)))
        return high_word(address) if table.granule == 16 else address & (1 << 48) - 1

    @precondition(lambda self: self.first is not None and self.second is not None)
    @rule(
        page=st.integers(0, 15),
        s2ap=st.integers(0, 3),
        af=mostly,
        dbm=flag,
        memory=st.sampled_from([15, 15, 0]),
    )
    def break_up_the_tables_of_stage_1(
        self, page: int, s2ap: int, af: bool, dbm: bool, memory: int
    ) -> None:  # fmt: skip
        """What stage 2 says of the memory that the CD and the first tables of stage 1 are in."""
        assert self.first is not None
        assert self.second is not None
        known = sorted({place & -(1 << self.second.granule) for place in self.structures()})
        address = known[page % len(known)]
        shift = self.second.shift(2)
        region = address & -(1 << shift)
        with suppress(struct.error, AssertionError):
            entry = self.second.map(region + self.first.offset, 0, level=2)
            self.rig.put(entry, 0)
            for other in known:
                if other & -(1 << shift) == region:
                    leaf = other | S2_PLAIN | hw.PAGE
                    self.second.map(other + self.first.offset, leaf)
            word = address | s2ap << 6 | AF * af | DBM * dbm | memory << 2 | hw.PAGE
            self.second.map(address + self.first.offset, word)
        self.rig.forget()

    def structures(self) -> set[int]:
        """Where the CD and the tables of stage 1 are."""
        assert self.first is not None
        first, found = self.first, {self.rig.cd_address, self.first.base}
        for slot in range(6):
            table = first.base
            for level in range(first.start, 3):
                index = self.input(slot) >> first.shift(level) & (1 << first.granule - 3) - 1
                descriptor = self.rig.get(table + index * 8)
                table = (descriptor & (1 << 48) - (1 << first.granule)) - first.offset
                if descriptor & 3 != 3 or not hw.BASE <= table < hw.BASE + len(self.rig.ram):
                    break
                found.add(table)
        return found

    @precondition(lambda self: self.rig.known)
    @rule(which=st.integers(0, 10_000), bit=st.integers(0, 63))
    def damage(self, which: int, bit: int) -> None:
        """Flip one bit of some descriptor."""
        places = sorted(self.rig.known)
        place = places[which % len(places)]
        self.rig.put(place, self.rig.get(place) ^ 1 << bit)
        self.rig.forget()

    # Accesses

    @rule(
        slot=slots, privileged=flag, write=flag, fetch=rarely, inside=st.integers(0, 0xFFF),
        tag=st.sampled_from([0] * 28 + [1 << 63, 1 << 56, 1 << 52, 1 << 48]), elsewhere=rarely,
    )  # fmt: skip
    def access(
        self, slot: int, privileged: bool, write: bool, fetch: bool, inside: int, tag: int, elsewhere: bool
    ) -> None:  # fmt: skip
        address = self.input(slot) + inside ^ tag ^ (0x5000 if elsewhere else 0)
        asked = Asked(address, privileged, write, fetch)
        before = {place: self.rig.get(place) for place in self.rig.known}
        expected: int | bytes | None
        changed: dict[int, int] = {}
        try:
            expected, changed = self.reference.translate(asked)
        except RefusedError as refused:
            expected = refused.record
        except ElsewhereError:
            return
        found: int | bytes | None
        try:
            found = self.rig.physical(
                address, privileged=privileged, write=write, instruction=fetch
            )
        except TransactionAborted:
            records = self.rig.events()
            found = records[0] if records else None
            assert len(records) <= 1
        assert found == expected, (asked, found, expected)
        for place, old in before.items():
            new = self.rig.get(place)
            if isinstance(expected, int):
                assert new == changed.get(place, old), hex(place)
            else:
                # What was accessed before the fault, and what stage 1 made dirty, may be told (3.13.2).
                assert new & ~(AF | 1 << 7) == old & ~(AF | 1 << 7), hex(place)
                if new != old:
                    self.rig.put(place, old)
                    self.rig.forget()
        if isinstance(expected, int):
            self.rig.known.update(changed)

    @rule(slot=slots, write=flag, size=st.integers(1, 0x6000))
    def access_a_range(self, slot: int, write: bool, size: int) -> None:
        """Byte by byte, a range goes where its bytes go."""
        address = self.input(slot)
        try:
            self.reference.translate(Asked(address))
        except (RefusedError, ElsewhereError):
            return
        try:
            ranges = self.rig.go(address, size, write=write)
        except TransactionAborted:
            self.rig.events()
            return
        done = 0
        for start, length in ranges:
            for inside in (0, length - 1):
                # The descriptors say of it what they said before: accessed and dirty by now.
                place, changed = self.reference.translate(
                    Asked(address + done + inside, write=write)
                )
                assert (place, changed) == (start + inside, {})
            done += length


TestWalks = Walks.TestCase
TestWalks.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # to shrink one takes minutes, and says little more
)
