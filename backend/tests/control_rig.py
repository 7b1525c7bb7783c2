"""What the tests of the control socket's methods have in common."""

from typing import Any

from tests import smmu_rig as hw
from tests.hostile_rig import Prey
from viommu.control import Methods
from viommu.smmu import Smmu
from viommu.views.caches import CacheViews
from viommu.views.registers import RegisterViews
from viommu.views.tables import TableViews

STREAM = hw.STREAM


def views(smmu: Smmu) -> Methods:
    """The methods that look at an SMMU."""
    methods = Methods()
    for each in (RegisterViews, TableViews, CacheViews):
        each(smmu, methods)
    return methods


def every_look(prey: Prey, address: int, substream: int | None, number: int) -> list[Any]:
    """What each of them says."""
    methods = views(prey.smmu)
    streams: list[dict[str, Any]] = [{"stream_id": STREAM}, {"stream_id": number}]
    of_stream = [{**each, "substream_id": substream} for each in streams]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("smmu.registers", {}),
        ("smmu.queues", {"limit": 256}),
        ("smmu.stalls", {"limit": 256}),
        ("smmu.streams", {"limit": 256, "everything": True}),
        ("smmu.streams", {"first": number}),
        ("smmu.domains", {"limit": 256}),
        ("smmu.tlb", {"limit": 256}),
        ("smmu.tlb", {"address": address}),
        ("smmu.cache", {"limit": 256}),
        *(("smmu.stream", each) for each in of_stream),
        *(("smmu.contexts", {**each, "first": substream or 0}) for each in streams),
        *(
            ("smmu.walk", {**each, "iova": address, "write": write})
            for each in of_stream
            for write in (False, True)
        ),
    ]
    return [methods.call(name, parameters) for name, parameters in calls]
