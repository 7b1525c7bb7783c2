"""PASID in a PCI function: its capability, and what a transaction with a PASID may say of itself (PCIe, 7.8.8)."""

import struct
from typing import Final

from viommu.endpoints.base import ExtendedCapability

PASID_CAPABILITY: Final = 0x1B
PASID_ENABLE, EXECUTE, PRIVILEGED = 1 << 0, 1 << 1, 1 << 2


class PasidService:
    """PASIDs of up to `width` bits, once software has enabled them."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.enabled = self.execute = self.privileged = False
        self.capability = ExtendedCapability(
            PASID_CAPABILITY,
            struct.pack("<HH", EXECUTE | PRIVILEGED | width << 8, 0),
            struct.pack("<HH", 0, PASID_ENABLE | EXECUTE | PRIVILEGED),
            written=self._written,
        )

    def _written(self, body: bytes) -> None:
        (control,) = struct.unpack_from("<H", body, 2)
        self.enabled = bool(control & PASID_ENABLE)
        self.execute = self.enabled and bool(control & EXECUTE)
        self.privileged = self.enabled and bool(control & PRIVILEGED)

    def reset(self) -> None:
        """Function level reset: PASIDs are off."""
        self._written(self.capability.body)

    def refusal(self, substream_id: int) -> str | None:
        """Why no transaction with this PASID goes out; None when it may."""
        if not self.enabled:
            return "PASID is not enabled"
        if substream_id >> self.width:
            return f"PASID {substream_id:#x} has more than {self.width} bits"
        return None
