"""The interrupts of a PCI function in user space, by the kernel's own `uio_pci_generic`."""

import os
from subprocess import run

from pci import Function


class Interrupt:
    """INTx of a function, counted. When one comes the kernel masks the pin until `take` looks.

    The function is bound to the driver while the context lasts.
    """

    def __init__(self, function: Function) -> None:
        run(["modprobe", "uio_pci_generic"], check=True)
        function.write("driver_override", "uio_pci_generic")
        with open("/sys/bus/pci/drivers_probe", "w") as file:  # noqa: PTH123 - pathlib is slow to import
            file.write(function.address)
        (name,) = os.listdir(f"{function.path}/uio")  # noqa: PTH208
        self._function = function
        self._uio = os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK)
        self._seen = 0
        self._bar = function.map_bar().cast("I")
        function.set_bus_master(True)
        self._unmask()

    def take(self) -> int:
        """How many interrupts came since the last look; lets the next one through."""
        try:
            total = int.from_bytes(os.read(self._uio, 4), "little")
        except BlockingIOError:
            return 0
        new, self._seen = total - self._seen, total
        self._unmask()
        return new

    def __enter__(self) -> "Interrupt":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._uio)
        self._function.write("driver/unbind", self._function.address)
        self._function.write("driver_override", "\n")

    def _unmask(self) -> None:
        # QEMU lets go of the line when the guest looks at the function.
        self._bar[0]
        self._function.allow_intx()
