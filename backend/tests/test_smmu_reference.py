"""Maps, unmaps, invalidations and translations in any order, against a reference of a few lines.

The reference knows what the tables say now, and what they have said since the last invalidation that covered it. A
translation must give the first, or, as long as it may be cached, one of the second; right after an invalidation the
first only. A fault is never cached.
"""

from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests import smmu_rig as hw
from tests.smmu_rig import CD_PLAIN, Rig
from viommu.smmu import Access, TransactionAborted, Translation

ASIDS = (7, 8)
PAGES = [*range(4), *range(512, 516), *range(1024, 1026)]
"""Numbers of 4 KiB pages, in three ranges of 2 MiB."""
REGIONS = (0, 1, 2)


class Mapping(NamedTuple):
    """What a page translates to; None in its place is a fault."""

    page: int
    writable: bool
    is_global: bool


State = Mapping | None
asids = st.sampled_from(ASIDS)
pages = st.sampled_from(PAGES)
outputs = st.integers(1, 1 << 20)
BLOCKS = 1 << 12
"""Blocks go to numbers of 2 MiB from here on, above every page."""


class Reference(RuleBasedStateMachine):
    """SubstreamIDs 1 and 2 use ASIDs 7 and 8 and tables of their own, their CDs never change."""

    @initialize()
    def start(self) -> None:
        self.rig = Rig()
        contexts = self.rig.alloc(256, 256)
        self.tables = {asid: self.rig.alloc(4096) for asid in ASIDS}
        for substream, asid in enumerate(ASIDS, 1):
            cd = CD_PLAIN & ~(0xFFFF << 48) | asid << 48
            self.rig.put(contexts + 64 * substream, cd, self.tables[asid], self.rig.high)
        self.rig.put(hw.STRTAB + 64 * hw.STREAM, hw.STE_S1 | contexts | 2 << 59)
        self.now: dict[tuple[int, int], State] = {}
        self.past: dict[tuple[int, int], set[Mapping]] = {}
        self.blocks: set[tuple[int, int]] = set()
        self.leaves: dict[tuple[int, int], int] = {}
        self.held: list[tuple[Translation, int]] = []

    # What the reference says

    def possible(self, asid: int, page: int) -> set[Mapping]:
        """Now, or before; a global entry of the other address space may answer too."""
        found: set[Mapping] = set()
        for space in ASIDS:
            states = {self.now.get((space, page)), *self.past.get((space, page), ())}
            found |= {s for s in states if s is not None and (s.is_global or space == asid)}
        return found

    def change(self, asid: int, page: int, state: State) -> None:
        before = self.now.get((asid, page))
        past = self.past.setdefault((asid, page), set())
        if before is not None:
            past.add(before)
        self.now[asid, page] = state

    def forget(self, asid: int | None, page: int | None, *, globals_too: bool) -> None:
        for (space, place), states in self.past.items():
            if page is not None and page != place:
                continue
            mine = asid is None or space == asid
            self.past[space, place] = {
                s for s in states if not (globals_too if s.is_global else mine)
            }

    # What the guest does

    def leaf(self, asid: int, region: int) -> int:
        """The level 3 table of a region, made and linked when there is none."""
        top = self.rig.low
        self.rig.low = self.tables[asid]
        key = asid, region
        if key not in self.leaves:
            self.leaves[key] = self.rig.alloc(4096)
            self.rig.map(region << 21, self.leaves[key] | hw.TABLE, level=2)
        self.rig.low = top
        return self.leaves[key]

    def in_block(self, asid: int, page: int) -> bool:
        return (asid, page >> 9) in self.blocks

    @rule(asid=asids, page=pages, output=outputs, writable=st.booleans(), is_global=st.booleans())
    def map_page(self, asid: int, page: int, output: int, writable: bool, is_global: bool) -> None:
        if self.in_block(asid, page):
            return
        word = output << 12 | hw.USER | hw.AF | hw.PAGE
        word |= (0 if writable else hw.READ_ONLY) | (0 if is_global else hw.NG)
        self.rig.put(self.leaf(asid, page >> 9) + 8 * (page & 511), word)
        self.change(asid, page, Mapping(output, writable, is_global))

    @rule(asid=asids, page=pages)
    def unmap_page(self, asid: int, page: int) -> None:
        if not self.in_block(asid, page):
            self.rig.put(self.leaf(asid, page >> 9) + 8 * (page & 511), 0)
            self.change(asid, page, None)

    @rule(asid=asids, region=st.sampled_from(REGIONS), output=st.integers(BLOCKS, BLOCKS + 100))
    def replace_table_by_block(self, asid: int, region: int, output: int) -> None:
        """With the break before make that the architecture asks for."""
        self.leaf(asid, region)
        self.link(asid, region, 0)
        for page in (p for p in PAGES if p >> 9 == region):
            self.change(asid, page, None)
            self.tlbi_va(asid, page)
        self.link(asid, region, output << 21 | hw.USER | hw.AF | hw.NG | hw.BLOCK)
        for page in (p for p in PAGES if p >> 9 == region):
            self.change(asid, page, Mapping(output << 9 | page & 511, True, False))
        self.blocks.add((asid, region))

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), invalidate=st.booleans())
    def remove_block(self, data: st.DataObject, invalidate: bool) -> None:
        asid, region = data.draw(st.sampled_from(sorted(self.blocks)))
        self.blocks.remove((asid, region))
        self.link(asid, region, 0)
        table = self.leaves[asid, region]
        self.rig.put(table, *(0,) * 512)
        for page in (p for p in PAGES if p >> 9 == region):
            self.change(asid, page, None)
        if invalidate:  # one address is enough for a block
            self.tlbi_va(asid, region << 9 | 77)
            for page in (p for p in PAGES if p >> 9 == region):
                self.forget_block(asid, page)
        self.link(asid, region, table | hw.TABLE)

    def forget_block(self, asid: int, page: int) -> None:
        """The last thing that this page was is gone; what it was as a page may still be there."""
        self.past[asid, page] = {s for s in self.past[asid, page] if s.page < BLOCKS << 9}

    def link(self, asid: int, region: int, word: int) -> None:
        top = self.rig.low
        self.rig.low = self.tables[asid]
        self.rig.map(region << 21, word, level=2)
        self.rig.low = top

    @rule(asid=asids, page=pages)
    def tlbi_va(self, asid: int, page: int) -> None:
        self.invalidate((0x12 | asid << 48, page << 12))
        self.forget(asid, page, globals_too=True)

    @rule(page=pages)
    def tlbi_vaa(self, page: int) -> None:
        self.invalidate((0x13, page << 12))
        self.forget(None, page, globals_too=True)

    @rule(asid=asids)
    def tlbi_asid(self, asid: int) -> None:
        self.invalidate((0x11 | asid << 48, 0))
        self.forget(asid, None, globals_too=False)

    @rule(opcode=st.sampled_from([0x10, 0x30]))
    def tlbi_all(self, opcode: int) -> None:
        self.invalidate((opcode, 0))
        self.forget(None, None, globals_too=True)

    @rule(command=st.sampled_from([(0x04, 31), (0x03 | hw.STREAM << 32, 1), (0x01, 0)]))
    def configuration_commands_change_nothing(self, command: tuple[int, int]) -> None:
        self.invalidate(command)

    def invalidate(self, command: tuple[int, int]) -> None:
        """The command and a CMD_SYNC, which is complete when nothing from before is in flight."""
        flying = bool(self.held)
        self.rig.submit(command, (0x46, 0))
        assert self.rig.consumed == (not flying or command[0] & 0xFF == 1)
        for translation, first in self.held:
            assert translation.runs[0] == first
            self.rig.smmu.retire(translation)
        self.held.clear()
        self.rig.run()
        assert self.rig.consumed

    # What devices do

    @rule(asid=asids, page=pages, write=st.booleans(), offset=st.integers(0, 4095))
    def translate(self, asid: int, page: int, write: bool, offset: int) -> None:
        allowed = self.possible(asid, page)
        address = page << 12 | offset
        try:
            found = self.rig.physical(address, substream=ASIDS.index(asid) + 1, write=write)
        except TransactionAborted:
            number = hw.number(self.rig.events()[-1])
            if number == 0x10:
                assert self.now.get((asid, page)) is None
            else:
                assert number == 0x13
                assert write
                assert any(not state.writable for state in allowed)
            return
        assert found in {s.page << 12 | offset for s in allowed if s.writable or not write}

    @rule(asid=asids, page=pages, count=st.integers(1, 4))
    def translate_range(self, asid: int, page: int, count: int) -> None:
        """Each page of a range is one that its page may be."""
        try:
            ranges = self.rig.go(page << 12, count << 12, substream=ASIDS.index(asid) + 1)
        except TransactionAborted:
            self.rig.events()
            assert self.now.get((asid, page)) is None
            return
        outputs = [start + i for start, length in ranges for i in range(0, length, 4096)]
        for index, output in enumerate(outputs):
            if page + index in PAGES:
                assert output >> 12 in {s.page for s in self.possible(asid, page + index)}

    @rule(asid=asids, page=pages)
    def hold(self, asid: int, page: int) -> None:
        """A transaction that stays in flight until the next invalidation."""
        try:
            held = self.rig.begin(page << 12, access=Access(hw.STREAM, ASIDS.index(asid) + 1))
        except TransactionAborted:
            self.rig.events()
        else:
            self.held.append((held, held.runs[0]))

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "rig"):
            assert len(self.rig.smmu.in_flight) == len(self.held)
            assert self.rig.read(hw.GERROR) == 0


TestReference = Reference.TestCase
TestReference.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
