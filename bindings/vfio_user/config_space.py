"""PCI configuration space: bytes, who may write which bit, and the list of capabilities.

The library would handle the header and four capabilities itself, without a word to the device, and
refuses all others. So all accesses come here (PCI Local Bus 3.0, 6.1 and 6.2).
"""

import struct
from typing import Final

from vfio_user.capabilities import (
    EXPRESS_DEVICE_CONTROL,
    ID_EXPRESS,
    INITIATE_FUNCTION_LEVEL_RESET,
    Capability,
)
from vfio_user.errors import DeviceError

COMMAND: Final = 0x04
STATUS: Final = 0x06
BARS: Final = 0x10
CAPABILITIES_POINTER: Final = 0x34
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D
HEADER_SIZE: Final = 0x40
CONVENTIONAL_SIZE: Final = 0x100

COMMAND_MEMORY: Final = 1 << 1
COMMAND_BUS_MASTER: Final = 1 << 2
COMMAND_INTX_DISABLE: Final = 1 << 10
STATUS_INTERRUPT: Final = 1 << 3
STATUS_CAPABILITIES: Final = 1 << 4

# Memory space, bus master, parity error response, SERR#, INTx disable.
_COMMAND_WRITABLE: Final = (
    COMMAND_MEMORY | COMMAND_BUS_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE
)
# Master data parity error, and the five that report aborts and errors.
_STATUS_CLEARABLE: Final = 0xF900


class InterruptPin:
    """INTA# as the guest finds it in the status register (7.5.1.1.4).

    The client asserts the line when it gets the interrupt, and lets go of it when the guest next
    accesses a BAR; the status bit says the same. Drivers that share a line, or mask it in the
    command register, look at the bit.
    """

    __slots__ = ("_data", "asserted")

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.asserted = False

    def raise_(self) -> None:
        """The interrupt is about to be sent."""
        if self._data[INTERRUPT_PIN]:
            self._data[STATUS] |= STATUS_INTERRUPT
            self.asserted = True

    def release(self) -> None:
        """The guest accesses a BAR."""
        self._data[STATUS] &= ~STATUS_INTERRUPT
        self.asserted = False


class ConfigSpace:
    """The configuration space of one function over `data`, 256 or 4096 zero bytes of its memory.

    Numbers are little-endian, offsets and sizes in bytes.
    """

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.pin = InterruptPin(data)
        self._writable = bytearray(len(data))
        self._clearable = bytearray(len(data))
        self._initial = bytes(data)
        self._next_free = HEADER_SIZE
        self._last: int | None = None
        self._last_extended: int | None = None
        self._next_extended = CONVENTIONAL_SIZE
        self._reset_byte: int | None = None
        self._allow(COMMAND, struct.pack("<H", _COMMAND_WRITABLE))
        self._allow(STATUS, b"", struct.pack("<H", _STATUS_CLEARABLE))
        self._allow(0x0C, b"\xff")  # cache line size
        self._allow(INTERRUPT_LINE, b"\xff")

    def _allow(self, offset: int, writable: bytes, clearable: bytes = b"") -> None:
        self._writable[offset : offset + len(writable)] = writable
        self._clearable[offset : offset + len(clearable)] = clearable

    def identify(
        self,
        *,
        vendor: int,
        device: int,
        subsystem: tuple[int, int],
        class_code: int,
        revision: int,
    ) -> None:
        """Fill the identity: ids of 16 bits, `subsystem` as (vendor, id), a class of 24 bits."""
        fields = ((vendor, 16), (device, 16), (class_code, 24), (revision, 8))
        for value, bits in (*fields, (subsystem[0], 16), (subsystem[1], 16)):
            if not 0 <= value < 1 << bits:
                raise DeviceError(f"identity: {value:#x} does not fit {bits} bits")
        struct.pack_into("<HH", self.data, 0x00, vendor, device)
        struct.pack_into("<I", self.data, 0x08, class_code << 8 | revision)
        struct.pack_into("<HH", self.data, 0x2C, *subsystem)

    def set_bar(self, index: int, size: int, *, is_64bit: bool, prefetchable: bool) -> None:
        """Lay out a memory BAR of `size` bytes, a power of two (6.2.5.1)."""
        writable = ~(size - 1) & (0xFFFF_FFFF_FFFF_FFFF if is_64bit else 0xFFFF_FFFF)
        kind = is_64bit << 2 | prefetchable << 3
        width = 8 if is_64bit else 4
        offset = BARS + 4 * index
        self.data[offset : offset + width] = kind.to_bytes(width, "little")
        self._allow(offset, (writable & ~0xF).to_bytes(width, "little"))

    def set_interrupt_pin(self, pin: int) -> None:
        """Say which pin the function uses: 0 none, 1 INTA."""
        self.data[INTERRUPT_PIN] = pin

    def add(self, capability: Capability) -> int:
        """Put a capability at the next free place; returns its offset. Raises `DeviceError`."""
        masks = len(capability.writable), len(capability.clearable)
        if max(masks) > len(capability.body):
            raise DeviceError("the masks of a capability are longer than its body")
        if not (0 <= capability.id < 1 << (16 if capability.extended else 8)):
            raise DeviceError(f"there is no capability with id {capability.id:#x}")
        if not 0 <= capability.version < 16:
            raise DeviceError(f"a capability has no version {capability.version}")
        offset = self._link_extended(capability) if capability.extended else self._link(capability)
        body = offset + (4 if capability.extended else 2)
        self.data[body : body + len(capability.body)] = capability.body
        self._allow(body, capability.writable, capability.clearable)
        if capability.id == ID_EXPRESS and not capability.extended:
            self._reset_byte = offset + EXPRESS_DEVICE_CONTROL + 1
        return offset

    def _link(self, capability: Capability) -> int:
        offset = self._next_free
        end = offset + 2 + len(capability.body)
        if end > CONVENTIONAL_SIZE:
            raise DeviceError(f"no room left for capability {capability.id:#x}")
        self.data[offset : offset + 2] = bytes((capability.id, 0))
        self.data[CAPABILITIES_POINTER if self._last is None else self._last + 1] = offset
        self.data[STATUS] |= STATUS_CAPABILITIES
        self._last, self._next_free = offset, -(-end // 4) * 4
        return offset

    def _link_extended(self, capability: Capability) -> int:
        offset = self._next_extended
        end = offset + 4 + len(capability.body)
        if end > len(self.data):
            raise DeviceError(f"no room left for extended capability {capability.id:#x}")
        struct.pack_into("<I", self.data, offset, capability.version << 16 | capability.id)
        if self._last_extended is not None:
            (header,) = struct.unpack_from("<I", self.data, self._last_extended)
            struct.pack_into("<I", self.data, self._last_extended, header | offset << 20)
        self._last_extended, self._next_extended = offset, -(-end // 4) * 4
        return offset

    @property
    def bus_master(self) -> bool:
        """Whether the function may start DMA (PCI_COMMAND.BusMaster)."""
        return bool(self.data[COMMAND] & COMMAND_BUS_MASTER)

    def remember(self) -> None:
        """Make the present content what a reset restores."""
        self._initial = bytes(self.data)

    def reset(self) -> None:
        """Restore what `remember` saw."""
        self.data[:] = self._initial
        self.pin.asserted = False

    def write(self, offset: int, data: bytes) -> bool:
        """A write by the client; read-only bits keep their value, as PCI wants it.

        Returns whether it asks for a function level reset, which is left to the caller.
        """
        for index, byte in enumerate(data, offset):
            mask = self._writable[index]
            kept = self.data[index] & ~mask & ~(byte & self._clearable[index])
            self.data[index] = kept | byte & mask
        index = -1 if self._reset_byte is None else self._reset_byte - offset
        return 0 <= index < len(data) and bool(data[index] & INITIATE_FUNCTION_LEVEL_RESET >> 8)
