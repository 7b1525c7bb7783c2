"""The known differences of translation: rules by the names that docs/differences.md explains."""

from collections.abc import Callable

from viommu.differential.cases import Access, Commands, Store
from viommu.differential.circumstances import Circumstances
from viommu.differential.sight import (
    C_BAD_STE,
    F_ACCESS,
    F_ADDR_SIZE,
    F_PERMISSION,
    F_TRANSLATION,
    F_WALK_EABT,
    Sight,
)

_TLBI_NH_VA, _TLBI_NH_VAA = 0x12, 0x13
_WALK = (F_WALK_EABT, F_TRANSLATION, F_ADDR_SIZE, F_ACCESS, F_PERMISSION)

# Stage 1


def _top_byte_1(sight: Sight) -> bool:
    met = sight.met
    return (
        met.high
        and met.tbi(True) != met.tbi(False)
        and (sight.we_say(F_TRANSLATION) or sight.they_say(F_TRANSLATION))
    )


def _privilege(sight: Sight) -> bool:
    met = sight.met
    if not sight.we_say(F_PERMISSION) or met.leaf is None:
        return False
    no_user = not met.leaf.word & 1 << 6 or any(table.word & 1 << 61 for table in met.tables)
    # It goes through, or on to stage 2.
    on = met.has_stage_2 and sight.they_say(*_WALK, stage=2)
    return no_user and (sight.theirs.reached == met.reached or on)


def _tagged_entry(sight: Sight) -> bool:
    met = sight.met
    # QEMU takes TBI0 for both halves.
    tagged = met.tbi(False) and met.access.iova >> 56 != (0xFF if met.high else 0)
    # It lives on what an access with the same tag left behind.
    return tagged and _invalidated_by_address(met) and same_place_before(met)


def _invalidated_by_address(met: Circumstances) -> bool:
    return any(
        low & 0xFF in (_TLBI_NH_VA, _TLBI_NH_VAA)
        for step in met.before
        if isinstance(step, Commands)
        for low, _ in step.words
    )


def same_place_before(met: Circumstances) -> bool:
    """An access before this one may have left a TLB entry for it."""
    # What one TLB entry covers: the smaller of both stages.
    leaves = [found.shift for found in met.path if not found.is_table] or [12]
    shift = max(leaves)
    return any(
        isinstance(step, Access) and step.iova >> shift == met.access.iova >> shift
        for step in met.before
    )


def _below_read_only_table(met: Circumstances) -> bool:
    return met.access.write and any(table.word & 1 << 62 for table in met.tables)


def _read_only_table_first(sight: Sight) -> bool:
    return _below_read_only_table(sight.met) and sight.both_refused and sight.they_say(F_PERMISSION)


def _read_only_table_forgotten(sight: Sight) -> bool:
    on = sight.met.has_stage_2 and sight.they_say(F_PERMISSION, stage=2)
    return (
        _below_read_only_table(sight.met)
        and sight.we_say(F_PERMISSION)
        and (sight.theirs.reached is not None or on)
    )


def _table_size_unchecked(sight: Sight) -> bool:
    met = sight.met
    return any(
        sight.we_say(F_ADDR_SIZE, stage=stage)
        and any(d.is_table and d.output >> bits for d in met.descriptors(stage))
        for stage, bits in ((1, met.output_bits), (2, met.output_bits_2))
    )


def _leaf_size_last(sight: Sight) -> bool:
    met = sight.met
    return any(
        sight.we_say(F_ADDR_SIZE, stage=stage)
        and any(not d.is_table and d.output >> bits for d in met.descriptors(stage))
        and sight.they_say(F_ACCESS, F_PERMISSION, stage=stage)
        for stage, bits in ((1, met.output_bits), (2, met.output_bits_2))
    )


def _block_too_high(sight: Sight) -> bool:
    return any(
        sight.met.too_high(stage) and sight.we_say(F_TRANSLATION, stage=stage) for stage in (1, 2)
    )


STAGE_1: dict[str, Callable[[Sight], bool]] = {
    "top-byte-of-ttb1": _top_byte_1,
    "everything-privileged": _privilege,
    "tagged-entry-stays": _tagged_entry,
    "read-only-table-first": _read_only_table_first,
    "read-only-table-forgotten": _read_only_table_forgotten,
    "table-address-unchecked": _table_size_unchecked,
    "leaf-address-last": _leaf_size_last,
    "block-too-high": _block_too_high,
}

# Stage 2


def _input_by_output_size(sight: Sight) -> bool:
    met = sight.met
    return (
        met.has_stage_2
        and met.input_bits_2 > met.output_bits_2
        and sight.their_event == C_BAD_STE
        and sight.our_event != C_BAD_STE
    )


def _start_level_too_high(sight: Sight) -> bool:
    met = sight.met
    return met.has_stage_2 and met.start_level_too_high and sight.our_event == C_BAD_STE


def _concatenated(sight: Sight) -> bool:
    """It shows when any look-up of stage 2 begins in another than the first table."""
    return sight.met.beyond_first_table


def _input_beyond(sight: Sight) -> bool:
    met = sight.met
    return (
        met.config == 6
        and sight.our_event == F_ADDR_SIZE
        and not sight.ours.events[0] >> 103 & 1
        and not sight.theirs.events
        and sight.theirs.reached is None
    )


def _fields_of_stage_1(sight: Sight) -> bool:
    """S1STALLD; S1CDMax is another difference."""
    met = sight.met
    stalled = met.ste is not None and bool(met.ste[1] >> 27 & 1)
    return met.config == 6 and stalled and sight.their_event == C_BAD_STE


def _cached_refusal_silent(sight: Sight) -> bool:
    met = sight.met
    return (
        met.config == 6
        and sight.we_say(F_PERMISSION, stage=2)
        and sight.theirs.reached is None
        and not sight.theirs.events
        and same_place_before(met)
    )


STAGE_2: dict[str, Callable[[Sight], bool]] = {
    "stage-2-input-by-output-size": _input_by_output_size,
    "stage-2-start-too-high": _start_level_too_high,
    "stage-1-fields-without-it": _fields_of_stage_1,
    "concatenated-tables-forgotten": _concatenated,
    "stage-2-input-silent": _input_beyond,
    "cached-refusal-silent": _cached_refusal_silent,
}

# Both

_CLASS_TT = 1


def _class(record: int) -> int:
    return record >> 104 & 3


def _table_fetch_of_stage_1(sight: Sight) -> bool:
    """QEMU's record says S2 = 0, and the table's own address as IPA; and CD.R rules it instead of S2R."""
    met = sight.met
    if not (met.config == 7 and sight.both_refused and sight.we_say(*_WALK, stage=2)):
        return False
    if sight.ours.events and _class(sight.ours.events[0]) != _CLASS_TT:
        return False
    if not sight.theirs.events:
        return not met.records(1)
    record = sight.theirs.events[0]
    return record & 0xFF in _WALK and _class(record) == _CLASS_TT and not record >> 103 & 1


def _both_tables(sight: Sight) -> bool:
    met = sight.met
    if met.config != 7 or met.cd is None or sight.theirs.reached is not None:
        return False
    places = [
        met.cd[word] & ((1 << 52) - 1) & ~0xFFF
        for word, disabled in ((1, 14), (2, 30))
        if not met.cd[0] >> disabled & 1
    ]
    if not sight.theirs.events:
        return not met.records(2) and any(met.through_stage_2(place) is None for place in places)
    record = sight.theirs.events[0]
    ipa = record >> 192 & ~0xFFF
    is_table = bool(record >> 103 & 1) and _class(record) == _CLASS_TT
    return record & 0xFF in _WALK and is_table and ipa in places


def _split_leaf_stays(sight: Sight) -> bool:
    """A leaf of stage 1 was cached in the pieces that stage 2 has, and invalidated by one address."""
    met = sight.met
    was_larger = any(
        isinstance(step, Store) and step.address == found.entry and found.shift > 12
        for step in met.before
        for found in met.descriptors(1)
    )
    return (
        met.config == 7 and was_larger and _invalidated_by_address(met) and same_place_before(met)
    )


def _read_permission_forgotten(sight: Sight) -> bool:
    met = sight.met
    last = met.path[-1] if met.path else None
    return (
        met.config == 7
        and not met.access.write
        and sight.we_say(F_PERMISSION, stage=2)
        and last is not None
        and not last.word & 1 << 6
        and sight.theirs.reached == met.reached
        and same_place_before(met)
    )


BOTH: dict[str, Callable[[Sight], bool]] = {
    "table-fetch-of-stage-1": _table_fetch_of_stage_1,
    "both-tables-translated": _both_tables,
    "split-leaf-stays": _split_leaf_stays,
    "stage-2-reading-forgotten": _read_permission_forgotten,
}
