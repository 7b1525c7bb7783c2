"""Changing a structure of several words that the SMMU may be reading (IHI 0070, 3.21.3)."""

from collections.abc import Callable

from viommu.layouts.bitfields import Layout


def field_mask(layout: type[Layout], *names: str) -> int:
    """The bits of the named fields, in place."""
    return sum(layout.fields[name].mask << layout.fields[name].low for name in names)


def change_entry(
    words: memoryview,
    target: Layout,
    used: Callable[[int], int],
    invalidate: Callable[[], None],
) -> None:
    """Turn the structure at `words` (64-bit items) into `target`, in steps that are each safe to be seen by the SMMU.

    The SMMU reads a structure word by word, at any time, and may keep what it read until it is told. So no step may
    change more than one word that counts. `used(value)` gives the bits that count when the structure is `value`.
    Words whose bits do not count yet are prepared first; then the one critical word makes the change; then what no
    longer counts is cleared. Where several words are critical, the structure is invalid for a while.
    After each step that changed anything, `invalidate` makes the SMMU forget what it read (CFGI and CMD_SYNC).
    """
    old, new = list(words), target.qwords()
    counts_now = _qwords(used(_joined(old)), len(old))
    counts_then = _qwords(used(target.value), len(old))
    prepared = [o & c | n & ~c for o, n, c in zip(old, new, counts_now, strict=True)]
    critical = [
        place
        for place, (p, n, c) in enumerate(zip(prepared, new, counts_then, strict=True))
        if (p ^ n) & c
    ]
    steps: list[list[int]] = []
    if len(critical) == 1:
        # A word that is critical cannot be prepared in halves: it changes once, whole.
        (place,) = critical
        steps.append([*prepared[:place], old[place], *prepared[place + 1 :]])
        steps.append([*prepared[:place], new[place], *prepared[place + 1 :]])
    elif critical:
        # V is in the first word of every such structure.
        steps.append([0, *old[1:]])
        steps.append([0, *new[1:]])
    for step in (*steps, new):
        changed = [place for place, word in enumerate(step) if words[place] != word]
        for place in changed:
            words[place] = step[place]
        if changed:
            invalidate()


def _joined(words: list[int]) -> int:
    return sum(word << 64 * place for place, word in enumerate(words))


def _qwords(value: int, count: int) -> list[int]:
    return [value >> 64 * place & 0xFFFF_FFFF_FFFF_FFFF for place in range(count)]
