"""DMA masters. They reach guest RAM through a `DmaPort` only and know nothing of sockets, QEMU or the SMMU.

Nothing is imported here: `pattern` also serves inside a guest.
"""
