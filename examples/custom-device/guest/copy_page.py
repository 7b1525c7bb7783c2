"""The driver, in the guest: lets the engine copy a page. What is named on the command line is not mapped."""

import os
import struct
import sys
import zlib

import pci
from vfio import Memory, Session  # of viommu, beside this file in the guest

PAGE = os.sysconf("SC_PAGESIZE")
IOVAS = {"ring": 0x1000_0000, "source": 0x2000_0000, "destination": 0x3_0000_0000}

session = Session(pci.find(ids=(0x1234, 0x5305))[0].address)
ring, source, destination = memories = [Memory(PAGE) for _ in IOVAS]
for (name, iova), memory in zip(IOVAS.items(), memories, strict=True):
    if name not in sys.argv:
        session.container.map(iova, memory)
interrupt = os.eventfd(0)
session.device.deliver_intx(interrupt)

source.view[:] = os.urandom(PAGE)
struct.pack_into("<QQI", ring.view, 0, IOVAS["source"], IOVAS["destination"], PAGE)
with session.device.bar.cast("Q") as registers, session.device.bar.cast("I") as words:
    registers[0] = IOVAS["ring"]
    words[2] = 1  # the tail: the doorbell
    os.eventfd_read(interrupt)
    status = words[4]
session.close()
crc, result = struct.unpack_from("<II", ring.view, 20)
right = crc == zlib.crc32(source.view) and source.copy() == destination.copy()
print(f"status {status}, result {result}, {'right' if right else 'wrong'}")
