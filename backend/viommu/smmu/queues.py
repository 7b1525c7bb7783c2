"""What the command queue and the event queue have in common: a ring in guest RAM with wrap bits (IHI 0070, 3.5)."""

from viommu.layouts.registers import QueueBase

_POSITION = 0xF_FFFF  # the 20 bits of a register that hold index and wrap bit


class Ring:
    """The position of one queue. `prod` and `cons` are register values: index, then the wrap bit above it."""

    __slots__ = (
        "_base", "_first", "_max_log2", "_positions", "cons", "entry_size", "index_mask", "prod",
    )  # fmt: skip

    def __init__(self, entry_size: int, max_log2: int) -> None:
        self.entry_size = entry_size
        self._max_log2 = max_log2
        self.reset()

    def reset(self) -> None:
        """All registers 0."""
        self.base = QueueBase()
        self.prod = self.cons = 0

    @property
    def base(self) -> QueueBase:
        """Where the queue lies, and its size."""
        return self._base

    @base.setter
    def base(self, base: QueueBase) -> None:
        self._base = base
        # A LOG2SIZE above the maximum behaves as the maximum; the base is aligned to the size (6.3.26).
        log2size = min(base.log2size, self._max_log2)
        self.index_mask = (1 << log2size) - 1
        self._positions = (2 << log2size) - 1  # index and wrap bit together
        self._first = base.addr & -max(32, self.entry_size << log2size)

    @property
    def empty(self) -> bool:
        """Index and wrap bit equal."""
        return not (self.prod ^ self.cons) & self._positions

    @property
    def full(self) -> bool:
        """Index equal, wrap bit not."""
        return (self.prod ^ self.cons) & self._positions == self.index_mask + 1

    @property
    def pending(self) -> int:
        """How many entries are produced and not consumed; never more than fit, whatever software wrote."""
        return min((self.prod - self.cons) & self._positions, self.index_mask + 1)

    def visible(self, position: int) -> int:
        """What a register shows of a position that the SMMU owns: the bits above the wrap bit read as 0 (6.3.28)."""
        return position & (self._positions | ~_POSITION)

    def address(self, position: int) -> int:
        """Where the entry of `position` lies."""
        return self._first | (position & self.index_mask) * self.entry_size

    def after(self, position: int) -> int:
        """The position behind `position`; bits above the wrap bit stay."""
        return position & ~self._positions | (position + 1) & self._positions
