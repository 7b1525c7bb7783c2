"""The option ROM of the SMMU's function: a UEFI driver that lets the function decode its BAR, and does nothing else.

Firmware leaves a function switched off for which it has no driver, and a kernel's `arm-smmu-v3` expects the registers
to be there: it knows of a platform device, and nothing of PCI. With this ROM the SMMU is there before the kernel is, as
one on a chip would be. UEFI 2.10 has the formats in 14.4.2 (PCI option ROMs) and 2.1.1 (images), the calls in 7.3, 9.1
and 14.4.
"""

import struct
from uuid import UUID

from viommu.endpoints.base import Identity

_BLOCK = 512
_ROM_SIZE = 4096  # EDK2 takes no smaller one
_PAGE = 4096
_CODE_TYPE_UEFI = 3
_LAST_IMAGE = 0x80
_BOOT_SERVICE_DRIVER = 11
_AARCH64 = 0xAA64
_CODE, _EXECUTABLE = (
    0x6000_0020,
    0x22,
)  # of a section: code, executed, read; of an image: that, and any address

_LOADED_IMAGE = UUID("5b1b31a1-9562-11d2-8e3f-00a0c969723b")
_PCI_IO = UUID("4cf5b200-68b8-4ca5-9eec-b23e3f50029a")

# The driver's entry point: x0 is its image's handle, x1 the system table. It finds the function that it was loaded
# from and enables its memory space.
_PROGRAM = (
    0xA9BD7BFD,  #       stp  x29, x30, [sp, #-48]!
    0xF9000BF3,  #       str  x19, [sp, #16]
    0xF9403033,  #       ldr  x19, [x1, #96]    BootServices
    0x100002A1,  #       adr  x1, loaded_image
    0x910063E2,  #       add  x2, sp, #24
    0xF9404E63,  #       ldr  x3, [x19, #152]   HandleProtocol
    0xD63F0060,  #       blr  x3
    0xB50001C0,  #       cbnz x0, out
    0xF9400FE0,  #       ldr  x0, [sp, #24]
    0xF9400C00,  #       ldr  x0, [x0, #24]     DeviceHandle
    0x10000241,  #       adr  x1, pci_io
    0x910063E2,  #       add  x2, sp, #24
    0xF9404E63,  #       ldr  x3, [x19, #152]   HandleProtocol
    0xD63F0060,  #       blr  x3
    0xB50000E0,  #       cbnz x0, out
    0xF9400FE0,  #       ldr  x0, [sp, #24]
    0xD2800041,  #       mov  x1, #2            EfiPciIoAttributeOperationEnable
    0xD2804002,  #       mov  x2, #0x200        EFI_PCI_IO_ATTRIBUTE_MEMORY
    0xD2800003,  #       mov  x3, #0
    0xF9403C04,  #       ldr  x4, [x0, #120]    Attributes
    0xD63F0080,  #       blr  x4
    0xF9400BF3,  # out:  ldr  x19, [sp, #16]
    0xA8C37BFD,  #       ldp  x29, x30, [sp], #48
    0xD65F03C0,  #       ret
)  # loaded_image and pci_io follow


def smmu_option_rom(identity: Identity) -> bytes:
    """The ROM for an AArch64 machine, of the function with that identity."""
    image = _image()
    blocks = 1 + len(image) // _BLOCK
    facts_at = 0x1C
    header = struct.pack(
        "<HHIHHH8xHHH",
        0xAA55, blocks, 0x0EF1, _BOOT_SERVICE_DRIVER, _AARCH64, 0, _BLOCK, facts_at, 0,
    )  # fmt: skip
    facts = struct.pack(
        "<4sHHHHB3sHHBB6x",
        b"PCIR", identity.vendor_id, identity.device_id, 0, 28, 3,
        identity.class_code.to_bytes(3, "little"), blocks, 0,
        _CODE_TYPE_UEFI, _LAST_IMAGE,
    )  # fmt: skip
    return ((header + facts).ljust(_BLOCK, b"\0") + image).ljust(_ROM_SIZE, b"\0")


def _image() -> bytes:
    """The driver in the PE32+ format: one section, one page after where the image is loaded."""
    program = struct.pack(f"<{len(_PROGRAM)}I", *_PROGRAM)
    code = (program + _LOADED_IMAGE.bytes_le + _PCI_IO.bytes_le).ljust(_BLOCK, b"\0")
    directories = bytes(16 * 8)
    standard = struct.pack("<H2xIIIII", 0x20B, len(code), 0, 0, _PAGE, _PAGE)
    windows = struct.pack(
        "<QII12x4xIIIHH32xII",
        0, _PAGE, _BLOCK, 2 * _PAGE, _BLOCK, 0, _BOOT_SERVICE_DRIVER, 0, 0, 16,
    )  # fmt: skip
    optional = standard + windows + directories
    coff = struct.pack("<4sHH12xHH", b"PE", _AARCH64, 1, len(optional), _EXECUTABLE)
    section = struct.pack(
        "<8sIIII12xI", b".text", len(code), _PAGE, len(code), _BLOCK, _CODE
    )  # fmt: skip
    dos = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    return (dos + coff + optional + section).ljust(_BLOCK, b"\0") + code
