"""One access that came out differently, as known differences look at it."""

from dataclasses import dataclass

from viommu.differential.cases import Outcome
from viommu.differential.circumstances import Circumstances

C_BAD_STREAMID, F_STE_FETCH, C_BAD_STE, F_CD_FETCH, C_BAD_CD = 0x02, 0x03, 0x04, 0x09, 0x0A
F_WALK_EABT, F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION = 0x0B, 0x10, 0x11, 0x12, 0x13
_RULED = range(F_TRANSLATION, F_PERMISSION + 1)  # events that CD.R and STE.S2R rule


@dataclass(frozen=True)
class Sight:
    """What the access met, what the architecture wants, and what QEMU did."""

    met: Circumstances
    ours: Outcome
    theirs: Outcome

    @property
    def our_event(self) -> int | None:
        return self.ours.events[0] & 0xFF if self.ours.events else None

    @property
    def their_event(self) -> int | None:
        return self.theirs.events[0] & 0xFF if self.theirs.events else None

    @property
    def both_refused(self) -> bool:
        return self.ours.reached is None and self.theirs.reached is None

    def we_say(self, *events: int, stage: int = 1) -> bool:
        """We refused with one of these, or silently where `stage` does not record."""
        return self._says(self.ours, events, stage)

    def they_say(self, *events: int, stage: int = 1) -> bool:
        """QEMU refused with one of these, or silently where `stage` does not record."""
        return self._says(self.theirs, events, stage)

    def _says(self, outcome: Outcome, events: tuple[int, ...], stage: int) -> bool:
        if outcome.reached is not None:
            return False
        if not outcome.events:
            return not self.met.records(stage) and any(event in _RULED for event in events)
        (record,) = outcome.events
        is_stage_2 = bool(record >> 103 & 1)
        of_walk = record & 0xFF in (F_WALK_EABT, *_RULED)
        return record & 0xFF in events and (is_stage_2 == (stage == 2) or not of_walk)
