"""The process in the guest: maps a page for a device, which writes it; `unmap` takes the page away before that."""

import sys

from engine import RAND48, page_pattern  # of viommu, beside this file in the guest
from linux_vfio import DESTINATION, Session
from vfio import Memory

session, page = Session(), Memory(4096)
session.container.map(DESTINATION, page)
if "unmap" in sys.argv:
    session.container.unmap(DESTINATION, 4096)
status = session.dma(RAND48, DESTINATION, 4096, seed=7).status
print(status, page.copy() == page_pattern(7, DESTINATION))
session.close()
