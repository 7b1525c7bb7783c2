"""A laboratory for drivers that live behind an IOMMU.

Each part is a subpackage; nothing is imported here, so that a guest can carry a few of them only.
"""

__version__ = "0.1.0"
