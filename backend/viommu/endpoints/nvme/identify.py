"""Identify (NVM Express 1.4, 5.15): the controller and its one namespace."""

from viommu.endpoints.base import Identity
from viommu.endpoints.nvme.errors import CommandFailed
from viommu.endpoints.nvme.features import WARNING_TEMPERATURE
from viommu.endpoints.nvme.logs import (
    ERROR_ENTRIES,
    EVENT_REQUESTS,
    FIRMWARE,
    NAMESPACE_ATTRIBUTE_NOTICES,
)
from viommu.layouts.nvme_commands import ALL_NAMESPACES, IdentifyKind, Status
from viommu.layouts.nvme_identify import (
    DescriptorKind,
    IdentifyController,
    IdentifyNamespace,
    NamespaceDescriptor,
    text,
)

VERSION = 0x1_0400
NAMESPACE = 1
PAGE = 4096
"""The size of what Identify gives, and the smallest memory page, bytes."""
MAX_TRANSFER = 512 << 10
"""The most data that one command moves, bytes."""

_COMPARE, _DATASET_MANAGEMENT, _WRITE_ZEROES, _SAVE_AND_SELECT = 1 << 0, 1 << 2, 1 << 3, 1 << 4
_SLOT_1_READ_ONLY, _ONE_SLOT = 1, 1 << 1
_LOG_OFFSETS = 1 << 2
_IO_CONTROLLER = 1
# There is one, and Flush takes all namespaces.
_WRITE_CACHE = 0b111
_DEALLOCATED_READS_ZERO = 1
# Data blocks of bytes, bit buckets, and SGLs that are longer than the data.
_SGLS = 1 | 1 << 16 | 1 << 18


class Identification:
    """What a controller and its namespace of `blocks` times `block_size` bytes say of themselves."""

    def __init__(self, identity: Identity, serial: str, blocks: int, block_size: int) -> None:
        self._controller = IdentifyController(
            pci_vendor_id=identity.vendor_id,
            pci_subsystem_vendor_id=identity.subsystem_vendor_id,
            serial_number=text(serial, 20),
            model_number=text("viommu NVMe", 40),
            firmware_revision=text(FIRMWARE, 8),
            arbitration_burst=3,
            max_data_transfer_size=(MAX_TRANSFER // PAGE).bit_length() - 1,
            version=VERSION,
            controller_type=_IO_CONTROLLER,
            abort_command_limit=3,
            optional_async_events=NAMESPACE_ATTRIBUTE_NOTICES,
            async_event_request_limit=EVENT_REQUESTS - 1,
            firmware_updates=_SLOT_1_READ_ONLY | _ONE_SLOT,
            log_page_attributes=_LOG_OFFSETS,
            error_log_page_entries=ERROR_ENTRIES - 1,
            warning_temperature=WARNING_TEMPERATURE,
            critical_temperature=WARNING_TEMPERATURE + 10,
            submission_queue_entry_size=0x66,
            completion_queue_entry_size=0x44,
            number_of_namespaces=1,
            optional_commands=_COMPARE | _DATASET_MANAGEMENT | _WRITE_ZEROES | _SAVE_AND_SELECT,
            volatile_write_cache=_WRITE_CACHE,
            sgl_support=_SGLS,
            subsystem_name=int.from_bytes(
                f"nqn.2014-08.org.nvmexpress:viommu:{serial}".encode(), "little"
            ),
            max_power=100,  # hundredths of a watt
        ).to_bytes()
        # A namespace's globally unique identifier: no vendor's, but the serial number's.
        self._unique_id = int.from_bytes(serial.encode().ljust(16, b"\0")[:16], "little")
        self._namespace = IdentifyNamespace(
            size_in_blocks=blocks,
            capacity=blocks,
            utilization=blocks,
            deallocate_features=_DEALLOCATED_READS_ZERO,
            unique_id=self._unique_id,
            block_size=block_size.bit_length() - 1,
        ).to_bytes()

    def data(self, kind: int, namespace_id: int) -> bytes:
        """The 4096 bytes of Identify with CNS `kind`; raises `CommandFailed`."""
        match kind:
            case IdentifyKind.CONTROLLER:
                return self._controller
            case IdentifyKind.NAMESPACE:
                _require(namespace_id == NAMESPACE)
                return self._namespace
            case IdentifyKind.ACTIVE_NAMESPACES:
                _require(namespace_id < ALL_NAMESPACES - 1)
                found = NAMESPACE if namespace_id < NAMESPACE else 0
                return found.to_bytes(PAGE, "little")
            case IdentifyKind.NAMESPACE_DESCRIPTORS:
                _require(namespace_id == NAMESPACE)
                descriptor = NamespaceDescriptor(
                    kind=DescriptorKind.NGUID, length=16, content=self._unique_id
                )
                return descriptor.to_bytes().ljust(PAGE, b"\0")
            case _:
                raise CommandFailed(Status.INVALID_FIELD, 40)


def _require(namespace: bool) -> None:
    if not namespace:
        raise CommandFailed(Status.INVALID_NAMESPACE_OR_FORMAT, 4)
