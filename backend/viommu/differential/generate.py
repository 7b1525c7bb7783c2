"""Makes random cases from a seed: the stream table, who is attached to what, and what happens then.

Cases stay within what the architecture determines: a cached entry is changed only together with the commands that
invalidate it, ASIDs and VMIDs are not shared by different tables, and what is global is so in one context only.
"""

from random import Random

from viommu.differential import board
from viommu.differential.abilities import Abilities
from viommu.differential.cases import Access, Case, Commands, Step, Store
from viommu.differential.regimes import (
    NOT_GLOBAL,
    Half,
    Regime,
    leaf_1,
    leaf_2,
    make_stage_1,
    make_stage_2,
    spoil,
    target,
)
from viommu.differential.tables import VALID, Full, Mapping, Space

_PAGE_MASK = 0xFFF
_WORD = (1 << 64) - 1

# STE fields that may be set where they do not fit: S1CDMax, S1STALLD, V.
_STE_BREAKS = (
    (0, 0x1F << 59, -1),
    (1, 1 << 27, 1 << 27),
    (0, 1, 0),
    (0, 7 << 1, -1),
    (0, ((1 << 52) - 1) & ~0x3F, board.NOWHERE),
)


# Reserved opcodes, a Secure stream, a reserved signal, commands of features that are not there, and ranges that are
# reserved: at the end, for the queue stops.
_WRONG_COMMANDS = (
    *((opcode, 0) for opcode in (0x00, 0x08, 0x0F, 0x15, 0x2F, 0x31, 0x47, 0xFF)),
    *((opcode | 1 << 10, 0) for opcode in (0x03, 0x04, 0x05, 0x06)),
    (0x46 | 3 << 12, 0),
    *((opcode, 0) for opcode in (0x18, 0x1A, 0x20, 0x21, 0x22, 0x23, 0x40, 0x41, 0x44, 0x45)),
    *((opcode, granule << 10) for opcode, granule in ((0x12, 1), (0x13, 2), (0x2A, 3))),
)


def generate(seed: int, number: int, abilities: Abilities) -> Case:
    """Case `number` of `seed`: the same for the same abilities."""
    random = Random(f"{seed}/{number}")  # noqa: S311 - it has to be repeatable
    while True:
        try:
            return _Maker(random, abilities).case()
        except Full:
            continue


class _Maker:
    def __init__(self, random: Random, abilities: Abilities) -> None:
        self.random = random
        self.abilities = abilities
        self.space = Space()
        self.steps: list[Step] = []
        self.regimes: list[Regime] = []
        self.attached: dict[int, Regime | None] = {}  # by StreamID; None: no tables
        self.ste_places: dict[int, int] = {}
        self._offset = 0

    def case(self) -> Case:
        random = self.random
        base, configuration = self._stream_table()
        self._make_regimes()
        for writer, reader in zip(board.MASTERS[::2], board.MASTERS[1::2], strict=True):
            words, regime = self._some_ste()
            for master in (writer, reader):
                if random.random() < 0.05:
                    words, regime = self._some_ste()
                self.attached[master.stream_id] = regime
                if place := self.ste_places.get(master.stream_id):
                    self.space.put(place, *words)
        image = dict(self.space.image)
        for _ in range(random.randint(4, 10)):
            self._step()
        if random.random() < 0.03:
            self._submit(random.choice(_WRONG_COMMANDS))
        return Case(
            strtab_base=base,
            strtab_base_cfg=configuration,
            cr2=0 if random.random() < 0.05 else 1 << 1,
            image=image,
            steps=tuple(self.steps),
        )

    # Streams

    def _stream_table(self) -> tuple[int, int]:
        """STRTAB_BASE and STRTAB_BASE_CFG; the places of the STEs (3.3.1)."""
        random = self.random
        log2size = random.choice((3, 4, 8, 10, 11, 11, 11, 11, 11, 12, 13, 16))
        if random.random() < 0.6:
            # Alone at the beginning, where it is aligned to any size.
            base = self.space.allocate(64 << 11)
            for master in board.MASTERS:
                if not master.stream_id >> log2size:
                    self.ste_places[master.stream_id] = base + master.stream_id * 64
            return self._spoiled_base(base, 6 + log2size), log2size
        split = random.choice((6, 8, 10))
        size = max(64, 8 << max(0, log2size - split))
        base = self.space.allocate(size)
        for master in board.MASTERS:
            self._second_level(base, split, log2size, master.stream_id)
        return self._spoiled_base(base, size.bit_length() - 1), 1 << 16 | split << 6 | log2size

    def _spoiled_base(self, base: int, aligned: int) -> int:
        roll = self.random.random()
        if roll < 0.01:
            return board.NOWHERE
        if roll < 0.06 and aligned > 7:
            return base | self.random.getrandbits(aligned - 7) << 6  # ignored
        return base | (1 << 62 if roll < 0.2 else 0)  # RA, a hint

    def _second_level(self, base: int, split: int, log2size: int, stream_id: int) -> None:
        random = self.random
        entry = base + (stream_id >> split) * 8
        index = stream_id & (1 << split) - 1
        if stream_id >> log2size:
            return
        if entry in self.space.image:
            word = self.space.image[entry]
            span, table = word & 0x1F, word & ~0x3F
        else:
            # Just enough for both masters of a pair, or all that the split allows.
            span = random.choice((split + 1, split + 1, (index | 1).bit_length() + 1))
            if random.random() < 0.1:
                span = random.choice((0, index.bit_length(), split + 2, 31))
            # As large as it can be: QEMU looks beyond the span.
            table = self.space.allocate(64 << split)
            far = random.random() < 0.03
            self.space.put(entry, (board.NOWHERE if far else table) | span)
        if 1 <= span <= split + 1 and not index >> (span - 1) and table < board.NOWHERE:
            self.ste_places[stream_id] = table + index * 64

    def _make_regimes(self) -> None:
        random = self.random
        count = random.choice((1, 1, 2, 3))
        kinds = [1] * self.abilities.stage_1 + [2] * self.abilities.stage_2
        if len(kinds) == 2:
            kinds = [1, 1, 2, 3, 3]
        for number in range(count):
            kind = random.choice(kinds)
            # Each stage 2 is a VM of its own; stage 1 alone is VMID 0.
            regime = Regime(
                asid=0x100 * number + random.randrange(0x100),
                vmid=1 + number * 0x100 if kind & 2 else 0,
                all_global_allowed=count == 1,
            )
            if kind & 2:
                make_stage_2(random, self.space, self.abilities, regime)
            if kind & 1:
                make_stage_1(random, self.space, self.abilities, regime)
            self.regimes.append(regime)

    def _some_ste(self) -> tuple[list[int], Regime | None]:
        """An STE, and the regime that it names (5.2)."""
        random = self.random
        roll = random.random()
        if roll < 0.05:
            return [VALID | random.randrange(4) << 1 | self._pointer_noise(), 0, 0, 0], None
        if roll < 0.13:
            return [VALID | 4 << 1, random.getrandbits(2) << 44, 0, 0], None
        regime = random.choice(self.regimes)
        ignored = random.randrange(3) << 4  # S1Fmt, when S1CDMax is 0
        words = [VALID | regime.config << 1 | ignored | regime.cd, 1 << 44, *regime.ste_2]
        spoil(random, words, _STE_BREAKS, 0.06)
        if words[0] >> 1 & 7 not in (4, regime.config):
            words[0] &= ~(4 << 1)  # other stages than those that were prepared
        return words, regime

    def _pointer_noise(self) -> int:
        return self.random.getrandbits(40) << 6

    # Steps

    def _step(self) -> None:
        roll = self.random.random()
        if roll < 0.12:
            self._change_mapping()
        elif roll < 0.17:
            self._change_ste()
        elif roll < 0.2:
            self._change_cd()
        elif roll < 0.24:
            self._invalidate_something()
        else:
            self._access()

    def _access(self, regime: Regime | None = None, mapping: Mapping | None = None) -> None:
        """One access, or one of each direction; of `regime` at `mapping` if anybody is attached to it."""
        random = self.random
        masters = [
            master
            for master in board.MASTERS
            if regime is None or self.attached[master.stream_id] is regime
        ]
        master = random.choice(masters or board.MASTERS)
        found = self.attached[master.stream_id]
        iova = self._iova(found, mapping if masters and regime else None)
        self._add_access(master, iova)
        if random.random() < 0.3:
            self._add_access(board.MASTERS[board.MASTERS.index(master) ^ 1], iova)

    def _add_access(self, master: board.Master, iova: int) -> None:
        # Each access has a place of its own in its page: what one wrote, no other touches.
        self._offset += 8
        iova = iova & ~_PAGE_MASK | self._offset
        self.steps.append(Access(master.stream_id, master.writes, iova))

    def _iova(self, regime: Regime | None, mapping: Mapping | None) -> int:
        random = self.random
        if regime is None or not regime.halves:
            return target(random)
        half = random.choice(regime.halves)
        for other in regime.halves:
            half = other if mapping in other.table.mappings else half
        if mapping not in half.table.mappings:
            mapping = None  # of stage 2 below: any way may lead to it
        if mapping is None and half.table.mappings and random.random() < 0.75:
            mapping = random.choice(half.table.mappings)
        if mapping is None:
            address = half.table.some_address(random, half.prefix)
            if random.random() < 0.1:
                address ^= 1 << random.randint(40, 63)  # out of the range, or in the other half
            return self._tagged(half, address)
        span = 1 << half.table.geometry.shift(mapping.level)
        goals = regime.goals if regime.stage_1 and regime.stage_2 else [target(random)]
        goals = [goal for goal in goals if 0 <= goal - mapping.output < span]
        offset = random.choice(goals) - mapping.output if goals else random.randrange(span)
        if board.in_tables(mapping.output + offset):
            return target(random)  # what is mapped so that it can be walked
        return self._tagged(half, (mapping.address + offset) & _WORD)

    def _tagged(self, half: Half, address: int) -> int:
        if self.random.random() < (0.3 if half.tagged else 0.02):
            address ^= self.random.choice((0x5A, 0x5A, 0x81)) << 56
        return address

    def _submit(self, *words: tuple[int, int]) -> None:
        self.steps.append(Commands(words))

    def _change_mapping(self) -> None:
        """Change a leaf, invalidate it, and look."""
        random = self.random
        regime = random.choice(self.regimes)
        tables = [*regime.stage_1, *([regime.stage_2] if regime.stage_2 else [])]
        choices = [(half, m) for half in tables for m in half.table.mappings]
        if not choices:
            return
        half, mapping = random.choice(choices)
        self._access(regime, mapping)
        second = half is regime.stage_2
        old = self.space.image[mapping.entry]
        if random.random() < 0.3:
            new = old ^ 1
        else:
            output = target(random) & -(1 << half.table.geometry.shift(mapping.level))
            leaf = leaf_2(random, self.abilities) if second else leaf_1(random, regime)
            new = old & 3 | output | leaf
            mapping.output = output
        self.space.image[mapping.entry] = new
        self.steps.append(Store(mapping.entry, new))
        commands = [self._invalidation(regime, half, mapping, bool(old & NOT_GLOBAL))]
        span = 1 << half.table.geometry.shift(mapping.level)
        if second and mapping.address - board.TABLES_SIZE < board.TABLES < mapping.address + span:
            commands.append(
                board.CFGI_ALL
            )  # a CD may be cached, or be fetched from where it is now
        self._submit(*commands)
        self._access(regime, mapping)

    def _invalidation(
        self, regime: Regime, half: Half, mapping: Mapping, not_global: bool
    ) -> tuple[int, int]:
        """A command that removes what was cached of `mapping` (4.4)."""
        random = self.random
        second = half is regime.stage_2
        vmid, asid = regime.vmid << 32, regime.asid << 48
        address = mapping.address & ~_PAGE_MASK | random.randrange(2)  # bit 0: Leaf
        everything = [(0x30, 0)]
        if second:
            choices = [(0x28 | vmid, 0), *everything]  # TLBI_S12_VMALL
            if not regime.stage_1:
                choices += [(0x2A | vmid, address)] * 3  # TLBI_S2_IPA
                if self.abilities.ranges:
                    low, high = self._range(half, mapping)
                    choices += [(0x2A | vmid | low, high)] * 2
        else:
            choices = [(0x10 | vmid, 0), *everything]  # TLBI_NH_ALL
            choices += [(0x12 | asid | vmid, address)] * 3  # TLBI_NH_VA
            choices += [(0x13 | vmid, address)]  # TLBI_NH_VAA
            if self.abilities.ranges:
                low, high = self._range(half, mapping)
                choices += [(0x12 | asid | vmid | low, high), (0x13 | vmid | low, high)]
            if not_global:
                choices += [(0x11 | asid | vmid, 0)]  # TLBI_NH_ASID
        return random.choice(choices)

    def _range(self, half: Half, mapping: Mapping) -> tuple[int, int]:
        """NUM, SCALE, TTL, TG, Leaf and Address of a range that begins with `mapping` (4.4.1.1)."""
        random = self.random
        low = random.randrange(32) << 12 | random.choice((0, 0, 1, 2, 5, 9)) << 20
        granule = {12: 1, 14: 2, 16: 3}[half.table.geometry.granule]
        level = random.choice((0, mapping.level))
        if not low and (not level or (granule, level) == (2, 1)):
            low = 1 << 12  # a granule with neither range nor level is reserved
        return low, mapping.address & ~_PAGE_MASK | granule << 10 | level << 8 | random.randrange(2)

    def _change_ste(self) -> None:
        """Attach a stream to something else."""
        random = self.random
        master = random.choice(board.MASTERS)
        place = self.ste_places.get(master.stream_id)
        self._add_access(master, self._iova(self.attached[master.stream_id], None))
        if place is None:
            return
        words, self.attached[master.stream_id] = self._some_ste()
        for offset, word in enumerate(words):
            if self.space.image.get(place + offset * 8) != word:
                self.space.image[place + offset * 8] = word
                self.steps.append(Store(place + offset * 8, word))
        stream = master.stream_id << 32
        self._submit(
            random.choice(
                (
                    (0x03 | stream, random.randrange(2)),  # CFGI_STE
                    (0x04 | stream, random.randrange(12)),  # CFGI_STE_RANGE
                    board.CFGI_ALL,
                )
            )
        )
        self._add_access(master, self._iova(self.attached[master.stream_id], None))

    def _change_cd(self) -> None:
        """Change one thing in a context descriptor."""
        random = self.random
        regime = random.choice(self.regimes)
        if not regime.cd:
            return
        self._access(regime)
        # R, A, AFFD, EPD0, EPD1, TBI0: a bit that makes a difference.
        regime.cd_words[0] ^= 1 << random.choice((45, 46, 35, 14, 30, 38))
        self.space.image[regime.cd] = regime.cd_words[0]
        self.steps.append(Store(regime.cd, regime.cd_words[0]))
        streams = [sid << 32 for sid, found in self.attached.items() if found is regime]
        command = random.choice((0x05, 0x06))  # CFGI_CD, CFGI_CD_ALL
        self._submit(*((command | stream, 0) for stream in streams), board.TLBI_NSNH_ALL)
        self._access(regime)

    def _invalidate_something(self) -> None:
        """A command that has nothing to do here does no harm."""
        random = self.random
        opcode = random.choice((0x01, 0x03, 0x05, 0x06, 0x10, 0x11, 0x12, 0x13, 0x30))
        stream = random.choice(board.MASTERS).stream_id << 32
        self._submit((opcode | stream, random.getrandbits(48) & ~_PAGE_MASK))
