"""The known differences: where QEMU departs from the architecture, each with the rule that recognises it.

A rule is as narrow as it can be made: it names what both sides said and what in memory made QEMU say it. The reasons
are in docs/differences.md, by the same names.
"""

from collections.abc import Callable
from dataclasses import dataclass

from viommu.differential.abilities import Abilities
from viommu.differential.cases import Access, Commands, Outcome
from viommu.differential.circumstances import Circumstances

C_BAD_STREAMID, F_STE_FETCH, C_BAD_STE, F_CD_FETCH, C_BAD_CD = 0x02, 0x03, 0x04, 0x09, 0x0A
F_WALK_EABT, F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION = 0x0B, 0x10, 0x11, 0x12, 0x13
_TLBI_NH_VA, _TLBI_NH_VAA = 0x12, 0x13
_ADDRESSES = ((1 << 128) - 1) << 128


@dataclass(frozen=True)
class Sight:
    """One access that came out differently: what it met, what the architecture wants, and what QEMU did."""

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


@dataclass(frozen=True)
class Known:
    """A difference by its name in docs/differences.md."""

    name: str
    applies: Callable[[Sight], bool]
    applies_to: Callable[[Abilities], bool] = lambda _: True
    """Whether it can come up between sides that have these abilities in common."""


# Streams


def _beyond_span(sight: Sight) -> bool:
    met = sight.met
    return (
        met.span is not None
        and met.span != 0
        and (bool(met.index >> (met.span - 1)) or met.span > met.split + 1)
        and sight.ours.reached is None
        and sight.our_event in (C_BAD_STREAMID, None)
    )


def _invalid_stream_recorded(sight: Sight) -> bool:
    return (
        not sight.met.case.cr2 & 1 << 1
        and sight.both_refused
        and sight.our_event is None
        and sight.their_event == C_BAD_STREAMID
    )


def _substreams_without_any(sight: Sight) -> bool:
    met = sight.met
    if met.ste is None or met.config <= 4:
        return False
    return bool(met.ste[0] >> 59) and sight.their_event == C_BAD_STE  # S1CDMax


def _bypass_unbounded(sight: Sight) -> bool:
    return (
        sight.met.config == 4
        and sight.our_event == F_ADDR_SIZE
        and sight.theirs.reached == sight.met.access.iova
    )


# Context descriptors


def _cd_fetch_address(sight: Sight) -> bool:
    if not (sight.both_refused and sight.our_event == sight.their_event == F_CD_FETCH):
        return False
    (ours,), (theirs,) = sight.ours.events, sight.theirs.events
    moved = ours & ~_ADDRESSES | ours >> 192 << 128
    return theirs == moved


# Stage 1


def _says(sight: Sight, outcome: Outcome, event: int) -> bool:
    """It was refused with `event` of stage 1, or silently where the CD says so."""
    met = sight.met
    if outcome.reached is not None:
        return False
    if not outcome.events:
        return met.cd is not None and not met.cd[0] >> 45 & 1  # CD.R
    return outcome.events[0] & 0xFF == event


def _top_byte_1(sight: Sight) -> bool:
    met = sight.met
    return (
        met.high
        and met.tbi(True) != met.tbi(False)
        and (_says(sight, sight.ours, F_TRANSLATION) or _says(sight, sight.theirs, F_TRANSLATION))
    )


def _privilege(sight: Sight) -> bool:
    met = sight.met
    if not _says(sight, sight.ours, F_PERMISSION) or met.leaf is None:
        return False
    no_user = not met.leaf.word & 1 << 6 or any(table.word & 1 << 61 for table in met.tables)
    return no_user and sight.theirs.reached == met.leaf.reached


def _tagged_entry(sight: Sight) -> bool:
    met = sight.met
    # QEMU takes TBI0 for both halves.
    tagged = met.tbi(False) and met.access.iova >> 56 != (0xFF if met.high else 0)
    by_address = any(
        low & 0xFF in (_TLBI_NH_VA, _TLBI_NH_VAA)
        for step in met.before
        if isinstance(step, Commands)
        for low, _ in step.words
    )
    # It lives on what an access with the same tag left behind.
    return tagged and by_address and _same_page_before(met)


def _same_page_before(met: Circumstances) -> bool:
    return any(
        isinstance(step, Access) and step.iova >> 12 == met.access.iova >> 12 for step in met.before
    )


def _read_only_table_first(sight: Sight) -> bool:
    return (
        sight.met.access.write
        and any(table.word & 1 << 62 for table in sight.met.tables)
        and sight.both_refused
        and _says(sight, sight.theirs, F_PERMISSION)
    )


def _read_only_table_forgotten(sight: Sight) -> bool:
    return (
        sight.met.access.write
        and any(table.word & 1 << 62 for table in sight.met.tables)
        and _says(sight, sight.ours, F_PERMISSION)
        and sight.theirs.reached is not None
    )


def _table_size_unchecked(sight: Sight) -> bool:
    met = sight.met
    return _says(sight, sight.ours, F_ADDR_SIZE) and any(
        table.output >> met.output_bits for table in met.tables
    )


def _leaf_size_last(sight: Sight) -> bool:
    met = sight.met
    return (
        _says(sight, sight.ours, F_ADDR_SIZE)
        and met.leaf is not None
        and bool(met.leaf.output >> met.output_bits)
        and any(_says(sight, sight.theirs, event) for event in (F_ACCESS, F_PERMISSION))
    )


def _block_too_high(sight: Sight) -> bool:
    return sight.met.too_high and _says(sight, sight.ours, F_TRANSLATION)


KNOWN: tuple[Known, ...] = (
    Known("stream-beyond-span", _beyond_span),
    Known("invalid-stream-recorded", _invalid_stream_recorded),
    Known("substreams-without-any", _substreams_without_any),
    Known("bypass-unbounded", _bypass_unbounded),
    Known("cd-fetch-address", _cd_fetch_address),
    Known("top-byte-of-ttb1", _top_byte_1),
    Known("everything-privileged", _privilege),
    Known("tagged-entry-stays", _tagged_entry),
    Known("read-only-table-first", _read_only_table_first),
    Known("read-only-table-forgotten", _read_only_table_forgotten),
    Known("table-address-unchecked", _table_size_unchecked),
    Known("leaf-address-last", _leaf_size_last),
    Known("block-too-high", _block_too_high),
)
"""In the order in which they are tried."""

QEMU_ENDS = {
    "reserved-size-ends-qemu": "oas2bits",
    "aarch32-stage-2-ends-qemu": "decode_ste_s2_cfg",
}
"""Cases that QEMU does not survive: the name, and a word of the assertion that it fails with."""
