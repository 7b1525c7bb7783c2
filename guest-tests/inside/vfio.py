"""VFIO from user space, by the kernel's type 1 interface: containers, groups and PCI devices (linux/vfio.h).

Closing is what the kernel takes for a detach, so nothing here closes by itself: `close()` each part.
"""

import ctypes
import mmap
import os
import struct
from fcntl import ioctl

# _IO(';', 100 + n)
_BASE = 0x3B << 8 | 100
_GET_API_VERSION, _CHECK_EXTENSION, _SET_IOMMU = _BASE, _BASE + 1, _BASE + 2
_GROUP_GET_STATUS, _GROUP_SET_CONTAINER, _GROUP_GET_DEVICE_FD = _BASE + 3, _BASE + 4, _BASE + 6
_GET_REGION_INFO, _SET_IRQS = _BASE + 8, _BASE + 10
_GET_INFO, _MAP_DMA, _UNMAP_DMA = _BASE + 12, _BASE + 13, _BASE + 14
_TYPE1V2 = 3
_INFO_SIZE, _IOVA_RANGES = 1024, 1
_VIABLE = 1
_READ, _WRITE = 1, 2
_INTX_TRIGGER, _INTX_UNMASK = 1 << 2 | 1 << 5, 1 << 0 | 1 << 4
_CONFIG_REGION = 7
_COMMAND = 4
_BUS_MASTER = 1 << 2


class Memory:
    """Anonymous memory of this process, all zero; in pages of the kernel's own size unless `huge`."""

    def __init__(self, size: int, *, huge: bool = False) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def __len__(self) -> int:
        return len(self._map)

    def copy(self) -> bytes:
        """What it holds now."""
        return self._map[:]

    def clear(self) -> None:
        """Make it zero."""
        self._map[:] = bytes(len(self))

    def differing_pages(self, content: bytes) -> int:
        """How many pieces of 4 KiB are not as in `content`, of as many bytes."""
        now = self.copy()
        if now == content:
            return 0
        return sum(
            now[at : at + 4096] != content[at : at + 4096] for at in range(0, len(now), 4096)
        )

    @property
    def is_zero(self) -> bool:
        return not any(self.copy())


class Container:
    """An IOMMU context: what is mapped here is what the devices of its groups reach."""

    def __init__(self) -> None:
        self.descriptor = os.open("/dev/vfio/vfio", os.O_RDWR)
        if ioctl(self.descriptor, _GET_API_VERSION) or not ioctl(
            self.descriptor, _CHECK_EXTENSION, _TYPE1V2
        ):
            raise OSError("the kernel has no VFIO type 1 IOMMU")

    def set_iommu(self) -> None:
        """Attach the groups; once there is one."""
        ioctl(self.descriptor, _SET_IOMMU, _TYPE1V2)

    def iova_end(self) -> int:
        """Where the last range of IOVAs ends that can be mapped."""
        info = bytearray(_INFO_SIZE)
        struct.pack_into("I", info, 0, _INFO_SIZE)
        ioctl(self.descriptor, _GET_INFO, info)
        (place,) = struct.unpack_from("I", info, 16)
        while place:
            capability, _, following, ranges = struct.unpack_from("HHII", info, place)
            if capability == _IOVA_RANGES:
                return int(struct.unpack_from("Q", info, place + 8 + 16 * ranges)[0]) + 1
            place = following
        raise OSError("the kernel does not say which IOVAs can be mapped")

    def map(
        self, iova: int, memory: Memory, *, offset: int = 0, size: int = 0, write: bool = True
    ) -> None:
        """Let DMA at `iova` reach `size` bytes of memory (0: all from `offset` on)."""
        size = size or len(memory) - offset
        flags = _READ | (_WRITE if write else 0)
        ioctl(
            self.descriptor,
            _MAP_DMA,
            struct.pack("IIQQQ", 32, flags, memory.address + offset, iova, size),
        )

    def unmap(self, iova: int, size: int) -> int:
        """Take `size` bytes from `iova` away; returns how many bytes were mapped."""
        answer = ioctl(self.descriptor, _UNMAP_DMA, struct.pack("IIQQ", 24, 0, iova, size))
        return int(struct.unpack("IIQQ", answer)[3])

    def close(self) -> None:
        os.close(self.descriptor)


class Group:
    """The IOMMU group of a PCI function whose driver is `vfio-pci`."""

    def __init__(self, address: str) -> None:
        # pathlib is slow to import.
        link = os.readlink(f"/sys/bus/pci/devices/{address}/iommu_group")  # noqa: PTH115
        self.number = int(link.rpartition("/")[2])
        self.descriptor = os.open(f"/dev/vfio/{self.number}", os.O_RDWR)
        status = ioctl(self.descriptor, _GROUP_GET_STATUS, struct.pack("II", 8, 0))
        if not struct.unpack("II", status)[1] & _VIABLE:
            raise OSError(f"group {self.number} is not viable")

    def set_container(self, container: Container) -> None:
        ioctl(self.descriptor, _GROUP_SET_CONTAINER, struct.pack("i", container.descriptor))

    def close(self) -> None:
        os.close(self.descriptor)


class Device:
    """A function of a group in a container that has its IOMMU."""

    def __init__(self, group: Group, address: str) -> None:
        # Only what may be changed gives the call's own result.
        name = bytearray(address.encode() + b"\0")
        self.descriptor: int = ioctl(group.descriptor, _GROUP_GET_DEVICE_FD, name)
        self._config = self._region(_CONFIG_REGION)[1]
        size, offset = self._region(0)
        self._map = mmap.mmap(self.descriptor, size, offset=offset)
        self.bar = memoryview(self._map)

    def _region(self, index: int) -> tuple[int, int]:
        """The size of a region, and where in the descriptor it is."""
        asked = struct.pack("IIIIQQ", 32, 0, index, 0, 0, 0)
        found = struct.unpack("IIIIQQ", ioctl(self.descriptor, _GET_REGION_INFO, asked))
        return found[4], found[5]

    def set_bus_master(self, on: bool) -> None:
        """Let the function do DMA, or not."""
        place = self._config + _COMMAND
        command = int.from_bytes(os.pread(self.descriptor, 2, place), "little")
        command = command | _BUS_MASTER if on else command & ~_BUS_MASTER
        os.pwrite(self.descriptor, command.to_bytes(2, "little"), place)

    def deliver_intx(self, eventfd: int) -> None:
        """Let each INTx count in `eventfd`. When one came the kernel masks the pin until `unmask_intx`."""
        ioctl(
            self.descriptor, _SET_IRQS, struct.pack("IIIIIi", 24, _INTX_TRIGGER, 0, 0, 1, eventfd)
        )

    def unmask_intx(self) -> None:
        """Let the next interrupt come."""
        ioctl(self.descriptor, _SET_IRQS, struct.pack("IIIII", 20, _INTX_UNMASK, 0, 0, 1))

    def close(self) -> None:
        """Give the device back: the kernel resets it.

        A mapped BAR would keep it open. `BufferError` when someone still has a part of it.
        """
        self.bar.release()
        self._map.close()
        os.close(self.descriptor)


class Session:
    """A function in a container of its own, ready for DMA."""

    def __init__(self, address: str) -> None:
        self.container = Container()
        self.group = Group(address)
        self.group.set_container(self.container)
        self.container.set_iommu()
        self.device = Device(self.group, address)
        self.device.set_bus_master(True)

    def close(self) -> None:
        """Detach it."""
        self.device.close()
        self.group.close()
        self.container.close()
