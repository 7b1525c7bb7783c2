"""What a hostile guest has before it: an SMMU over a little memory, watched from all sides."""

import struct
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests import smmu_rig as hw
from viommu.endpoints.port import PORT_CHUNK, DmaAttributes, DmaFault, DmaPort, DmaStalled
from viommu.memory import GuestMemory
from viommu.smmu import (
    Access,
    Features,
    Smmu,
    Stalled,
    TransactionAborted,
    TransactionStalled,
    Translation,
)
from viommu.trace import Event, Tracer

BASE = 0x8000_0000
SIZE = 0x1_0000
ROM, ROM_SIZE = BASE + 0x2_0000, 0x4000
NOWHERE = BASE + 0x3_0000
MARGIN = 0x1000
CANARY = b"\xc5" * MARGIN
MANY = 20_000
"""More fetches than any one call may need: 256 commands, or 512 pages of four levels each."""

PROFILES = {
    "stage 1": hw.STAGE_1,
    "everything": Features(),
    "52 bits, hostile caches": Features(output_address_bits=52, caching="hostile", stall_max=2),
    "stalls, no caches": Features(stall_model="stall", caching="none"),
}
everywhere = pytest.mark.parametrize("features", PROFILES.values(), ids=PROFILES)


class CountedMemory(GuestMemory):
    """Counts what the SMMU fetches: work that is bounded is counted work."""

    def __init__(self) -> None:
        super().__init__()
        self.fetches = 0

    def load_u64(self, address: int) -> int:
        self.fetches += 1
        return super().load_u64(address)

    def read(self, address: int, size: int) -> bytes:
        self.fetches += 1
        return super().read(address, size)

    def compare_exchange_u64(self, address: int, expected: int, value: int) -> bool:
        self.fetches += 1
        return super().compare_exchange_u64(address, expected, value)


class Prey:
    """An SMMU and a port over 64 KiB of RAM between canaries, a ROM, and a range without memory behind it."""

    def __init__(self, features: Features | None = None, *, traced: bool = False) -> None:
        self.host = bytearray(CANARY + bytes(SIZE) + CANARY + bytes(range(256)) * 64 + CANARY)
        self.rest = bytes(self.host[MARGIN + SIZE :])
        view = memoryview(self.host)
        self.ram = view[MARGIN : MARGIN + SIZE]
        self.memory = CountedMemory()
        self.memory.add_region(BASE, SIZE, self.ram)
        rom = MARGIN + SIZE + MARGIN
        self.memory.add_region(ROM, ROM_SIZE, view[rom : rom + ROM_SIZE], writable=False)
        self.memory.add_region(NOWHERE, 0x1000, None)
        tracer = Tracer()
        if traced:
            tracer.subscribe(self._read_along)
        self.smmu = Smmu(self.memory, features, tracer)
        self.port = DmaPort(self.memory, 0x10, self.smmu, tracer)
        self.port.bus_master = True
        self.held: list[Translation] = []
        self.stalled: list[Stalled] = []

    @staticmethod
    def _read_along(event: Event) -> None:
        event.as_dict()

    def poke(self, address: int, *words: int) -> None:
        """Write into RAM, as the guest does: at any aligned place of it."""
        for index, word in enumerate(words):
            offset = (address + 8 * index) % SIZE & ~7
            struct.pack_into("<Q", self.ram, offset, word & 2**64 - 1)

    def check(self) -> None:
        """What must hold after every call."""
        assert self.memory.fetches < MANY
        self.memory.fetches = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.smmu.write(offset, size, value)
        self.check()

    def read(self, offset: int, size: int) -> None:
        assert 0 <= self.smmu.read(offset, size) < 1 << 8 * max(size, 1)
        self.check()

    def step(self) -> None:
        self.smmu.step()
        self.check()

    def translate(self, access: Access, address: int, size: int, *, hold: bool) -> None:
        try:
            translation = self.smmu.translate(access, address, size)
        except TransactionAborted:
            self.check()
            return
        except TransactionStalled as held:
            self.check()
            self.stall(held.stalled)
            return
        self.check()
        assert 0 < translation.size <= min(size, 1 << 21)
        assert sum(translation.runs[1::2]) == translation.size
        limit = 1 << self.smmu.features.output_address_bits
        assert all(
            start + length <= limit
            for start, length in zip(translation.runs[::2], translation.runs[1::2], strict=True)
        )
        if hold:
            self.held.append(translation)
        else:
            self.smmu.retire(translation)

    def stall(self, stalled: Stalled) -> None:
        assert self.smmu.features.stalls
        assert stalled.resolution is None
        assert len(self.smmu.stalls) <= self.smmu.features.stall_max
        self.stalled.append(stalled)

    def dma(self, address: int, size: int, substream: int | None, flags: int) -> None:
        with suppress(DmaFault, DmaStalled):
            attributes = DmaAttributes(bool(flags & 2), bool(flags & 4))
            write = bool(flags & 1)
            with self.port.begin(
                address, size, write=write, substream_id=substream, attributes=attributes
            ) as transfer:
                assert 0 < transfer.size <= min(size, PORT_CHUNK)
                if write:
                    transfer.write_from(bytes(transfer.size))
                else:
                    transfer.read_into(bytearray(transfer.size))
        self.check()

    def end_stalls(self) -> None:
        """Everyone who waits is told something when the SMMU is disabled."""
        self.write(hw.CR0, 4, 1)
        self.write(hw.CR0, 4, 0)
        assert len(self.smmu.stalls) == 0
        assert all(stalled.resolution for stalled in self.stalled)

    def retire(self, index: int) -> None:
        if self.held:
            self.smmu.retire(self.held.pop(index % len(self.held)))
            self.check()

    def finish(self) -> None:
        """Everything ends: what is in flight, what waits for it, and the queue, which is empty or stopped."""
        while self.held:
            self.retire(0)
        assert len(self.smmu.in_flight) == 0
        for _ in range(10_000):
            if not self.smmu.busy:
                break
            self.step()
        assert not self.smmu.busy
        self.end_stalls()
        cr0, ack = self.smmu.read(hw.CR0, 4), self.smmu.read(hw.CR0ACK, 4)
        assert cr0 == ack
        assert not self.smmu.read(hw.GBPA, 4) & 1 << 31
        assert self.host[:MARGIN] == CANARY
        assert self.host[MARGIN + SIZE :] == self.rest


# What hostile values are made of: pointers into, beside and beyond memory, alone or with bits set.

edges = [BASE, BASE + SIZE - 8, BASE + SIZE, BASE - 8, ROM, ROM + ROM_SIZE - 8, NOWHERE, 0]
edges += [1 << 32, 1 << 48, (1 << 48) - 8, (1 << 52) - 0x1000, (1 << 52) - 1, (1 << 64) - 8]
pointers = st.one_of(
    st.sampled_from(edges),
    st.integers(0, SIZE // 64 - 1).map(lambda n: BASE + 64 * n),
    st.integers(0, SIZE // 4096 - 1).map(lambda n: BASE + 4096 * n),
)
qwords = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.builds(
        lambda pointer, low, high: pointer | low | high << 52, pointers, st.integers(0, 4095), st.integers(0, 4095)
    ),
    st.integers(0, 63).map(lambda n: 1 << n),
)  # fmt: skip
addresses = st.one_of(pointers, st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 30))
substreams = st.one_of(st.none(), st.integers(0, 3), st.integers(0, (1 << 20) - 1))
sizes = st.one_of(st.integers(1, 0x3000), st.sampled_from([1 << 21, 1 << 40, (1 << 64) - 1]))

quick = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plain(prey: Prey) -> None:
    """Registers that make sense, so that what is hostile lies behind them."""
    prey.write(hw.STRTAB_BASE, 8, BASE)
    prey.write(hw.STRTAB_BASE_CFG, 4, 8)
    prey.write(hw.CR2, 4, 2)
    prey.write(hw.CMDQ_BASE, 8, BASE + 0x8000 | 4)
    prey.write(hw.EVENTQ_BASE, 8, BASE + 0x9000 | 3)
    prey.write(hw.CR0, 4, 0xD)


def probe(prey: Prey, address: int, substream: int | None) -> None:
    for flags in range(8):
        prey.dma(address, 0x2000, substream, flags)
    prey.finish()
