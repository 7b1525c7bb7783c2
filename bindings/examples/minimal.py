"""A PCI device with an id and a scratch register that a stock QEMU boots with.

    python minimal.py /tmp/minimal.sock

prints the arguments for QEMU (10.1 or later), and each access of the guest. In the guest:

    lspci -d 1234:11e8      # find it; its BAR 0 is `resource0` in its directory in /sys
"""

import contextlib
import json
import select
import sys

from vfio_user import ClientLost, PciDevice, ResetType

ID, SCRATCH = 0x0, 0x4


class Minimal(PciDevice):
    """BAR 0: at 0 the read-only id 0x10b5ed, at 4 a scratch register, 32 bits each."""

    def __init__(self, path: str) -> None:
        super().__init__(path, vendor_id=0x1234, device_id=0x11E8, class_code=0xFF0000)
        self.scratch = 0
        self.on_reset = self.reset
        self.add_bar(0, 0x1000, read=self.read, write=self.write, prefetchable=False)
        self.realize()

    def read(self, offset: int, length: int) -> int:
        value = {ID: 0x10B5ED, SCRATCH: self.scratch}.get(offset, 0) & (1 << 8 * length) - 1
        print(f"read  {offset:#x}: {value:#x}", flush=True)
        return value

    def write(self, offset: int, data: bytes) -> None:
        print(f"write {offset:#x}: {data[::-1].hex()}", flush=True)
        if offset == SCRATCH:
            self.scratch = int.from_bytes(data[:4], "little")

    def reset(self, _: ResetType) -> None:
        self.scratch = 0


def main() -> None:
    with Minimal(sys.argv[1]) as device:
        socket = {"type": "unix", "path": str(device.socket_path)}
        print(
            "-device", f"'{json.dumps({'driver': 'vfio-user-pci', 'socket': socket})}'", flush=True
        )
        while True:
            select.select([device], [], [])
            if not device.attached:
                device.attach()
                continue
            try:
                device.run()
            except ClientLost:
                print("client gone, waiting for the next", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
