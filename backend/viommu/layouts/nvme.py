"""Registers of an NVMe controller (NVM Express 1.4, 3.1)."""

from enum import IntEnum

from viommu.layouts.bitfields import Layout, bits

DOORBELLS = 0x1000
"""Where the doorbells begin, four bytes each: the tail of submission queue N, then the head of completion queue N."""


class Register(IntEnum):
    """Offsets in BAR0."""

    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30


class ShutdownNotification(IntEnum):
    """CC.SHN."""

    NONE = 0
    NORMAL = 1
    ABRUPT = 2


class ShutdownStatus(IntEnum):
    """CSTS.SHST."""

    NORMAL_OPERATION = 0
    OCCURRING = 1
    COMPLETE = 2


class Capabilities(Layout, size=8):
    """CAP (3.1.1)."""

    max_queue_entries = bits(15, 0)
    """Entries less one."""
    contiguous_queues_required = bits(16, kind=bool)
    timeout = bits(31, 24)
    """How long CSTS.RDY may take to follow CC.EN, in units of 500 ms."""
    doorbell_stride = bits(35, 32)
    nvm_command_set = bits(37, kind=bool)
    memory_page_size_min = bits(51, 48)
    """As a power of two, from 4096 bytes on."""
    memory_page_size_max = bits(55, 52)


class Configuration(Layout, size=4):
    """CC (3.1.5)."""

    enable = bits(0, kind=bool)
    command_set = bits(6, 4)
    memory_page_size = bits(10, 7)
    arbitration = bits(13, 11)
    shutdown_notification = bits(15, 14, kind=ShutdownNotification)
    io_submission_entry_size = bits(19, 16)
    io_completion_entry_size = bits(23, 20)


class ControllerStatus(Layout, size=4):
    """CSTS (3.1.6)."""

    ready = bits(0, kind=bool)
    controller_fatal_status = bits(1, kind=bool)
    shutdown_status = bits(3, 2, kind=ShutdownStatus)


class AdminQueueAttributes(Layout, size=4):
    """AQA (3.1.8): entries less one."""

    submission_queue_size = bits(11, 0)
    completion_queue_size = bits(27, 16)
