"""What the identification registers say (IHI 0070, 6.3.1 to 6.3.6)."""

from viommu.driver.access import Registers
from viommu.driver.errors import UnsupportedSmmu
from viommu.layouts.registers import ADDRESS_SIZES, Idr0, Idr1, Idr3, Idr5, Register

_TTF_AARCH64 = (2, 3)
_TTENDIAN_LITTLE = (0, 2)
_STALL_CHOICE, _STALL_ALWAYS = 0, 2
_ALL_ONES = 0xFFFF_FFFF


class Features:
    """IDR0, 1, 3 and 5, and what follows from them. Widths are in bits, queue sizes log2 of entries."""

    __slots__ = ("idr0", "idr1", "idr3", "idr5")

    def __init__(self, idr0: Idr0, idr1: Idr1, idr3: Idr3, idr5: Idr5) -> None:
        self.idr0, self.idr1, self.idr3, self.idr5 = idr0, idr1, idr3, idr5

    @classmethod
    def read(cls, registers: Registers) -> "Features":
        """Read the registers; `UnsupportedSmmu` when this package cannot drive such an SMMU."""
        raw = [
            registers.read32(register)
            for register in (Register.IDR0, Register.IDR1, Register.IDR3, Register.IDR5)
        ]
        if all(value == _ALL_ONES for value in raw):
            raise UnsupportedSmmu("every identification register reads all ones: nobody is there")
        idr0 = Idr0(raw[0])
        features = cls(idr0, Idr1(raw[1]), Idr3(raw[2]), Idr5(raw[3]))
        for wrong, why in (
            (not idr0.s1p, "has no stage 1"),
            (idr0.ttf not in _TTF_AARCH64, "does not walk AArch64 tables"),
            (idr0.ttendian not in _TTENDIAN_LITTLE, "does not walk little-endian tables"),
            (not idr0.cohacc, "does not see the caches of the CPUs"),
            (not features.idr5.gran4k, "has no 4 KiB granule"),
            (features.idr1.tables_preset or features.idr1.queues_preset, "has preset tables"),
        ):
            if wrong:
                raise UnsupportedSmmu(f"the SMMU {why}")
        return features

    @property
    def stream_id_bits(self) -> int:
        return self.idr1.sidsize

    @property
    def substream_id_bits(self) -> int:
        return self.idr1.ssidsize

    @property
    def command_queue_log2(self) -> int:
        return self.idr1.cmdqs

    @property
    def event_queue_log2(self) -> int:
        return self.idr1.eventqs

    @property
    def asid_bits(self) -> int:
        return 16 if self.idr0.asid16 else 8

    @property
    def output_bits(self) -> int:
        """Physical address bits; no more than 48, which is what the 4 KiB granule's descriptors hold."""
        encoded = self.idr5.oas
        return min(ADDRESS_SIZES[encoded], 48) if encoded < len(ADDRESS_SIZES) else 48

    @property
    def two_level_streams(self) -> bool:
        return self.idr0.st_level == 1

    @property
    def can_stall(self) -> bool:
        """Whether software chooses between stalling and terminating, so that S1STALLD has a meaning (5.2)."""
        return self.idr0.stall_model == _STALL_CHOICE

    @property
    def must_stall(self) -> bool:
        """Whether every fault that can stall does, and a CD must say so (5.4, S)."""
        return self.idr0.stall_model == _STALL_ALWAYS

    @property
    def stalls(self) -> bool:
        """Whether a transaction can stall at all, and CMD_RESUME and CMD_STALL_TERM exist (4.6)."""
        return self.can_stall or self.must_stall

    @property
    def ats(self) -> bool:
        return self.idr0.ats
