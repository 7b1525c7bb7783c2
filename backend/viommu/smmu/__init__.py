"""The SMMUv3 device model (IHI 0070): registers, tables, caches, queues and translation.

Pure: no socket, no clock, no QEMU. It imports `layouts`, `memory`, `trace` and `hot`, and nothing else of the project.
"""

from viommu.smmu.ats import AtsStatus, TranslationCompletion
from viommu.smmu.ats_port import AtsFunction, HeldTranslation, InvalidateRequest
from viommu.smmu.faults import Access, Stalled, TransactionAborted, TransactionStalled
from viommu.smmu.features import Features
from viommu.smmu.model import Smmu
from viommu.smmu.pri_queue import PageRequest, PageResponse, ResponseCode
from viommu.smmu.translation import Translation

__all__ = [
    "Access",
    "AtsFunction",
    "AtsStatus",
    "Features",
    "HeldTranslation",
    "InvalidateRequest",
    "PageRequest",
    "PageResponse",
    "ResponseCode",
    "Smmu",
    "Stalled",
    "TransactionAborted",
    "TransactionStalled",
    "Translation",
    "TranslationCompletion",
]
