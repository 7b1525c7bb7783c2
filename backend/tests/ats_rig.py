"""An SMMU with ATS, and streams of its own for it, on top of the raw rig."""

from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tests import smmu_rig as hw
from tests.smmu_rig import Rig
from viommu.smmu import (
    Access,
    Features,
    HeldTranslation,
    InvalidateRequest,
    PageResponse,
    TransactionAborted,
    TranslationCompletion,
)

EATS_FULL, EATS_SPLIT, EATS_DPT = 1 << 28, 2 << 28, 3 << 28
ATSCHK: Final = 1 << 4
REC_CFG_ATS, RECINVSID = 1 << 3, 1 << 1
ON: Final = hw.SMMUEN | hw.EVENTQEN | hw.CMDQEN
ATS: Final = replace(hw.STAGE_1, ats=True)
BOTH: Final = Features(granules=(12,), caching="normal")
S2_WORD: Final = 9 | 25 << 32 | 1 << 38 | 5 << 48 | 1 << 51 | 1 << 58
"""Third word of an STE: VMID 9, 39 bits from level 1 in 4 KiB pages, 48 out, AArch64, faults recorded."""
S2_RW, S2_RO, S2_MEM = 3 << 6, 1 << 6, 0xF << 2


class Function:
    """What the SMMU sends to a function; it answers when the test says so."""

    def __init__(self) -> None:
        self.requests: list[InvalidateRequest] = []
        self.pending: list[Callable[[], None]] = []
        self.responses: list[PageResponse] = []
        self.at_once = True

    def held(self) -> list[HeldTranslation]:
        return []

    def page_response(self, response: PageResponse) -> None:
        self.responses.append(response)

    def invalidate(self, request: InvalidateRequest, complete: Callable[[], None]) -> None:
        self.requests.append(request)
        if self.at_once:
            complete()
        else:
            self.pending.append(complete)


class AtsRig(Rig):
    """`hw.STREAM` may use ATS, and has a function."""

    def __init__(self, features: Features = ATS, *, eats: int = EATS_FULL, on: int = ON) -> None:
        super().__init__(features)
        self.put(hw.STRTAB + 64 * hw.STREAM + 8, eats)
        self.function = Function()
        self.smmu.connect(hw.STREAM, self.function)
        self.write(hw.CR0, on)
        self.forget()

    def ste(self, *words: int, stream: int = hw.STREAM) -> None:
        self.put(hw.STRTAB + 64 * stream, *words)
        self.forget()

    def configure(self, cr2: int) -> None:
        """CR2 is writable only while SMMUEN is 0."""
        cr0 = self.read(hw.CR0)
        self.write(hw.CR0, 0)
        self.write(hw.CR2, cr2)
        self.write(hw.CR0, cr0)

    def ask(
        self, address: int, *, no_write: bool = False, span: int = 1, **access: int | None
    ) -> TranslationCompletion:
        asked = Access(**{"stream_id": hw.STREAM, **access})  # type: ignore[arg-type]
        return self.smmu.ats_translate(asked, address, span, no_write=no_write)

    def pass_through(self, *ranges: int, write: bool = False, stream: int = hw.STREAM) -> list[int]:
        """Where a Translated transaction goes."""
        translation = self.smmu.translated(Access(stream, 5, write, True, True), array("Q", ranges))
        self.smmu.retire(translation)
        return list(translation.runs)

    def barred(self, *ranges: int, write: bool = False, stream: int = hw.STREAM) -> list[bytes]:
        """The records of a Translated transaction that must be aborted."""
        self.events()
        try:
            runs = self.pass_through(*ranges, write=write, stream=stream)
        except TransactionAborted:
            return self.events()
        raise AssertionError(f"{ranges} went through to {runs}")

    def nest(self, eats: int) -> None:
        """Stage 2 below: RAM at itself, and nothing else yet. `map_2` adds to it."""
        self.stage_2 = self.alloc(4096)
        self.put(self.stage_2 + 8 * 2, hw.BASE | S2_RW | S2_MEM | hw.AF | hw.BLOCK)
        self.ste(hw.STE_NESTED | self.cd_address, eats, S2_WORD, self.stage_2)

    def map_2(self, ipa: int, leaf: int, *, level: int = 3) -> int:
        """Returns where the descriptor lies."""
        table = self.stage_2
        for depth in range(1, level):
            entry = table + (ipa >> 39 - 9 * depth & 511) * 8
            if not self.get(entry) & 1:
                self.put(entry, self.alloc(4096) | hw.TABLE)
            table = self.get(entry) & 0xFFFF_FFFF_F000
        entry = table + (ipa >> 39 - 9 * level & 511) * 8
        self.put(entry, leaf)
        return entry
