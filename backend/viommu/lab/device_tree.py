"""The device tree of a `virt` machine, with a node for an SMMU that is a PCI function.

The kernel's SMMU driver binds to a platform device. The node makes one of the memory where the kernel is
expected to put the function's BAR 0: at the beginning of the 64-bit window of the PCI host, which holds as long as no
other function has a larger 64-bit BAR.
"""

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import libfdt

from viommu.lab.assets import Qemu
from viommu.lab.config import Device, Machine
from viommu.lab.errors import LabError
from viommu.lab.qemu import machine_arguments

SMMU_FRAME_SIZE = 0x2_0000
"""Bytes of registers that the kernel's driver uses: two pages of 64 KiB."""

_DUMP_LIMIT = 30.0  # seconds
_ROOM = 4096  # bytes for what is added
_REQUESTERS = 0x1_0000  # on a bus of its own, one a function
_FUNCTIONS = 8  # of a slot
# The pins of `virt`'s slots take turns on four level-triggered shared interrupts from this one on.
_FIRST_INTERRUPT, _INTERRUPTS = 3, 4
# QEMU lets the pin go when the guest accesses any register of the function, as the driver does while it waits for a
# command with interrupts off: as a level the interrupt would be lost. By the architecture it is an edge anyway (3.18).
_SHARED, _RISING_EDGE = 0, 1
_WINDOW_64_BIT = 0x03  # the space code of a range of the PCI host
_RANGE_CELLS = 7


@dataclass(frozen=True)
class SmmuTree:
    """A device tree in its binary form, and where the SMMU's registers must be for it to be true."""

    blob: bytes
    address: int

    @property
    def node(self) -> str:
        """The platform device that the kernel makes of the node."""
        return f"{self.address:x}.iommu"


def tree_with_smmu(machine: Machine, smmu: Device, emulator: Qemu) -> SmmuTree:
    """The device tree that QEMU makes for `machine`, with the node of `smmu`; raises `LabError`."""
    ports = [device.slot for device in machine.devices if device.bus is not None]
    return add_smmu(dump(machine, emulator), smmu.slot, ports, ats=machine.kernel_ats)


def dump(machine: Machine, emulator: Qemu) -> bytes:
    """The device tree that QEMU makes for the machine without its served devices; raises `LabError`."""
    with tempfile.TemporaryDirectory(prefix="viommu-") as directory:
        path = Path(directory) / "tree"
        argv = [*emulator.argv, *machine_arguments(machine), "-machine", f"dumpdtb={path}"]
        try:
            subprocess.run(argv, check=True, capture_output=True, timeout=_DUMP_LIMIT)
            return path.read_bytes()
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()
            raise LabError(f"QEMU writes no device tree of the machine: {said}") from error
        except (subprocess.TimeoutExpired, OSError) as error:
            raise LabError(f"QEMU writes no device tree of the machine: {error}") from error


def add_smmu(blob: bytes, slot: int, ports: Sequence[int] = (), *, ats: bool = False) -> SmmuTree:
    """Add the node of an SMMU in `slot` of the root bus, and let it translate what all other slots do.

    Not those of root ports: theirs are messages of QEMU's own, which nobody translates (what is behind them, it does).
    With `ats` the host is said to pass ATS on, without which no kernel uses it.
    Raises `LabError` when the tree has no PCI host with a 64-bit window.
    """
    try:
        tree = libfdt.Fdt(bytearray(blob))
        tree.pack()
        tree.resize(tree.totalsize() + _ROOM)
        host = _pci_host(tree)
        address = _window(bytes(tree.getprop(host, "ranges")))
        phandle = libfdt.fdt_get_max_phandle(tree.as_bytearray()) + 1
        gaps = sorted(each * _FUNCTIONS for each in (0, slot, *ports))
        lows = [first + _FUNCTIONS for first in gaps]
        others = zip(lows, [*gaps[1:], _REQUESTERS], strict=True)
        ranges = [(low, phandle, low, high - low) for low, high in others if low < high]
        tree.setprop(host, "iommu-map", b"".join(_cells(*each) for each in ranges))
        tree.setprop_u32(host, "iommu-map-mask", _REQUESTERS - 1)
        if ats:
            tree.setprop_bool(host, "ats-supported", True)

        interrupt = _FIRST_INTERRUPT + slot % _INTERRUPTS
        node = tree.add_subnode(tree.path_offset("/"), f"iommu@{address:x}")
        tree.setprop_u32(node, "phandle", phandle)
        tree.setprop_bool(node, "dma-coherent", True)
        tree.setprop_u32(node, "#iommu-cells", 1)
        tree.setprop_str(node, "interrupt-names", "combined")
        tree.setprop(node, "interrupts", _cells(_SHARED, interrupt, _RISING_EDGE))
        tree.setprop(node, "reg", _cells(address >> 32, address & 0xFFFF_FFFF, 0, SMMU_FRAME_SIZE))
        tree.setprop_str(node, "compatible", "arm,smmu-v3")
        tree.pack()
    except libfdt.FdtException as error:
        raise LabError(f"the device tree of the machine cannot be edited: {error}") from error
    return SmmuTree(bytes(tree.as_bytearray()), address)


def _pci_host(tree: libfdt.Fdt) -> int:
    absent = [libfdt.NOTFOUND]
    node = tree.first_subnode(tree.path_offset("/"), absent)
    while node >= 0:
        if tree.get_name(node).startswith("pcie@"):
            return int(node)
        node = tree.next_subnode(node, absent)
    raise LabError("the device tree of the machine has no PCI host")


def _window(ranges: bytes) -> int:
    """Where the CPU sees the beginning of the 64-bit window, of the host's `ranges`."""
    cells = [int.from_bytes(ranges[at : at + 4], "big") for at in range(0, len(ranges), 4)]
    for at in range(0, len(cells), _RANGE_CELLS):
        if cells[at] >> 24 & 3 == _WINDOW_64_BIT:
            return cells[at + 3] << 32 | cells[at + 4]
    raise LabError("the PCI host of the machine has no 64-bit window")


def _cells(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "big") for value in values)
