"""What an access meets in memory, read plainly: the STE, the CD and the descriptors on its way.

No judgement is made here: known differences look at it to tell whether they apply. The walk goes on as long as there is
something to follow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from viommu.differential import board
from viommu.differential.abilities import OUTPUT_SIZES
from viommu.differential.cases import Access, Case, Commands, Step, Store

_GRANULES_0 = {0: 12, 1: 16, 2: 14}
_GRANULES_1 = {1: 14, 2: 12, 3: 16}
_OUTPUT = ((1 << 48) - 1) & ~0xFFF
_POINTER = ((1 << 52) - 1) & ~0x3F


@dataclass(frozen=True)
class Descriptor:
    """One step of a walk: `stage`, level, where it lies, its word, and the address that stage looks up."""

    stage: int
    level: int
    entry: int
    word: int
    granule: int
    address: int

    @property
    def is_table(self) -> bool:
        return self.level < 3 and self.word & 3 == 3

    @property
    def shift(self) -> int:
        """log2 of what it maps."""
        return self.granule + (self.granule - 3) * (3 - self.level)

    @property
    def output(self) -> int:
        """Where it points to, 48 bits."""
        return self.word & _OUTPUT & -(1 << (self.granule if self.is_table else self.shift))

    @property
    def reached(self) -> int:
        """What a block or a page makes of the address."""
        return self.output | self.address & (1 << self.shift) - 1


class Memory:
    """A case's RAM at some moment: each word is its own address until a case says otherwise."""

    def __init__(self, words: Mapping[int, int]) -> None:
        self._words = words
        self.met_devices = False  # a look at what is not RAM and below it, where QEMU has devices

    def load(self, address: int) -> int | None:
        """The word at `address`, None outside RAM."""
        if not board.in_ram(address, 8):
            self.met_devices |= address < board.RAM
            return None
        return self._words.get(address, address)

    def loads(self, address: int, count: int) -> list[int] | None:
        """`count` words, None when the first lies outside RAM."""
        if self.load(address) is None:
            return None
        return [self.load(address + 8 * place) or 0 for place in range(count)]


class Circumstances:
    """What `access` meets after the steps `before` it. Attributes are None where the way ends."""

    def __init__(
        self, case: Case, access: Access, memory: Memory, before: tuple[Step, ...]
    ) -> None:
        self.case, self.access, self.before = case, access, before
        self.memory = memory
        self.span: int | None = None
        self.ste_address: int | None = None
        self.cd: list[int] | None = None
        self.path: list[Descriptor] = []
        self.ste = self._find_ste()
        self._follow()

    # Streams

    @property
    def log2size(self) -> int:
        return self.case.strtab_base_cfg & 0x3F

    @property
    def split(self) -> int:
        return self.case.strtab_base_cfg >> 6 & 0x1F

    @property
    def index(self) -> int:
        """The place of the STE in its second-level table."""
        return self.access.stream_id & (1 << self.split) - 1

    @property
    def base(self) -> int:
        """STRTAB_BASE.ADDR."""
        return self.case.strtab_base & _POINTER

    def _find_ste(self) -> list[int] | None:
        stream_id = self.access.stream_id
        if stream_id >> self.log2size:
            return None
        if not self.case.two_level:
            self.ste_address = (self.base & -(64 << self.log2size)) + stream_id * 64
        else:
            table = self.base & -max(64, 8 << max(0, self.log2size - self.split))
            entry = self.memory.load(table + (stream_id >> self.split) * 8)
            if entry is None:
                return None
            self.span = entry & 0x1F
            if not 1 <= self.span <= self.split + 1 or self.index >> (self.span - 1):
                return None
            pointer = entry & ((1 << 52) - 1) & -(64 << (self.span - 1))
            self.ste_address = pointer + self.index * 64
        return self.memory.loads(self.ste_address, 4)

    @property
    def config(self) -> int:
        """STE.Config, 0 without an STE."""
        return self.ste[0] >> 1 & 7 if self.ste else 0

    @property
    def has_stage_1(self) -> bool:
        return self.config & 5 == 5

    @property
    def has_stage_2(self) -> bool:
        return self.config & 6 == 6

    # Translation

    def _follow(self) -> None:
        if self.ste is not None and self.has_stage_1:
            pointer = self.ste[0] & _POINTER
            address = self.through_stage_2(pointer) if self.has_stage_2 else pointer
            self.cd = None if address is None else self.memory.loads(address, 4)
            if self.cd is not None:
                self._walk_1(self.cd)
        elif self.has_stage_2:
            self.through_stage_2(self.access.iova)

    @property
    def high(self) -> bool:
        """TTB1 is for it (3.4.1)."""
        return bool(self.access.iova >> 55 & 1)

    def tbi(self, high: bool) -> bool:
        """CD.TBI0 or TBI1."""
        return bool(self.cd and self.cd[0] >> (39 if high else 38) & 1)

    @property
    def output_bits(self) -> int:
        """CD.IPS in bits, as far as IDR5.OAS goes in QEMU."""
        return min(44, (*OUTPUT_SIZES, 44)[self.cd[0] >> 32 & 7]) if self.cd else 44

    @property
    def output_bits_2(self) -> int:
        """STE.S2PS in bits, as far as IDR5.OAS goes in QEMU."""
        return min(44, (*OUTPUT_SIZES, 44)[self.ste[2] >> 48 & 7]) if self.ste else 44

    def _walk_1(self, cd: list[int]) -> None:
        shift = 16 if self.high else 0
        granule = (_GRANULES_1 if self.high else _GRANULES_0).get(cd[0] >> 6 + shift & 3)
        bits = 64 - (cd[0] >> shift & 0x3F)
        if granule is None or not 25 <= bits <= 48:
            return
        level = 4 - -(-(bits - granule) // (granule - 3))
        root = cd[2 if self.high else 1] & ((1 << 52) - 1) & ~0xF
        size = 8 << bits - granule - (granule - 3) * (3 - level)
        address = self.access.iova & (1 << bits) - 1
        for found in self._walk(1, root & -size, granule, level, address):
            if not found.is_table and found.word & 1 and self.has_stage_2:
                self.through_stage_2(found.reached)

    def through_stage_2(self, ipa: int) -> int | None:
        """The physical address that stage 2 has for `ipa`, whatever its permissions; its look-up joins `path`."""
        assert self.ste is not None
        word = self.ste[2]
        granule = _GRANULES_0.get(word >> 46 & 3)
        bits = 64 - (word >> 32 & 0x3F)
        if granule is None or ipa >> bits:
            return None
        sl0 = word >> 38 & 3
        level = (2 if granule == 12 else 3) - sl0
        size = 8 << max(0, bits - granule - (granule - 3) * (3 - level))
        root = self.ste[3] & ((1 << 52) - 1) & ~0xF & -size
        for found in self._walk(2, root, granule, level, ipa):
            if not found.is_table and found.word & 1:
                return found.reached
        return None

    def _walk(
        self, stage: int, table: int, granule: int, level: int, address: int
    ) -> Iterator[Descriptor]:
        first = True
        while 0 <= level <= 3:
            shift = granule + (granule - 3) * (3 - level)
            index = address >> shift
            if not first:
                index &= (1 << (granule - 3)) - 1
            entry: int | None = table + index * 8
            if stage == 1 and self.has_stage_2:
                entry = self.through_stage_2(table + index * 8)
            word = None if entry is None else self.memory.load(entry)
            if entry is None:
                return
            # What cannot be read is on the way too.
            found = Descriptor(stage, level, entry, word or 0, granule, address)
            self.path.append(found)
            if word is None:
                return
            yield found
            if not found.is_table:
                return
            table, level, first = found.output, level + 1, False

    def descriptors(self, stage: int) -> list[Descriptor]:
        """The descriptors of one stage on the way, in order."""
        return [found for found in self.path if found.stage == stage]

    @property
    def tables(self) -> list[Descriptor]:
        """The table descriptors of stage 1."""
        return [found for found in self.descriptors(1) if found.is_table]

    def too_high(self, stage: int) -> bool:
        """What looks like a block is at a level that has none (DDI 0487, D8.3)."""
        return any(
            found.word & 3 == 1 and found.level < (1 if found.granule == 12 else 2)
            for found in self.descriptors(stage)
        )

    @property
    def reached(self) -> int | None:
        """The physical address at the end of the way, whatever the permissions."""
        return self.path[-1].reached if self.path and not self.path[-1].is_table else None

    def records(self, stage: int) -> bool:
        """CD.R, or STE.S2R."""
        if stage == 1:
            return self.cd is None or bool(self.cd[0] >> 45 & 1)
        return self.ste is None or bool(self.ste[2] >> 58 & 1)

    @property
    def input_bits_2(self) -> int:
        """64 - STE.S2T0SZ."""
        return 64 - (self.ste[2] >> 32 & 0x3F) if self.ste else 0

    @property
    def granule_2(self) -> int:
        """STE.S2TG as log2 of bytes; 12 for the reserved value."""
        return _GRANULES_0.get(self.ste[2] >> 46 & 3, 12) if self.ste else 12

    @property
    def start_level_2(self) -> int:
        """What STE.S2SL0 says."""
        sl0 = self.ste[2] >> 38 & 3 if self.ste else 0
        return (2 if self.granule_2 == 12 else 3) - sl0

    @property
    def start_level_too_high(self) -> bool:
        """No bit of the input is left for the first table."""
        granule = self.granule_2
        return self.input_bits_2 <= granule + (granule - 3) * (3 - self.start_level_2)

    @property
    def beyond_first_table(self) -> bool:
        """A look-up of stage 2 begins in another than the first of the tables side by side."""
        return any(
            found.level == self.start_level_2
            and bool(found.address >> found.shift >> (found.granule - 3))
            for found in self.descriptors(2)
        )

    @property
    def leaf(self) -> Descriptor | None:
        """The block or page descriptor of stage 1, valid or not."""
        found = self.descriptors(1)
        return found[-1] if found and not found[-1].is_table else None


def circumstances(case: Case) -> Iterator[Circumstances]:
    """For each access of `case`, what it meets when its turn comes."""
    words = dict(case.image)
    for place, step in enumerate(case.steps):
        if isinstance(step, Store):
            words[step.address] = step.value
        elif isinstance(step, Access):
            yield Circumstances(case, step, Memory(words), case.steps[:place])


def determined(case: Case) -> bool:
    """Whether the architecture says what comes out of `case`, and both sides have the same memory for it.

    What is stored is invalidated before it is used; contexts do not share an ASID, nor global entries; and no way leads
    to QEMU's devices.
    """
    stored = False
    for step in case.steps:
        if stored and isinstance(step, Access):
            return False
        stored = isinstance(step, Store) or (stored and not isinstance(step, Commands))
    contexts: dict[int, tuple[int, int]] = {}
    shared = False
    for met in circumstances(case):
        if met.memory.met_devices:
            return False
        if met.ste and met.cd:
            contexts[met.ste[0] & _POINTER] = met.cd[0] >> 48, met.ste[2] & 0xFFFF
            shared |= (
                met.leaf is not None and met.leaf.word & (1 | 1 << 11) == 1 and not met.too_high(1)
            )
    return len(set(contexts.values())) == len(contexts) and not (shared and len(contexts) > 1)
