"""Every point at which a plan can interfere, by the name that a plan gives it."""

import re
from dataclasses import fields

from viommu.endpoints import points as endpoint_points
from viommu.smmu import points as smmu_points
from viommu.trace import Point


def point_name(point: type[Point]) -> str:
    """`StructureRead` is `structure-read` in a plan."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", point.__name__).lower()


POINTS: dict[str, type[Point]] = {
    point_name(point): point for point in (*endpoint_points.POINTS, *smmu_points.POINTS)
}


def point_fields(point: type[Point]) -> tuple[str, ...]:
    """What can be asked of a point in a plan's `when`."""
    return tuple(field.name for field in fields(point))
