"""What this SMMU implements, and hence what its ID registers say."""

from dataclasses import dataclass

from viommu.layouts.registers import ADDRESS_SIZES, Idr0, Idr1, Idr3, Idr5


@dataclass(frozen=True)
class Features:
    """The sizes a run may choose. Everything that is not here is fixed by what the model can do.

    `stream_id_bits` and `substream_id_bits` are widths, `command_queue_log2` and `event_queue_log2` the largest queues
    in log2 of entries, `output_address_bits` one of the sizes of IDR5.OAS. Without `msi` all interrupts are wired.
    """

    stream_id_bits: int = 16
    substream_id_bits: int = 20
    command_queue_log2: int = 13
    event_queue_log2: int = 12
    output_address_bits: int = 48
    msi: bool = True

    def __post_init__(self) -> None:
        if self.output_address_bits not in ADDRESS_SIZES[:6]:
            raise ValueError(f"output_address_bits: {self.output_address_bits} is no size of 32-48")
        if not 0 <= self.stream_id_bits <= 32 or not 0 <= self.substream_id_bits <= 20:
            raise ValueError("at most 32 StreamID bits and 20 SubstreamID bits exist")
        if not 0 <= self.command_queue_log2 <= 19 or not 0 <= self.event_queue_log2 <= 19:
            raise ValueError("a queue has at most 2^19 entries")

    def idr0(self) -> Idr0:
        """Stage 1 only, AArch64 tables, little-endian, 2-level stream and CD tables, terminate model."""
        return Idr0(
            s1p=True,
            ttf=2,
            cohacc=True,
            asid16=True,
            msi=self.msi,
            cd2l=True,
            ttendian=2,
            stall_model=1,
            term_model=True,
            st_level=1,
        )

    def idr1(self) -> Idr1:
        """The sizes."""
        return Idr1(
            sidsize=self.stream_id_bits,
            ssidsize=self.substream_id_bits,
            eventqs=self.event_queue_log2,
            cmdqs=self.command_queue_log2,
        )

    def idr3(self) -> Idr3:
        """None of the optional extensions."""
        return Idr3()

    def idr5(self) -> Idr5:
        """The 4 KiB granule, and the output address size."""
        return Idr5(gran4k=True, oas=ADDRESS_SIZES.index(self.output_address_bits))

    @property
    def granules(self) -> frozenset[int]:
        """log2 of each translation granule."""
        return frozenset({12})
