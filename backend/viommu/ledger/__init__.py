"""Proof that a detach is one: a witness beside a live SMMU, and a ledger that reads what it and the models emit.

The witness looks into guest memory, at no other time than when an event comes. The ledger knows the events alone.
"""

from viommu.ledger.events import DetachDeclared
from viommu.ledger.findings import Finding, Severity, Verdict
from viommu.ledger.ledger import Ledger
from viommu.ledger.witness import Witness

__all__ = ["DetachDeclared", "Finding", "Ledger", "Severity", "Verdict", "Witness"]
