"""PCI functions as the guest's sysfs shows them."""

import mmap
import os

DEVICES = "/sys/bus/pci/devices"
_COMMAND, _EXTENDED = 4, 0x100
_BUS_MASTER = 1 << 2
_INTX_DISABLE = 1 << 10
_ATS_CAPABILITY, _ATS_CONTROL, _ATS_ENABLE = 0x0F, 6, 1 << 15


class Function:
    """One PCI function, by its address (`0000:00:02.0`)."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.path = f"{DEVICES}/{address}"

    @property
    def stream_id(self) -> int:
        """Its requester ID: bus, device and function; the SMMU sees it as StreamID."""
        _, bus, rest = self.address.split(":")
        device, function = rest.split(".")
        return int(bus, 16) << 8 | int(device, 16) << 3 | int(function)

    def enable(self) -> None:
        """Decode the BARs."""
        if self._attribute("enable") == "0":
            self.write("enable", "1")

    def disable(self) -> None:
        """Undo `enable`."""
        if self._attribute("enable") != "0":
            self.write("enable", "0")

    def set_bus_master(self, on: bool) -> None:
        """Let the function do DMA, or not."""
        self._set_command(_BUS_MASTER, on)

    def allow_intx(self) -> None:
        """Let the function assert its interrupt pin (again)."""
        self._set_command(_INTX_DISABLE, False)

    def extended_capability(self, capability: int) -> int:
        """Where in config space it begins; 0 when there is none."""
        place = _EXTENDED
        while place:
            found, link = self.config(place), self.config(place + 2)
            if found == capability:
                return place
            place = link >> 4
        return 0

    def config(self, offset: int) -> int:
        """16 bits of config space."""
        descriptor = os.open(f"{self.path}/config", os.O_RDONLY)
        value = os.pread(descriptor, 2, offset)
        os.close(descriptor)
        return int.from_bytes(value, "little")

    def set_config(self, offset: int, value: int) -> None:
        """Write 16 bits of config space."""
        descriptor = os.open(f"{self.path}/config", os.O_RDWR)
        os.pwrite(descriptor, value.to_bytes(2, "little"), offset)
        os.close(descriptor)

    def _set_command(self, bit: int, on: bool) -> None:
        command = self.config(_COMMAND)
        self.set_config(_COMMAND, command | bit if on else command & ~bit)

    def set_ats(self, on: bool) -> None:
        """Let the function use ATS, or not; `LookupError` when it has none."""
        place = self.extended_capability(_ATS_CAPABILITY)
        if not place:
            raise LookupError(f"{self.address} has no ATS")
        self.set_config(place + _ATS_CONTROL, _ATS_ENABLE if on else 0)

    def map_bar(self, index: int = 0) -> memoryview:
        """The bytes of a BAR. Access them through a cast of the width that the register has."""
        descriptor = os.open(f"{self.path}/resource{index}", os.O_RDWR | os.O_SYNC)
        bar = mmap.mmap(descriptor, 0)
        os.close(descriptor)
        return memoryview(bar)

    def write(self, attribute: str, value: str) -> None:
        """Write a file of the function's folder in sysfs."""
        with open(f"{self.path}/{attribute}", "w") as file:  # noqa: PTH123 - pathlib is slow to import
            file.write(value)

    def _attribute(self, name: str) -> str:
        with open(f"{self.path}/{name}") as file:  # noqa: PTH123
            return file.read().strip()

    def is_a(self, *, class_code: int | None = None, ids: tuple[int, int] | None = None) -> bool:
        """Whether it has the class, or the vendor and device."""
        if class_code is not None:
            return int(self._attribute("class"), 16) == class_code
        return (int(self._attribute("vendor"), 16), int(self._attribute("device"), 16)) == ids


def find(*, class_code: int | None = None, ids: tuple[int, int] | None = None) -> list[Function]:
    """The functions of a class, or of a (vendor, device), by ascending address."""
    functions = [Function(address) for address in sorted(os.listdir(DEVICES))]  # noqa: PTH208
    return [function for function in functions if function.is_a(class_code=class_code, ids=ids)]
