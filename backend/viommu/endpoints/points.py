"""Where a meddler can interfere with a function: its DMA on its way through the stack, and what the bus does to it.

Each says in its docstring what each verdict does there. `value` is what `Replace` replaces.
"""

from dataclasses import dataclass
from typing import ClassVar

from viommu.trace import Again, Defer, Point, Refuse, Replace, Skip, Verdict, Wait

_Verdicts = frozenset[type[Verdict]]


@dataclass(frozen=True, slots=True)
class _OfDma(Point):
    """What the points of a DMA have in common; `size` in bytes."""

    stream_id: int
    substream_id: int | None
    iova: int
    size: int
    write: bool


@dataclass(frozen=True, slots=True)
class DmaRequested(_OfDma):
    """A function begins a DMA. Refuse: it sees an abort, and the SMMU sees nothing. Wait: it begins later.

    Replace: the SMMU is asked for another address.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Refuse, Replace, Wait})

    @property
    def value(self) -> int:
        """The address."""
        return self.iova


@dataclass(frozen=True, slots=True)
class BusMasterOff(_OfDma):
    """A DMA is about to be refused, because Bus Master is off. Skip: it goes out all the same."""

    verdicts: ClassVar[_Verdicts] = frozenset({Skip})


@dataclass(frozen=True, slots=True)
class DmaTranslated(_OfDma):
    """A DMA was translated, and begins at the physical address `value`. Refuse: it sees an abort.

    Replace: its first range is elsewhere. Wait: it stays in flight, and its bytes move later.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Refuse, Replace, Wait})

    value: int


@dataclass(frozen=True, slots=True)
class DmaWriting(_OfDma):
    """The bytes `value` are about to reach memory. Skip: they do not. Replace: others do, and no more than there are.

    Again: they are written more than once. Defer: they land later, when for the function and the SMMU it is over.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Skip, Replace, Again, Defer})

    value: bytes


@dataclass(frozen=True, slots=True)
class DmaRead(_OfDma):
    """The bytes `value` were read. Skip: the function gets zeros. Replace: others; what is missing is zeros."""

    verdicts: ClassVar[_Verdicts] = frozenset({Skip, Replace})

    value: bytes


@dataclass(frozen=True, slots=True)
class DmaCompleting(_OfDma):
    """The bytes have moved. Wait: the function hears of it later, or never; until then it is in flight."""

    verdicts: ClassVar[_Verdicts] = frozenset({Wait})


@dataclass(frozen=True, slots=True)
class MmioAccess(Point):
    """The guest reads `value` from a BAR, or writes it. Replace: another value. Skip: all ones, or no write.

    `register` is the name of a register of the SMMU, else the offset.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Replace, Skip})

    function: str
    register: str
    write: bool
    size: int
    value: int

    @property
    def value_bits(self) -> int:
        """As many as are accessed."""
        return 8 * self.size


@dataclass(frozen=True, slots=True)
class ConfigAccess(Point):
    """The guest reads `value` at `offset` of config space, or writes it. Replace: another value.

    Skip: all ones, or no write.
    """

    verdicts: ClassVar[_Verdicts] = frozenset({Replace, Skip})

    function: str
    offset: int
    write: bool
    size: int
    value: int

    @property
    def value_bits(self) -> int:
        """As many as are accessed."""
        return 8 * self.size


@dataclass(frozen=True, slots=True)
class FunctionResetting(Point):
    """The guest resets the function. Skip: only its config space is; what it does it goes on doing."""

    verdicts: ClassVar[_Verdicts] = frozenset({Skip})

    function: str
    reset: str


@dataclass(frozen=True, slots=True)
class FunctionInterrupts(Point):
    """A function sends an interrupt. Skip: it is lost. Again: there are more. Defer: it is late."""

    verdicts: ClassVar[_Verdicts] = frozenset({Skip, Again, Defer})

    function: str
    vector: int


POINTS: tuple[type[Point], ...] = (
    DmaRequested,
    BusMasterOff,
    DmaTranslated,
    DmaWriting,
    DmaRead,
    DmaCompleting,
    MmioAccess,
    ConfigAccess,
    FunctionResetting,
    FunctionInterrupts,
)
