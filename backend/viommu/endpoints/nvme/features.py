"""Set Features and Get Features (NVM Express 1.4, 5.13 and 5.21)."""

from typing import Final

from viommu.endpoints.nvme.errors import CommandFailed
from viommu.endpoints.nvme.logs import NAMESPACE_ATTRIBUTE_NOTICES, TEMPERATURE
from viommu.endpoints.nvme.queues import IO_QUEUES
from viommu.layouts.nvme_commands import FeatureId, FeaturesCommand, FeatureSelect, Status

WARNING_TEMPERATURE = 343
"""Kelvin."""

_COUNT: Final = IO_QUEUES - 1 << 16 | IO_QUEUES - 1
# The bits of each that software can set.
_WRITABLE: Final = {
    FeatureId.ARBITRATION: 0xFFFF_FF07,
    FeatureId.POWER_MANAGEMENT: 0,
    FeatureId.TEMPERATURE_THRESHOLD: 0xFFFF,
    FeatureId.ERROR_RECOVERY: 0xFFFF,
    FeatureId.VOLATILE_WRITE_CACHE: 1,
    FeatureId.NUMBER_OF_QUEUES: 0,
    FeatureId.INTERRUPT_COALESCING: 0xFFFF,
    FeatureId.INTERRUPT_VECTOR_CONFIGURATION: 1 << 16,
    FeatureId.WRITE_ATOMICITY: 1,
    FeatureId.ASYNC_EVENT_CONFIGURATION: NAMESPACE_ATTRIBUTE_NOTICES | 0xFF,
}
_DEFAULTS: Final = {
    FeatureId.ARBITRATION: 3,
    FeatureId.VOLATILE_WRITE_CACHE: 1,
    FeatureId.NUMBER_OF_QUEUES: _COUNT,
}
_CHANGEABLE: Final = 1 << 2
_OVER, _UNDER, _ALL_SENSORS = 0, 1, 0xF


class Features:
    """Their present values. None is saved: after a reset they are the defaults."""

    def __init__(self) -> None:
        self._values: dict[tuple[FeatureId, int], int] = {}

    @property
    def write_cache(self) -> bool:
        """Whether writes may wait for a flush."""
        return bool(self._value(FeatureId.VOLATILE_WRITE_CACHE, 0))

    @property
    def critical_warning(self) -> int:
        """That of the SMART log: bit 1, the temperature has reached a threshold (5.14.1.2)."""
        over, under = (
            self._value(FeatureId.TEMPERATURE_THRESHOLD, kind) for kind in (_OVER, _UNDER)
        )
        return int(not under < TEMPERATURE < over) << 1

    @property
    def warns(self) -> bool:
        """There is a critical warning that software wants to hear of."""
        return bool(self.critical_warning & self._value(FeatureId.ASYNC_EVENT_CONFIGURATION, 0))

    def get(self, command: FeaturesCommand) -> int:
        """The result of Get Features."""
        feature = _known(command)
        index = _index(feature, command.content)
        match command.select:
            case FeatureSelect.CURRENT:
                return self._value(feature, index)
            case FeatureSelect.DEFAULT | FeatureSelect.SAVED:
                return _default(feature, index)
            case FeatureSelect.CAPABILITIES:
                return _CHANGEABLE if _WRITABLE[feature] else 0
            case _:
                raise CommandFailed(Status.INVALID_FIELD, 41)

    def set(self, command: FeaturesCommand, *, queues_exist: bool) -> int:
        """The result of Set Features."""
        feature, content = _known(command), command.content
        if command.save:
            raise CommandFailed(Status.FEATURE_NOT_SAVEABLE)
        if feature is FeatureId.NUMBER_OF_QUEUES:
            if queues_exist:
                raise CommandFailed(Status.COMMAND_SEQUENCE_ERROR)
            if 0xFFFF in (content & 0xFFFF, content >> 16):
                raise CommandFailed(Status.INVALID_FIELD, 44)
            return _COUNT
        index = _index(feature, content)
        if feature is FeatureId.POWER_MANAGEMENT and content & 0x1F:
            raise CommandFailed(Status.INVALID_FIELD, 44)  # there is one power state
        writable = _WRITABLE[feature]
        self._values[feature, index] = _default(feature, index) & ~writable | content & writable
        return 0

    def _value(self, feature: FeatureId, index: int) -> int:
        return self._values.get((feature, index), _default(feature, index))


def _known(command: FeaturesCommand) -> FeatureId:
    try:
        return FeatureId(command.feature_id)
    except ValueError:
        raise CommandFailed(Status.INVALID_FIELD, 40) from None


def _index(feature: FeatureId, content: int) -> int:
    """Of a feature that there is several times: which one is meant."""
    if feature is FeatureId.INTERRUPT_VECTOR_CONFIGURATION:
        vector = content & 0xFFFF
        if vector > IO_QUEUES:
            raise CommandFailed(Status.INVALID_FIELD, 44)
        return vector
    if feature is FeatureId.TEMPERATURE_THRESHOLD:
        sensor, kind = content >> 16 & 0xF, content >> 20 & 3
        if sensor not in (0, _ALL_SENSORS) or kind not in (_OVER, _UNDER):
            raise CommandFailed(Status.INVALID_FIELD, 44)
        return kind
    return 0


def _default(feature: FeatureId, index: int) -> int:
    if feature is FeatureId.INTERRUPT_VECTOR_CONFIGURATION:
        return index
    if feature is FeatureId.TEMPERATURE_THRESHOLD:
        return WARNING_TEMPERATURE if index == _OVER else 0
    return _DEFAULTS.get(feature, 0)
