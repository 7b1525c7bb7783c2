"""The C side of libvfio-user, as its `libvfio-user.h` declares it: types, constants, signatures.

Two application interfaces are in use and neither has a version symbol:

- 0.1 has a migration region (`vfu_get_migr_register_area_size`) and at most 16 DMA regions;
- 0.2 has no migration region, and `vfu_setup_device_dma`, `vfu_sgl_read`, `vfu_sgl_write` and
  `vfu_create_ioeventfd` take more arguments.
"""

import ctypes as c
import enum
from typing import Any, Final

Signature = tuple[Any, tuple[Any, ...]]
"""Result type and argument types, as ctypes wants them."""

FLAG_ATTACH_NON_BLOCKING: Final = 1 << 0
REGION_FLAG_READ: Final = 1 << 0
REGION_FLAG_WRITE: Final = 1 << 1
REGION_FLAG_MEMORY: Final = 1 << 2
REGION_FLAG_ALWAYS_CALLBACK: Final = 1 << 3
CAPABILITY_FLAG_EXTENDED: Final = 1 << 0
CAPABILITY_FLAG_CALLBACK: Final = 1 << 1
CAPABILITY_FLAG_READ_ONLY: Final = 1 << 2
TRANSPORT_SOCKET: Final = 0
DEVICE_TYPE_PCI: Final = 0
HEADER_TYPE_NORMAL: Final = 0
PROTECTION_READ: Final = 1
PROTECTION_WRITE: Final = 2
LOG_DEBUG: Final = 7


class PciType(enum.IntEnum):
    """`vfu_pci_type_t`."""

    CONVENTIONAL = 0
    PCI_X_1 = 1
    PCI_X_2 = 2
    EXPRESS = 3


class Region(enum.IntEnum):
    """Region indexes of a PCI device. `MIGRATION` exists in 0.1 only."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8
    MIGRATION = 9


class Irq(enum.IntEnum):
    """`enum vfu_dev_irq_type`."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERROR = 3
    REQUEST = 4


class ResetType(enum.IntEnum):
    """Why a device is reset (`vfu_reset_type_t`)."""

    DEVICE = 0
    """The client asked for it, for example because the machine restarts."""
    LOST_CONNECTION = 1
    """The client is gone; its DMA regions have been unmapped."""
    FUNCTION_LEVEL = 2
    """The guest set Initiate Function Level Reset (PCI Express Base, 6.6.2)."""


class IoVec(c.Structure):
    """`struct iovec`."""

    _fields_ = (("iov_base", c.c_void_p), ("iov_len", c.c_size_t))


class DmaInfo(c.Structure):
    """`vfu_dma_info_t`. A pointer to it is valid inside the callback that receives it only."""

    _fields_ = (
        ("iova", IoVec),
        ("vaddr", c.c_void_p),
        ("mapping", IoVec),
        ("page_size", c.c_size_t),
        ("prot", c.c_uint32),
    )


# Every callback type saves errno on the way in and hands `ctypes.set_errno` out on the way back.
def _callback(result: Any, *arguments: Any) -> Any:
    return c.CFUNCTYPE(result, *arguments, use_errno=True)


Context = c.c_void_p
ScatterList = c.c_void_p  # dma_sg_t is opaque: `dma_sg_size()` bytes an entry
LogCallback = _callback(None, Context, c.c_int, c.c_char_p)
# The buffer as an integer: anything richer would be made anew at each access.
RegionCallback = _callback(c.c_ssize_t, Context, c.c_void_p, c.c_size_t, c.c_int64, c.c_bool)
ResetCallback = _callback(c.c_int, Context, c.c_int)
QuiesceCallback = _callback(c.c_int, Context)
DmaRegisterCallback = _callback(None, Context, c.POINTER(DmaInfo))
DmaUnregisterCallback = _callback(None, Context, c.POINTER(DmaInfo))
IrqStateCallback = _callback(None, Context, c.c_uint32, c.c_uint32, c.c_bool)

_Transition = _callback(c.c_int, Context, c.c_int)
_MovePart = _callback(c.c_ssize_t, Context, c.c_void_p, c.c_uint64, c.c_uint64)
_MoveNext = _callback(c.c_ssize_t, Context, c.c_void_p, c.c_uint64)


class MigrationCallbacks01(c.Structure):
    """`vfu_migration_callbacks_t` of API 0.1; `version` is 1."""

    _fields_ = (
        ("version", c.c_int),
        ("transition", _Transition),
        ("get_pending_bytes", _callback(c.c_uint64, Context)),
        (
            "prepare_data",
            _callback(c.c_int, Context, c.POINTER(c.c_uint64), c.POINTER(c.c_uint64)),
        ),
        ("read_data", _MovePart),
        ("write_data", _MovePart),
        ("data_written", _callback(c.c_int, Context, c.c_uint64)),
    )


class MigrationCallbacks02(c.Structure):
    """`vfu_migration_callbacks_t` of API 0.2; `version` is 2."""

    _fields_ = (
        ("version", c.c_int),
        ("transition", _Transition),
        ("read_data", _MoveNext),
        ("write_data", _MoveNext),
    )


COMMON: Final[dict[str, Signature]] = {
    "dma_sg_size": (c.c_size_t, ()),
    "vfu_addr_to_sgl": (
        c.c_int,
        (Context, c.c_void_p, c.c_size_t, ScatterList, c.c_size_t, c.c_int),
    ),
    "vfu_attach_ctx": (c.c_int, (Context,)),
    "vfu_create_ctx": (Context, (c.c_int, c.c_char_p, c.c_int, c.c_void_p, c.c_int)),
    "vfu_destroy_ctx": (None, (Context,)),
    "vfu_device_quiesced": (c.c_int, (Context, c.c_int)),
    "vfu_get_poll_fd": (c.c_int, (Context,)),
    "vfu_get_private": (c.c_void_p, (Context,)),
    "vfu_irq_trigger": (c.c_int, (Context, c.c_uint32)),
    "vfu_log": (None, (Context, c.c_int, c.c_char_p)),  # variadic: pass the text as the format
    "vfu_pci_add_capability": (c.c_ssize_t, (Context, c.c_size_t, c.c_int, c.c_void_p)),
    "vfu_pci_find_capability": (c.c_size_t, (Context, c.c_bool, c.c_int)),
    "vfu_pci_find_next_capability": (c.c_size_t, (Context, c.c_bool, c.c_size_t, c.c_int)),
    "vfu_pci_get_config_space": (c.c_void_p, (Context,)),
    "vfu_pci_init": (c.c_int, (Context, c.c_int, c.c_int, c.c_int)),
    "vfu_pci_set_class": (None, (Context, c.c_uint8, c.c_uint8, c.c_uint8)),
    "vfu_pci_set_id": (None, (Context, c.c_uint16, c.c_uint16, c.c_uint16, c.c_uint16)),
    "vfu_realize_ctx": (c.c_int, (Context,)),
    "vfu_run_ctx": (c.c_int, (Context,)),
    "vfu_setup_device_nr_irqs": (c.c_int, (Context, c.c_int, c.c_uint32)),
    "vfu_setup_device_quiesce_cb": (None, (Context, QuiesceCallback)),
    "vfu_setup_device_reset_cb": (c.c_int, (Context, ResetCallback)),
    "vfu_setup_irq_state_callback": (c.c_int, (Context, c.c_int, IrqStateCallback)),
    "vfu_setup_log": (c.c_int, (Context, LogCallback, c.c_int)),
    "vfu_setup_region": (
        c.c_int,
        (
            Context,
            c.c_int,
            c.c_size_t,
            RegionCallback,
            c.c_int,
            c.POINTER(IoVec),
            c.c_uint32,
            c.c_int,
            c.c_uint64,
        ),
    ),
    "vfu_sg_is_mappable": (c.c_bool, (Context, ScatterList)),
    "vfu_sgl_get": (c.c_int, (Context, ScatterList, c.POINTER(IoVec), c.c_size_t, c.c_int)),
    "vfu_sgl_mark_dirty": (None, (Context, ScatterList, c.c_size_t)),
    "vfu_sgl_put": (None, (Context, ScatterList, c.POINTER(IoVec), c.c_size_t)),
}

_IOEVENTFD: Final = (
    Context,
    c.c_uint32,
    c.c_int,
    c.c_size_t,
    c.c_uint32,
    c.c_uint32,
    c.c_uint64,
)

API_0_1: Final[dict[str, Signature]] = COMMON | {
    "vfu_create_ioeventfd": (c.c_int, _IOEVENTFD),
    "vfu_get_migr_register_area_size": (c.c_size_t, ()),
    "vfu_setup_device_dma": (c.c_int, (Context, DmaRegisterCallback, DmaUnregisterCallback)),
    "vfu_setup_device_migration_callbacks": (
        c.c_int,
        (Context, c.POINTER(MigrationCallbacks01), c.c_uint64),
    ),
    "vfu_sgl_read": (c.c_int, (Context, ScatterList, c.c_size_t, c.c_void_p)),
    "vfu_sgl_write": (c.c_int, (Context, ScatterList, c.c_size_t, c.c_void_p)),
}

API_0_2: Final[dict[str, Signature]] = COMMON | {
    # … and the shadow file descriptor (-1 for none) with an offset into it
    "vfu_create_ioeventfd": (c.c_int, (*_IOEVENTFD, c.c_int, c.c_size_t)),
    "vfu_setup_device_dma": (
        c.c_int,
        (Context, c.c_size_t, DmaRegisterCallback, DmaUnregisterCallback),
    ),
    "vfu_setup_device_migration_callbacks": (c.c_int, (Context, c.POINTER(MigrationCallbacks02))),
    # flags, 0 for now, come last as in vfu_sgl_get
    "vfu_sgl_read": (c.c_int, (Context, ScatterList, c.c_size_t, c.c_void_p, c.c_int)),
    "vfu_sgl_write": (c.c_int, (Context, ScatterList, c.c_size_t, c.c_void_p, c.c_int)),
}
