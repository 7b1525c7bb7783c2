"""Makes a case that shows something as small as it gets: fewer steps, fewer words, fewer bits."""

from collections.abc import Callable
from dataclasses import replace

from viommu.differential.cases import Access, Case, Commands, Store


def shrink(case: Case, shows: Callable[[Case], bool]) -> Case:
    """The smallest case found for which `shows` holds, as it must for `case`.

    Every single step, word and set bit that is left is needed.
    """
    while True:
        smaller = _fewer_steps(case, shows)
        smaller = _fewer_words(smaller, shows)
        smaller = _fewer_bits(smaller, shows)
        if smaller == case:
            return case
        case = smaller


def _fewer_steps(case: Case, shows: Callable[[Case], bool]) -> Case:
    size = max(1, len(case.steps) // 2)
    while size:
        first = 0
        while first < len(case.steps):
            candidate = replace(case, steps=case.steps[:first] + case.steps[first + size :])
            if shows(candidate):
                case = candidate
            else:
                first += size
        size //= 2
    return case


def _fewer_words(case: Case, shows: Callable[[Case], bool]) -> Case:
    # In order of address: what lies together belongs together.
    addresses = sorted(case.image)
    size = max(1, len(addresses) // 2)
    while size:
        first = 0
        while first < len(addresses):
            rest = addresses[:first] + addresses[first + size :]
            candidate = replace(case, image={address: case.image[address] for address in rest})
            if shows(candidate):
                case, addresses = candidate, rest
            else:
                first += size
        size //= 2
    return case


def _fewer_bits(case: Case, shows: Callable[[Case], bool]) -> Case:
    for address in list(case.image):
        for bit in _bits(case.image[address]):
            candidate = case.with_word(address, case.image[address] & ~bit)
            if shows(candidate):
                case = candidate
    for name in ("strtab_base", "strtab_base_cfg", "cr2"):
        for bit in _bits(getattr(case, name)):
            candidate = replace(case, **{name: getattr(case, name) & ~bit})
            # From 2-level to linear is no smaller, and QEMU has to restart for it.
            if candidate.two_level == case.two_level and shows(candidate):
                case = candidate
    for place in range(len(case.steps)):
        case = _simpler_step(case, place, shows)
    return case


def _simpler_step(case: Case, place: int, shows: Callable[[Case], bool]) -> Case:
    step = case.steps[place]
    if isinstance(step, Commands):
        return case  # half an invalidation proves nothing
    name = "iova" if isinstance(step, Access) else "value"
    for bit in _bits(getattr(step, name)):
        now = case.steps[place]
        candidate = _with_step(case, place, replace(now, **{name: getattr(now, name) & ~bit}))
        if shows(candidate):
            case = candidate
    return case


def _with_step(case: Case, place: int, step: Access | Store | Commands) -> Case:
    return replace(case, steps=(*case.steps[:place], step, *case.steps[place + 1 :]))


def _bits(word: int) -> list[int]:
    return [1 << place for place in range(word.bit_length()) if word >> place & 1]
