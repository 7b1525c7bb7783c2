"""Places raw translation tables in a case's image (DDI 0487, D8.2 and D8.3)."""

from dataclasses import dataclass
from random import Random

from viommu.differential import board

VALID = 1 << 0
TABLE = 1 << 1
"""Descriptor bits 1:0: a table, or a page at level 3, has both; a block has VALID only."""


class Full(Exception):
    """The case needs more memory for its tables than there is."""


class Space:
    """The memory that a case's tables are put into, and its image."""

    def __init__(self) -> None:
        self.image: dict[int, int] = {}
        self._next = board.TABLES

    def allocate(self, size: int, align: int = 0) -> int:
        """`size` bytes, aligned to `align` or to their size, a power of 2."""
        align = align or 1 << (size - 1).bit_length()
        address = -(-self._next // align) * align
        if address + size > board.TABLES + board.TABLES_SIZE:
            raise Full
        self._next = address + size
        return address

    def put(self, address: int, *words: int) -> None:
        """Words of 64 bits from `address` on."""
        for word in words:
            self.image[address] = word
            address += 8


@dataclass(frozen=True)
class Geometry:
    """One translation table: `input_bits` wide, `granule` log2 of bytes, from `start` on; level 3 is the last."""

    input_bits: int
    granule: int
    start: int

    @classmethod
    def of_stage_1(cls, input_bits: int, granule: int) -> "Geometry":
        """The start level follows from the input size."""
        stride = granule - 3
        return cls(input_bits, granule, 4 - -(-(input_bits - granule) // stride))

    def shift(self, level: int) -> int:
        """log2 of what one descriptor of `level` maps."""
        return self.granule + (self.granule - 3) * (3 - level)

    @property
    def root_size(self) -> int:
        """Bytes of the first table; at stage 2 of all that are concatenated."""
        return max(8, 8 << max(0, self.input_bits - self.shift(self.start)))

    def index(self, level: int, address: int) -> int:
        """Which descriptor of its table `address` takes at `level`."""
        index = (address & (1 << self.input_bits) - 1) >> self.shift(level)
        return index if level == self.start else index & (1 << (self.granule - 3)) - 1

    def leaf_levels(self) -> list[int]:
        """The levels that may hold a block or a page: none maps more than the level below 512 GiB."""
        first_block = {12: 1, 14: 2, 16: 2}[self.granule]
        return list(range(max(self.start, first_block), 4))


@dataclass
class Mapping:
    """What was put in: `address` maps to `output`, by the leaf at `entry` below the descriptors `path`."""

    address: int
    output: int
    level: int
    entry: int
    path: tuple[int, ...]


class Table:
    """A translation table in `space`, filled mapping by mapping."""

    def __init__(self, space: Space, geometry: Geometry) -> None:
        self.space = space
        self.geometry = geometry
        self.root = space.allocate(geometry.root_size, max(64, geometry.root_size))
        self.mappings: list[Mapping] = []
        self.tables: list[int] = []  # addresses of table descriptors
        self._children: dict[int, int] = {}

    def add(self, address: int, output: int, level: int, leaf: int, hierarchy: int = 0) -> bool:
        """Map `address` at `level` to `output` with the attribute bits `leaf`.

        New table descriptors above it get the attribute bits `hierarchy`. False when something is there already.
        """
        geometry, space = self.geometry, self.space
        table, path = self.root, []
        for upper in range(geometry.start, level):
            entry = table + geometry.index(upper, address) * 8
            path.append(entry)
            if entry in self._children:
                table = self._children[entry]
                continue
            if entry in space.image:
                return False
            table = self._children[entry] = space.allocate(1 << geometry.granule)
            space.put(entry, table | VALID | TABLE | hierarchy)
            self.tables.append(entry)
        entry = table + geometry.index(level, address) * 8
        if entry in space.image:
            return False
        span = 1 << geometry.shift(level)
        output &= -span
        space.put(entry, output | leaf | VALID | (TABLE if level == 3 else 0))
        self.mappings.append(Mapping(address & -span, output, level, entry, tuple(path)))
        return True

    def some_address(self, random: Random, prefix: int) -> int:
        """A random input address, half of the time near one that is mapped. `prefix` is or-ed into it."""
        if self.mappings and random.random() < 0.5:
            near = random.choice(self.mappings).address
            level = random.choice(self.geometry.leaf_levels())
            address = near + (random.randrange(-3, 4) << self.geometry.shift(level))
        else:
            address = random.getrandbits(self.geometry.input_bits)
        return address & (1 << self.geometry.input_bits) - 1 | prefix
