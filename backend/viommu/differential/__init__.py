"""Our SMMU and QEMU's before the same cases: raw memory, registers, commands and accesses.

Nothing here decodes a structure with `viommu.layouts`: a wrong bit there must show as a difference.
"""
