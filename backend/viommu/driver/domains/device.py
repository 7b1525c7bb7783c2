"""Devices, and the streams that they are to the SMMU."""

from collections.abc import Sequence
from typing import NamedTuple


class IdMapping(NamedTuple):
    """An ID mapping, as IORT has it: `id_count` input IDs from `input_base` are the StreamIDs from `stream_base` on."""

    input_base: int
    id_count: int
    stream_base: int


class DmaDevice:
    """A device that does DMA. Its identity is the object, as it is with a pointer to a device object.

    An ACPI-enumerated device of ARM64 has `id_mappings`. Any other has one `stream_id`, for which InputMappingId is 0
    and the count 1. `ats` says that ATS is enabled in the function, so that it may keep translations; `stalls` that it
    survives having a transaction wait, so that its faults stall.
    """

    def __init__(
        self,
        name: str,
        stream_id: int | None = None,
        *,
        id_mappings: Sequence[IdMapping] = (),
        ats: bool = False,
        stalls: bool = False,
    ) -> None:
        if (stream_id is None) != bool(id_mappings):
            raise ValueError(f"{name}: a device has one StreamID or else ID mappings")
        self.name, self.ats, self.stalls = name, ats, stalls
        self.is_acpi = bool(id_mappings)
        """Whether InputMappingId means something."""
        mappings = id_mappings if stream_id is None else (IdMapping(0, 1, stream_id),)
        self.streams = {
            mapping.input_base + place: mapping.stream_base + place
            for mapping in mappings
            for place in range(mapping.id_count)
        }
        """The StreamID of each InputMappingId."""
        if len(self.streams) != sum(mapping.id_count for mapping in mappings):
            raise ValueError(f"{name}: ID mappings overlap")

    def __repr__(self) -> str:
        return f"DmaDevice({self.name!r})"
