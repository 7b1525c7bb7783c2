"""The known differences: where QEMU departs from the architecture, each with the rule that recognises it.

A rule is as narrow as it can be made: it names what both sides said and what in memory made QEMU say it. The reasons
are in docs/differences.md, by the same names.
"""

from collections.abc import Callable
from dataclasses import dataclass

from viommu.differential.abilities import Abilities
from viommu.differential.cases import Case, Verdict
from viommu.differential.known_stages import BOTH, STAGE_1, STAGE_2, same_place_before
from viommu.differential.sight import (
    C_BAD_STE,
    C_BAD_STREAMID,
    F_ADDR_SIZE,
    F_CD_FETCH,
    F_PERMISSION,
    F_TRANSLATION,
    Sight,
)

_ADDRESSES = ((1 << 128) - 1) << 128
_RNW, _S2 = 1 << 99, 1 << 103


@dataclass(frozen=True)
class Known:
    """A difference by its name in docs/differences.md."""

    name: str
    applies: Callable[[Sight], bool]
    applies_to: Callable[[Abilities], bool] = lambda _: True
    """Whether it can come up between sides that have these abilities in common."""


# Records. What is left of a record when a known difference is taken away; None where there is none.


def _cd_fetch_address(sight: Sight, theirs: int) -> int | None:
    ours = sight.ours.events[0]
    moved = ours & ~_ADDRESSES | ours >> 192 << 128
    return ours if sight.our_event == F_CD_FETCH and theirs == moved else None


def _offset_in_ipa(_: Sight, theirs: int) -> int | None:
    offset = theirs >> 192 & 0xFFF
    translation = F_TRANSLATION <= theirs & 0xFF <= F_PERMISSION
    return theirs & ~(0xFFF << 192) if translation and theirs & _S2 and offset else None


def _fetch_is_a_read(sight: Sight, theirs: int) -> int | None:
    fetching = theirs & _S2 and theirs >> 104 & 3 != 2  # CLASS is not IN
    return theirs & ~_RNW if fetching and theirs & _RNW and sight.met.access.write else None


def _cached_refusal_without_ipa(sight: Sight, theirs: int) -> int | None:
    ipa = sight.ours.events[0] & ~((1 << 192) - 1)
    nested = sight.met.config == 7 and theirs & 0xFF == F_PERMISSION and theirs & _S2
    return theirs | ipa if nested and not theirs >> 192 and same_place_before(sight.met) else None


KNOWN_OF_RECORDS: dict[str, Callable[[Sight, int], int | None]] = {
    "cd-fetch-address": _cd_fetch_address,
    "offset-in-ipa": _offset_in_ipa,
    "fetch-is-a-read": _fetch_is_a_read,
    "cached-refusal-without-ipa": _cached_refusal_without_ipa,
}
"""What QEMU writes differently into a record that both write."""


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


def _has_stage_1(abilities: Abilities) -> bool:
    return abilities.stage_1


def _has_stage_2(abilities: Abilities) -> bool:
    return abilities.stage_2


def _has_both(abilities: Abilities) -> bool:
    return abilities.stage_1 and abilities.stage_2


KNOWN: tuple[Known, ...] = (
    Known("stream-beyond-span", _beyond_span),
    Known("invalid-stream-recorded", _invalid_stream_recorded),
    Known("substreams-without-any", _substreams_without_any),
    Known("bypass-unbounded", _bypass_unbounded),
    *(Known(name, applies, _has_stage_2) for name, applies in STAGE_2.items()),
    *(Known(name, applies, _has_both) for name, applies in BOTH.items()),
    *(Known(name, applies, _has_stage_1) for name, applies in STAGE_1.items()),
)
"""In the order in which they are tried."""


# The command queue

_IGNORED = (0x18, 0x1A, 0x20, 0x21, 0x22, 0x23, 0x40, 0x41, 0x44, 0x45)
_ILLEGAL = 1 << 24  # CMDQ_CONS.ERR is CERROR_ILL


def _stopped_here_only(ours: Verdict, theirs: Verdict) -> bool:
    """We stopped at an ILLEGAL command, QEMU consumed everything."""
    return bool(ours.consumed & 0x7F << 24 == _ILLEGAL and ours.gerror & 1 and not theirs.gerror)


def _refused_command(case: Case, ours: Verdict) -> tuple[int, int]:
    commands = case.commands()
    place = ours.consumed & 0xFF
    return commands[place] if place < len(commands) else (0, 0)


def _command_ignored(case: Case, ours: Verdict, theirs: Verdict) -> bool:
    return _stopped_here_only(ours, theirs) and _refused_command(case, ours)[0] & 0xFF in _IGNORED


def _signal_unchecked(case: Case, ours: Verdict, theirs: Verdict) -> bool:
    command, _ = _refused_command(case, ours)
    return _stopped_here_only(ours, theirs) and command & 0xFF == 0x46 and command >> 12 & 3 == 3


def _range_unchecked(case: Case, ours: Verdict, theirs: Verdict) -> bool:
    low, high = _refused_command(case, ours)
    granule, level = high >> 10 & 3, high >> 8 & 3
    says_nothing = not low >> 12 & 0x1F and not low >> 20 & 0x1F
    says_nothing = says_nothing and (not level or (granule, level) == (2, 1))
    by_address = low & 0xFF in (0x12, 0x13, 0x2A)
    return _stopped_here_only(ours, theirs) and by_address and bool(granule) and says_nothing


KNOWN_OF_QUEUE: dict[str, Callable[[Case, Verdict, Verdict], bool]] = {
    "foreign-command-ignored": _command_ignored,
    "reserved-signal-ignored": _signal_unchecked,
    "reserved-range-accepted": _range_unchecked,
}
"""The same for the command queue's end, with the case and both verdicts: ours, then QEMU's."""

QEMU_ENDS = {
    "reserved-size-ends-qemu": "oas2bits",
    "aarch32-stage-2-ends-qemu": "decode_ste_s2_cfg",
}
"""Cases that QEMU does not survive: the name, and a word of the assertion that it fails with."""
