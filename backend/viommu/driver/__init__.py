"""Software that programs an SMMUv3: page tables, stream tables, queues, and the attach and detach of streams.

Standard library and `viommu.layouts` only: the same files run on the host against the model and in the
guest over the BARs.
"""
