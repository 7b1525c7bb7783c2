"""A client of the test engine: starts commands in its frames and reads how they end."""

from time import monotonic, sleep
from typing import NamedTuple

from pci import Function

from viommu.layouts.bitfields import Bits
from viommu.layouts.test_engine import (
    NO_SUBSTREAM_ID,
    EngineCommand,
    PrivilegedFrame,
    UserFrame,
    offset_of,
    privileged_frame,
    user_frame,
)

IDS = (0x13B5, 0xFF80)
MEMCPY, RAND48, SUM64 = EngineCommand.MEMCPY, EngineCommand.RAND48, EngineCommand.SUM64
_ENDED = (EngineCommand.HALTED, EngineCommand.ERROR, EngineCommand.FRAME_MISCONFIGURED)


class Outcome(NamedTuple):
    """How a command ended. `sum` and `error_address` are udata1 and udata2 as they are then."""

    status: str
    launched: int
    returned: int
    sum: int
    error_address: int


class Frame:
    """One frame of an engine. Sizes and addresses are in bytes."""

    def __init__(self, bar: memoryview, index: int) -> None:
        self._dwords, self._qwords = bar.cast("I"), bar.cast("Q")
        self._user, self._privileged = user_frame(index), privileged_frame(index)

    def start(
        self,
        command: EngineCommand,
        begin: int,
        size: int,
        *,
        destination: int = 0,
        seed: int = 0,
        rate: int = 0,
        privileged: bool = False,
        instruction: bool = False,
        substream_id: int | None = None,
        interrupt: bool = False,
        ats: bool = False,
        pri: bool = False,
    ) -> None:
        """Start `command` over `size` bytes from IOVA `begin`. `rate` limits a transaction to `rate` × 64 bytes.

        With `ats` the transactions go out Translated, where ATS is enabled in the function; with `pri` it asks for
        pages that are missing.
        """
        user = UserFrame(
            source_privileged=privileged,
            destination_privileged=privileged,
            source_instruction=instruction,
            destination_instruction=instruction,
            seed=seed,
            rate=rate,
        )
        dwords = user.qwords()[4]
        self._put32(UserFrame.source_memory_type, dwords & 0xFFFF_FFFF)
        self._put32(UserFrame.seed, seed)
        self._put32(UserFrame.msi_aborted, rate << 16)
        self._put64(UserFrame.msiaddress, int(interrupt))
        self._put32(UserFrame.msidata, 0)
        self._put64(UserFrame.begin, begin)
        self._put64(UserFrame.end_incl, begin + size - 1)
        self._put64(UserFrame.stride, 1)
        self._put64(UserFrame.udata0, destination)
        self._put64(UserFrame.udata1, 0)
        self._put64(UserFrame.udata2, 0)
        place = self._privileged + offset_of(PrivilegedFrame.substreamid)
        self._dwords[place >> 2] = NO_SUBSTREAM_ID if substream_id is None else substream_id
        self._dwords[self._privileged >> 2] = PrivilegedFrame(
            ats_enable=ats, pri_enable=pri
        ).qwords()[0]
        self._put32(UserFrame.cmd, command)

    @property
    def status(self) -> int:
        """Its `cmd` register: the command while it runs, then how it ended."""
        return self._dwords[self._user >> 2]

    @property
    def running(self) -> bool:
        """Whether the command has not ended."""
        return self.status not in _ENDED

    @property
    def returned(self) -> int:
        """Transactions that are over, since the engine was reset."""
        return self._get32(UserFrame.count_of_transactions_returned)

    @property
    def launched(self) -> int:
        """Transactions begun, since the engine was reset."""
        return self._get32(UserFrame.count_of_transactions_launched)

    def wait(self, timeout: float = 30.0) -> Outcome:
        """Wait for the command's end; `TimeoutError` when it does not come."""
        deadline = monotonic() + timeout
        while self.running:
            if monotonic() > deadline:
                raise TimeoutError(f"the engine runs on: {self.returned} transactions returned")
            sleep(0.001)
        return Outcome(
            EngineCommand(self._dwords[self._user >> 2]).name,
            self.launched,
            self.returned,
            self._qwords[self._user + offset_of(UserFrame.udata1) >> 3],
            self._qwords[self._user + offset_of(UserFrame.udata2) >> 3],
        )

    def _put32(self, field: Bits[int] | Bits[bool] | Bits[EngineCommand], value: int) -> None:
        self._dwords[self._user + offset_of(field) >> 2] = value

    def _put64(self, field: Bits[int], value: int) -> None:
        self._qwords[self._user + offset_of(field) >> 3] = value

    def _get32(self, field: Bits[int]) -> int:
        return self._dwords[self._user + offset_of(field) >> 2]


class Engine:
    """A test engine, ready for DMA."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.stream_id = function.stream_id
        function.enable()
        function.set_bus_master(True)
        self._bar = function.map_bar()

    def frame(self, index: int = 0) -> Frame:
        """Frame `index`, of 64."""
        return Frame(self._bar, index)


def page_pattern(seed: int, address: int) -> bytes:
    """What RAND48 writes to the page at IOVA `address`, byte by byte as its description says."""
    state = ((seed ^ address >> 32 ^ address) & 0xFFFF_FFFF) << 16 | 0x330E
    content = bytearray(4096)
    for place in range(4096):
        state = state * 0x5DEE_CE66D + 0xB & 0xFFFF_FFFF_FFFF
        content[place] = state >> 17 & 0xFF
        state = state * 0x5DEE_CE66D + 0xB & 0xFFFF_FFFF_FFFF
    return bytes(content)


def sum64(view: memoryview) -> int:
    """The sum of `view`, whole 4 KiB pages, as 64-bit words modulo 2^64."""
    # A page is one integer of 512 lanes; what lies in the lower halves has 32 bits of room for carries.
    lower = int.from_bytes(b"\xff\xff\xff\xff\0\0\0\0" * 512, "little")
    low = high = 0
    for offset in range(0, len(view), 4096):
        page = int.from_bytes(view[offset : offset + 4096], "little")
        low += page & lower
        high += page >> 32 & lower
    lanes = [sum(memoryview(part.to_bytes(4096, "little")).cast("Q")) for part in (low, high)]
    return lanes[0] + (lanes[1] << 32) & 0xFFFF_FFFF_FFFF_FFFF
