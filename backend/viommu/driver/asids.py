"""Address space identifiers, which the TLB tells domains apart by."""

from viommu.driver.errors import UnsupportedSmmu


class Asids:
    """Gives out ASIDs of `bits` from 1 up, those first that came back."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._next = 1
        self._taken: set[int] = set()
        self._back: list[int] = []

    def take(self) -> int:
        """An ASID that nobody has; `UnsupportedSmmu` when there is none."""
        if self._back:
            asid = self._back.pop()
        else:
            asid, self._next = self._next, self._next + 1
        if asid >> self._bits:
            raise UnsupportedSmmu(f"ASID {asid}: there are {self._bits} bits")
        self._taken.add(asid)
        return asid

    def give_back(self, asid: int) -> None:
        """Nobody has it any more, nor the TLB. One that was never taken is its user's own."""
        if asid in self._taken:
            self._taken.remove(asid)
            self._back.append(asid)
