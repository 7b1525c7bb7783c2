"""Random context descriptors, stage 2 fields and the tables below them, mostly valid (IHI 0070, 5.2 and 5.4)."""

from dataclasses import dataclass, field
from random import Random

from viommu.differential import board
from viommu.differential.abilities import OUTPUT_SIZES, Abilities
from viommu.differential.tables import Geometry, Space, Table

PAGE = 4096
_TG0 = {12: 0, 14: 2, 16: 1}
_TG1 = {12: 2, 14: 1, 16: 3}
_S2TG = {12: 0, 14: 2, 16: 1}

ACCESS_FLAG = 1 << 10
NOT_GLOBAL = 1 << 11


@dataclass
class Half:
    """One of the tables that a stage looks addresses up in; `prefix` is the sign of TTB1, `tagged` that TBI is on."""

    table: Table
    prefix: int = 0
    tagged: bool = False


@dataclass
class Regime:
    """What streams may be attached to. `cd` is 0 without stage 1; `ste_2` are words 2 and 3 of the STE."""

    asid: int = 0
    vmid: int = 0
    cd: int = 0
    cd_words: list[int] = field(default_factory=list)
    stage_1: list[Half] = field(default_factory=list)
    stage_2: Half | None = None
    ste_2: tuple[int, int] = (0, 0)
    all_global_allowed: bool = True
    goals: list[int] = field(default_factory=list)
    """Outputs that are worth reaching: IPAs that stage 2 maps, else places in `board.TARGETS`."""

    @property
    def config(self) -> int:
        """STE.Config (5.2)."""
        return 4 | (1 if self.cd else 0) | (2 if self.stage_2 else 0)

    @property
    def halves(self) -> list[Half]:
        """Where input addresses are looked up."""
        return self.stage_1 or ([self.stage_2] if self.stage_2 else [])


def _bits(random: Random, chances: dict[int, float]) -> int:
    """Each bit of the mask with its chance."""
    return sum(bit for bit, chance in chances.items() if random.random() < chance)


def target(random: Random) -> int:
    """A page that a leaf may point to: mostly in memory, sometimes nowhere or too far out."""
    page = random.randrange(board.TARGETS_SIZE // PAGE) * PAGE
    roll = random.random()
    if roll < 0.92:
        return board.TARGETS + page
    if roll < 0.96:
        return board.NOWHERE + page
    return (1 << random.choice((36, 42, 43, 44, 45, 47))) + board.TARGETS + page


def leaf_1(random: Random, regime: Regime) -> int:
    """Attributes of a stage 1 leaf: AP, AF, nG, PXN, XN, and bits that do not matter here (DDI 0487, D8.3)."""
    bits = _bits(
        random,
        {
            1 << 6: 0.9,
            1 << 7: 0.25,
            ACCESS_FLAG: 0.9,
            NOT_GLOBAL: 0.7,
            1 << 53: 0.15,
            1 << 54: 0.15,
        },
    )
    if not regime.all_global_allowed:
        bits |= NOT_GLOBAL
    return bits | random.choice((0, 1, 2, 7)) << 2 | random.randrange(4) << 8 | _noise(random)


def leaf_2(random: Random, abilities: Abilities) -> int:
    """Attributes of a stage 2 leaf: S2AP, AF, XN, and memory attributes (DDI 0487, D8.3)."""
    bits = _bits(random, {1 << 6: 0.92, 1 << 7: 0.85, ACCESS_FLAG: 0.92, 1 << 54: 0.1})
    if abilities.execute_never_2:
        bits |= _bits(random, {1 << 53: 0.1})
    return bits | 0xF << 2 | random.randrange(4) << 8 | _noise(random)


def _noise(random: Random) -> int:
    # Bits 58:55 belong to software.
    return random.getrandbits(4) << 55 if random.random() < 0.1 else 0


def hierarchy(random: Random) -> int:
    """NSTable, APTable, XNTable and PXNTable of a table descriptor (DDI 0487, D8.3).

    And nG, which tables do not have: one that is damaged may become a block.
    """
    chances = {1 << 59: 0.05, 1 << 60: 0.05, 1 << 61: 0.03, 1 << 62: 0.04, 1 << 63: 0.1}
    return NOT_GLOBAL | _bits(random, chances)


def _level(random: Random, levels: list[int]) -> int:
    return 3 if random.random() < 0.7 else random.choice(levels)


def _pages(random: Random, half: Half, count: int) -> list[int]:
    return [half.table.some_address(random, half.prefix) for _ in range(count)]


def make_stage_1(random: Random, space: Space, abilities: Abilities, regime: Regime) -> None:
    """A context descriptor and what it points to."""
    regime.cd = space.allocate(64)
    ips = random.choice((0, 1, 2, 3, 4, 5, 5, 5, 5))
    if random.random() < 0.001:
        ips = random.choice((6, 7))  # QEMU does not survive it
    word = regime.asid << 48 | ips << 32
    word |= 1 << 31 | 1 << 41 | 1 << 46  # V, AA64, A
    word |= _bits(
        random, {1 << 45: 0.85, 1 << 35: 0.15, 1 << 36: 0.05, 1 << 37: 0.05, 1 << 47: 0.5}
    )
    word |= _bits(random, {1 << 38: 0.2, 1 << 39: 0.2, 1 << 40: 0.05})  # TBI0, TBI1, PAN
    words = [word, 0, 0, 0, 0, 0, 0, 0]
    for high in (False, True):
        _make_half(random, space, abilities, regime, words, high)
    spoil(random, words, _CD_BREAKS, 0.08)
    regime.cd_words = words
    space.put(regime.cd, *words)


def _make_half(
    random: Random,
    space: Space,
    abilities: Abilities,
    regime: Regime,
    words: list[int],
    high: bool,
) -> None:
    shift = 16 if high else 0
    if random.random() < (0.5 if high else 0.1):
        words[0] |= 1 << 14 + shift  # EPD: nothing else of this half counts
        words[0] |= random.getrandbits(6) << shift
        words[2 if high else 1] = board.TARGETS  # should the bit be cleared later
        return
    granule = random.choice(abilities.granules)
    tsz = random.choice((16, 16, 16, 25, 25, 28, 34, 39, random.randint(16, 39)))
    words[0] |= tsz << shift | (_TG1 if high else _TG0)[granule] << 6 + shift
    table = Table(space, Geometry.of_stage_1(64 - tsz, granule))
    prefix = (1 << 64) - (1 << (64 - tsz)) if high else 0
    half = Half(table, prefix, bool(words[0] >> (39 if high else 38) & 1))
    ignored = random.randrange(4) << 4 if table.geometry.root_size > 64 else 0
    words[2 if high else 1] = table.root | (ignored if random.random() < 0.1 else 0)
    if abilities.hierarchy_disable and random.random() < 0.2:
        words[2 if high else 1] |= 1 << 1  # HAD
    levels = table.geometry.leaf_levels()
    for address in _pages(random, half, random.randint(1, 5)):
        output = random.choice(regime.goals or [0]) if regime.stage_2 else target(random)
        leaf = leaf_1(random, regime)
        table.add(address, output, _level(random, levels), leaf, hierarchy(random))
    damage(random, space, table)
    regime.stage_1.append(half)


def make_stage_2(random: Random, space: Space, abilities: Abilities, regime: Regime) -> None:
    """Stage 2 tables, and the words of an STE that point to them.

    The tables themselves are mapped where they are, so that stage 1 can be found through it.
    """
    granule = random.choice(abilities.granules)
    # Input sizes for which the start level is one that SL0 can say, with at most 16 tables side by side.
    stride = granule - 3
    sizes = [bits for bits in (31, 32, 33, 36, 40, 42, 44) if bits <= abilities.output_bits]
    bits = random.choice(sizes)
    natural = Geometry.of_stage_1(bits, granule).start
    start = max(natural, 0 if granule == 12 else 1)
    if start < 3 and bits - granule - stride * (3 - start) <= 4 and random.random() < 0.15:
        start += 1  # concatenated instead of one level more
    if bits - granule - stride * (4 - start) > 4 or (granule == 12 and start == 3):
        start = natural
    sl0 = 2 - start if granule == 12 else 3 - start
    geometry = Geometry(bits, granule, start)
    table = Table(space, geometry)
    regime.stage_2 = Half(table)
    block = min(level for level in geometry.leaf_levels())
    for place in range(board.TABLES, board.TABLES + board.TABLES_SIZE, 1 << geometry.shift(block)):
        leaf = (
            leaf_2(random, abilities) if random.random() < 0.05 else 0xF << 2 | 3 << 6 | ACCESS_FLAG
        )
        table.add(place, place, block, leaf)
    levels = geometry.leaf_levels()
    for address in _pages(random, regime.stage_2, random.randint(2, 6)):
        table.add(address, target(random), _level(random, levels), leaf_2(random, abilities))
    regime.goals = [m.address for m in table.mappings if not board.in_tables(m.address)]
    damage(random, space, table)
    # Mostly at least as much out as in: QEMU wants it.
    enough = [code for code, size in enumerate(OUTPUT_SIZES) if size >= bits]
    ps = random.choice(enough if random.random() < 0.9 else range(8))
    word = regime.vmid | (64 - bits) << 32 | sl0 << 38 | _S2TG[granule] << 46 | ps << 48
    word |= 1 << 51 | _bits(
        random, {1 << 53: 0.15, 1 << 54: 0.1, 1 << 58: 0.85}
    )  # AA64; AFFD PTW R
    words = [word, table.root]
    spoil(random, words, _STE_2_BREAKS, 0.06)
    regime.ste_2 = words[0], words[1]


def damage(random: Random, space: Space, table: Table) -> None:
    """Break some descriptors: not valid, of the wrong kind, pointing nowhere or too far out."""
    entries = [m.entry for m in table.mappings] + table.tables
    for entry in entries:
        if random.random() > 0.05:
            continue
        word = space.image[entry]
        roll = random.randrange(4)
        if roll == 0:
            word &= ~1
        elif roll == 1:
            word ^= 2
        elif roll == 2:
            word ^= 1 << random.choice((6, 7, 10))
        else:
            word = word & ~(((1 << 48) - 1) & ~0xFFF) | random.choice(_FAR_AWAY)
        space.put(entry, word)


_FAR_AWAY = (board.NOWHERE, 1 << 36, 1 << 43, 1 << 44, 1 << 47, board.NOWHERE | 1 << 46)

Break = tuple[int, int, int]
"""A word, the mask of a field in it, and the field's new value, in place; a value of -1 is random."""

_CD_BREAKS: tuple[Break, ...] = (
    (0, 1 << 31, 0),  # V
    (0, 1 << 41, 0),  # AA64
    (0, 1 << 46, 0),  # A
    (0, 1 << 44, -1),  # S
    (0, 1 << 43, -1),  # HA
    (0, 1 << 42, -1),  # HD
    (0, 1 << 15, 1 << 15),  # ENDI
    (0, 0x3F, -1),  # T0SZ
    (0, 0x3F << 16, -1),  # T1SZ
    (0, 3 << 6, 3 << 6),  # TG0
    (0, 3 << 22, 0),  # TG1
    (1, 0xFF << 44, -1),  # TTB0
    (2, 0xFF << 44, -1),  # TTB1
    (1, ((1 << 52) - 1) & ~0xF, board.NOWHERE),
    (2, ((1 << 52) - 1) & ~0xF, board.NOWHERE),
    (3, (1 << 64) - 1, -1),
)
_STE_2_BREAKS: tuple[Break, ...] = (
    (0, 0x3F << 32, -1),  # S2T0SZ
    (0, 3 << 38, -1),  # S2SL0
    (0, 3 << 46, 3 << 46),  # S2TG
    (0, 1 << 52, 1 << 52),  # S2ENDI
    (0, 1 << 57, 1 << 57),  # S2S
    (1, 0xFF << 44, -1),  # S2TTB
    (1, ((1 << 52) - 1) & ~0xF, board.NOWHERE),
)


def spoil(random: Random, words: list[int], breaks: tuple[Break, ...], chance: float) -> None:
    """With some chance put a value into a field that may not fit there."""
    if random.random() >= chance:
        return
    word, mask, value = random.choice(breaks)
    if value < 0:
        value = random.getrandbits(64) & mask
    words[word] = words[word] & ~mask | value
