"""A copy engine: it takes descriptors from a ring, copies by DMA, and writes back the CRC-32 of what it has copied.

A descriptor is source and destination (IOVAs of 64 bits) and size; then, written back, the CRC-32 and the result.
Its doorbell is the ring's tail. An interrupt follows each descriptor, and an error that cannot be written back.
"""

import struct
import zlib

from viommu.endpoints.master import Bar, DmaFault, DmaMaster, Identity, Steps

RING, TAIL, HEAD, STATUS = 0, 8, 12, 16  # RING has 64 bits, the others 32
ENTRIES, LARGEST = 16, 1 << 20
DESCRIPTOR, RESULT = struct.Struct("<QQI12x"), struct.Struct("<II")
DONE, ABORTED, INVALID = 1, 2, 3


class CopyEngine(DmaMaster):
    identity = Identity(vendor_id=0x1234, device_id=0x5305, class_code=0xFF_0000)
    bars = (Bar(0, 0x1000),)

    def power_on(self):
        self.registers = {RING: 0, TAIL: 0, HEAD: 0, STATUS: 0}

    def read(self, bar, offset, size):
        return self.registers.get(offset, 0)

    def write(self, bar, offset, size, value):
        if offset == RING:
            self.registers[RING] = value
        elif offset == TAIL:
            self.registers[TAIL] = value % ENTRIES
            if self.idle:
                self.start(self.run())

    def run(self) -> Steps:
        registers = self.registers
        try:
            while (head := registers[HEAD]) != registers[TAIL]:
                yield from self.copy(registers[RING] + head * DESCRIPTOR.size)
                registers[HEAD] = (head + 1) % ENTRIES
                self.interrupt(0)
        except DmaFault:  # of the ring itself: there is only the register to say so
            registers[STATUS] = ABORTED
            self.interrupt(0)

    def copy(self, place: int) -> Steps:
        descriptor = yield from self.dma.read(place, DESCRIPTOR.size)
        source, destination, size = DESCRIPTOR.unpack(descriptor)
        crc, result = 0, INVALID
        if 0 < size <= LARGEST:
            try:
                data = yield from self.dma.read(source, size)
                yield from self.dma.write(destination, data)
                crc, result = zlib.crc32(data), DONE
            except DmaFault:
                result = ABORTED
        yield from self.dma.write(place + 20, RESULT.pack(crc, result))
