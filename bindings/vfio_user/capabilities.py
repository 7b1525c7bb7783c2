"""PCI capabilities as bytes with masks: what a client reads and which bits it may write."""

import struct
from typing import Final, NamedTuple

ID_MSI: Final = 0x05
ID_EXPRESS: Final = 0x10
ID_MSIX: Final = 0x11

# PCI Express capability (PCI Express Base, 7.5.3): offsets from the header.
EXPRESS_DEVICE_CONTROL: Final = 8
INITIATE_FUNCTION_LEVEL_RESET: Final = 1 << 15


class Capability(NamedTuple):
    """One capability, without its header.

    `body` is what follows the header: 2 bytes (id, next) in the first 256 bytes of config space,
    4 bytes (id, version, next) for an extended one. `writable` has a 1 for each bit of `body` that
    a client may write, `clearable` a 1 for each bit that a client clears by writing 1. Both may be
    shorter than `body`; the rest is read-only.
    """

    id: int
    body: bytes
    writable: bytes = b""
    clearable: bytes = b""
    extended: bool = False
    version: int = 1


def express() -> Capability:
    """PCI Express endpoint, version 2, one lane of 2.5 GT/s, able to do a function level reset.

    (PCI Express Base, 7.5.3)
    """
    layout = "<HIHHIHH"
    role_based_errors, function_level_reset = 1 << 15, 1 << 28
    link = 1 << 4 | 1  # one lane, first speed
    body = struct.pack(layout, 2, role_based_errors | function_level_reset, 0, 0, link, 0, link)
    # Device control, without the reset bit, which always reads as 0; device status has four errors.
    writable = struct.pack(layout, 0, 0, 0x7FFF, 0, 0, 0x0FFF, 0)
    clearable = struct.pack(layout, 0, 0, 0, 0x000F, 0, 0, 0)
    return Capability(ID_EXPRESS, body.ljust(58, b"\0"), writable, clearable)


def msi(vectors: int) -> Capability:
    """MSI with 64-bit addresses, without masking (PCI Local Bus 3.0, 6.8.1).

    `vectors` is a power of two up to 32. Raises ValueError.
    """
    if vectors not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"MSI has 1, 2, 4, 8, 16 or 32 vectors, not {vectors}")
    capable, address_64bit = (vectors.bit_length() - 1) << 1, 1 << 7
    layout = "<HIIH"
    body = struct.pack(layout, address_64bit | capable, 0, 0, 0)
    return Capability(ID_MSI, body, struct.pack(layout, 0x71, 0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF))


def msix(vectors: int, bar: int, table_offset: int, pending_offset: int) -> Capability:
    """MSI-X (PCI Local Bus 3.0, 6.8.2): table and pending bits in BAR `bar`, offsets in bytes.

    Raises ValueError.
    """
    if not 1 <= vectors <= 2048:
        raise ValueError(f"MSI-X has 1 to 2048 vectors, not {vectors}")
    if table_offset % 8 or pending_offset % 8:
        raise ValueError("the MSI-X table and pending bits lie at multiples of 8 bytes")
    body = struct.pack("<HII", vectors - 1, table_offset | bar, pending_offset | bar)
    return Capability(ID_MSIX, body, struct.pack("<H", 0xC000))
