"""QEMU: what it needs, its machines, guests and consoles.

Nothing here knows how an SMMU works.
"""
