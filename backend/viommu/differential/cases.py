"""A case: an image of memory, the registers, and steps. Raw numbers only, so that it can be printed and replayed."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self, TypeAlias

from viommu.differential import board


@dataclass(frozen=True, slots=True)
class Access:
    """A DMA of the device with `stream_id`; `iova` is a multiple of 8, the size is the board's."""

    stream_id: int
    write: bool
    iova: int

    def __str__(self) -> str:
        return f"{'write' if self.write else 'read'} {self.iova:#x} by stream {self.stream_id:#x}"


@dataclass(frozen=True, slots=True)
class Store:
    """Software writes a 64-bit word: it changes a table."""

    address: int
    value: int

    def __str__(self) -> str:
        return f"[{self.address:#x}] = {self.value:#x}"


@dataclass(frozen=True, slots=True)
class Commands:
    """Software submits commands, each two 64-bit words, and a CMD_SYNC after them."""

    words: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return "commands " + ", ".join(f"{low:#x}:{high:#x}" for low, high in self.words)


Step: TypeAlias = Access | Store | Commands
_STEPS: Mapping[str, type[Access] | type[Store] | type[Commands]] = {
    kind.__name__: kind for kind in (Access, Store, Commands)
}


@dataclass(frozen=True)
class Case:
    """`image` maps addresses, multiples of 8, to 64-bit words; the rest of RAM holds its own addresses."""

    strtab_base: int
    strtab_base_cfg: int
    cr2: int = 0
    image: Mapping[int, int] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    @property
    def two_level(self) -> bool:
        """STRTAB_BASE_CFG.FMT says 2-level (6.3.25)."""
        return self.strtab_base_cfg >> 16 & 3 == 1

    @property
    def accesses(self) -> list[Access]:
        """The accesses among the steps, in order."""
        return [step for step in self.steps if isinstance(step, Access)]

    @property
    def touched(self) -> set[int]:
        """Every address that the case sets a word of."""
        return {*self.image, *(s.address for s in self.steps if isinstance(s, Store))}

    def commands(self) -> list[tuple[int, int]]:
        """Everything that goes through the command queue, in order."""
        words = [board.CFGI_ALL, board.TLBI_NSNH_ALL, board.SYNC]
        for step in self.steps:
            if isinstance(step, Commands):
                words += [*step.words, board.SYNC]
        return words

    def with_word(self, address: int, value: int) -> Self:
        """The case with another word in its image."""
        return replace(self, image={**self.image, address: value})

    def to_json(self) -> str:
        """One line that `from_json` takes."""
        return json.dumps(
            {
                "strtab_base": self.strtab_base,
                "strtab_base_cfg": self.strtab_base_cfg,
                "cr2": self.cr2,
                "image": {hex(address): hex(word) for address, word in self.image.items()},
                "steps": [{"kind": type(step).__name__, **asdict(step)} for step in self.steps],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The case that `to_json` wrote."""
        content: dict[str, Any] = json.loads(text)
        steps = []
        for step in content["steps"]:
            kind = _STEPS[step.pop("kind")]
            if kind is Commands:
                step["words"] = tuple((low, high) for low, high in step["words"])
            steps.append(kind(**step))
        image = {int(address, 16): int(word, 16) for address, word in content["image"].items()}
        return cls(**{**content, "image": image, "steps": tuple(steps)})

    def __str__(self) -> str:
        lines = [
            f"STRTAB_BASE={self.strtab_base:#x} STRTAB_BASE_CFG={self.strtab_base_cfg:#x}"
            f" CR2={self.cr2:#x}"
        ]
        lines += [f"  [{address:#x}] = {word:#x}" for address, word in sorted(self.image.items())]
        lines += [f"  {number}. {step}" for number, step in enumerate(self.steps)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one access: the physical address that it reached, None when it was refused, and the records."""

    reached: int | None
    events: tuple[int, ...] = ()

    def __str__(self) -> str:
        words = [
            f"event {event & 0xFF:#04x} "
            + ":".join(f"{event >> shift & (1 << 64) - 1:x}" for shift in range(0, 256, 64))
            for event in self.events
        ]
        where = "refused" if self.reached is None else f"reached {self.reached:#x}"
        return ", ".join([where, *words])


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one side did with a case: an outcome for each access, and the command queue's end: CONS and GERROR."""

    outcomes: tuple[Outcome, ...]
    consumed: int
    gerror: int
