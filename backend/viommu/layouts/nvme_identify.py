"""What an NVMe controller says of itself: Identify data and log pages (NVM Express 1.4, 5.14.1 and 5.15.2)."""

from enum import IntEnum

from viommu.layouts.bitfields import Bits, Layout, bits


def octets(first: int, last: int | None = None) -> Bits[int]:
    """The field of bytes `first` to `last`, as the tables of the specification give it."""
    return bits(8 * (first if last is None else last) + 7, 8 * first)


def text(words: str, size: int) -> int:
    """ASCII in a field of `size` bytes, filled up with spaces."""
    return int.from_bytes(words.encode("ascii").ljust(size)[:size], "little")


class IdentifyController(Layout, size=4096):
    """CNS 01h."""

    pci_vendor_id = octets(0, 1)
    pci_subsystem_vendor_id = octets(2, 3)
    serial_number = octets(4, 23)
    model_number = octets(24, 63)
    firmware_revision = octets(64, 71)
    arbitration_burst = octets(72)
    max_data_transfer_size = octets(77)
    """As a power of two, in the smallest memory pages."""
    controller_id = octets(78, 79)
    version = octets(80, 83)
    optional_async_events = octets(92, 95)
    controller_type = octets(111)
    abort_command_limit = octets(258)
    async_event_request_limit = octets(259)
    firmware_updates = octets(260)
    log_page_attributes = octets(261)
    error_log_page_entries = octets(262)
    power_states = octets(263)
    warning_temperature = octets(266, 267)
    critical_temperature = octets(268, 269)
    submission_queue_entry_size = octets(512)
    completion_queue_entry_size = octets(513)
    number_of_namespaces = octets(516, 519)
    optional_commands = octets(520, 521)
    volatile_write_cache = octets(525)
    sgl_support = octets(536, 539)
    subsystem_name = octets(768, 1023)
    max_power = octets(2048, 2049)


class IdentifyNamespace(Layout, size=4096):
    """CNS 00h."""

    size_in_blocks = octets(0, 7)
    capacity = octets(8, 15)
    utilization = octets(16, 23)
    deallocate_features = octets(33)
    unique_id = octets(104, 119)
    metadata_size = octets(128, 129)
    block_size = octets(130)
    """As a power of two."""


class DescriptorKind(IntEnum):
    """NIDT of a namespace identification descriptor."""

    NGUID = 2


class NamespaceDescriptor(Layout, size=20):
    """CNS 03h, one descriptor of 16 bytes."""

    kind = bits(7, 0, kind=DescriptorKind)
    length = octets(1)
    content = octets(4, 19)


class ErrorEntry(Layout, size=64):
    """An entry of the Error Information log page."""

    error_count = octets(0, 7)
    sq_id = octets(8, 9)
    command_id = octets(10, 11)
    status = bits(111, 97)
    parameter_location = octets(14, 15)
    block = octets(16, 23)
    namespace_id = octets(24, 27)


class SmartLog(Layout, size=512):
    """The SMART / Health Information log page."""

    critical_warning = octets(0)
    composite_temperature = octets(1, 2)
    available_spare = octets(3)
    available_spare_threshold = octets(4)
    data_units_read = octets(32, 47)
    data_units_written = octets(48, 63)
    host_reads = octets(64, 79)
    host_writes = octets(80, 95)
    power_cycles = octets(112, 127)
    media_errors = octets(160, 175)
    error_log_entries = octets(176, 191)


class FirmwareSlotLog(Layout, size=512):
    """The Firmware Slot Information log page."""

    active_slot = bits(2, 0)
    revision_of_slot_1 = octets(8, 15)
