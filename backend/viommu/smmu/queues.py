"""What the command queue and the event queue have in common: a ring in guest RAM with wrap bits (IHI 0070, 3.5)."""

from viommu.layouts.registers import QueueBase

_POSITION = 0xF_FFFF  # the 20 bits of a register that hold index and wrap bit


class Ring:
    """The position of one queue. `prod` and `cons` are register values: index, then the wrap bit above it."""

    def __init__(self, entry_size: int, max_log2: int) -> None:
        self.base = QueueBase()
        self.prod = 0
        self.cons = 0
        self._entry_size = entry_size
        self._max_log2 = max_log2

    def reset(self) -> None:
        """All registers 0."""
        self.base = QueueBase()
        self.prod = self.cons = 0

    @property
    def log2size(self) -> int:
        """log2 of entries; a LOG2SIZE above the maximum behaves as the maximum (6.3.26)."""
        return min(self.base.log2size, self._max_log2)

    @property
    def _positions(self) -> int:
        # Index and wrap bit together.
        return (2 << self.log2size) - 1

    @property
    def empty(self) -> bool:
        """Index and wrap bit equal."""
        return not (self.prod ^ self.cons) & self._positions

    @property
    def full(self) -> bool:
        """Index equal, wrap bit not."""
        return (self.prod ^ self.cons) & self._positions == 1 << self.log2size

    def visible(self, position: int) -> int:
        """What a register shows of a position that the SMMU owns: the bits above the wrap bit read as 0 (6.3.28)."""
        return position & (self._positions | ~_POSITION)

    def address(self, position: int) -> int:
        """Where the entry of `position` lies. The base is aligned to the size of the queue (6.3.26)."""
        size = self._entry_size << self.log2size
        index = position & (1 << self.log2size) - 1
        return self.base.addr & ~(max(32, size) - 1) | index * self._entry_size

    def after(self, position: int) -> int:
        """The position behind `position`; bits above the wrap bit stay."""
        return position & ~self._positions | (position + 1) & self._positions
