"""The host's own SMMU: domains for the endpoints of a guest that knows nothing of it.

The same model and the same driver as the guest's, over memory of the server's own. No part of it is in guest RAM.
"""

from viommu.host.domains import EndpointState, HostDomainEvent, HostDomains, HostEndpoint
from viommu.host.smmu import HOST_FEATURES, HostSmmu, HostSmmuEvent

__all__ = [
    "HOST_FEATURES",
    "EndpointState",
    "HostDomainEvent",
    "HostDomains",
    "HostEndpoint",
    "HostSmmu",
    "HostSmmuEvent",
]
