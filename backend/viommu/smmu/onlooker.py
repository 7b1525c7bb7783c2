"""Guest memory as one who looks on reads it: walks go as ever, and leave no trace there."""

from typing import NamedTuple

from viommu.memory import BusError, GuestMemory


class Loaded(NamedTuple):
    """What was read at a physical address: 8 bytes of a descriptor, or a whole structure."""

    address: int
    content: int | bytes


class Onlooker(GuestMemory):
    """Guest memory of which every load is on record, and to which nothing is stored."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__()
        self._memory = memory
        self.loads: list[Loaded] = []

    def view(self, address: int, size: int) -> memoryview:
        return self._memory.view(address, size)

    def read(self, address: int, size: int) -> bytes:
        content = self._memory.read(address, size)
        self.loads.append(Loaded(address, content))
        return content

    def load_u64(self, address: int) -> int:
        content = self._memory.load_u64(address)
        self.loads.append(Loaded(address, content))
        return content

    def compare_exchange_u64(self, address: int, expected: int, value: int) -> bool:  # noqa: ARG002
        return True  # the walk goes on as if it had updated the descriptor

    def still_says(self, loads: list[Loaded]) -> bool:
        """Whether memory has not changed since."""
        memory = self._memory
        try:
            return all(
                memory.load_u64(address) == content
                if isinstance(content, int)
                else memory.read(address, len(content)) == content
                for address, content in loads
            )
        except BusError:
            return False
