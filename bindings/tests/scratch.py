"""The simplest device: memory."""


class Scratch:
    """Registers that keep what is written; `fault`, if set, is raised by each access instead."""

    def __init__(self, size: int) -> None:
        self.memory = bytearray(size)
        self.accesses: list[tuple[str, int, int]] = []
        self.fault: BaseException | None = None

    def read(self, offset: int, length: int) -> bytes:
        self._access("read", offset, length)
        return bytes(self.memory[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self._access("write", offset, len(data))
        self.memory[offset : offset + len(data)] = data

    def _access(self, verb: str, offset: int, length: int) -> None:
        self.accesses.append((verb, offset, length))
        if self.fault is not None:
            raise self.fault
