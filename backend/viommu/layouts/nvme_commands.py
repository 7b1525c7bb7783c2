"""Queue entries of NVMe: commands and their completions (NVM Express 1.4, 4.2, 4.6, 5 and 6)."""

from enum import IntEnum
from struct import Struct

from viommu.layouts.bitfields import Layout, bits

ALL_NAMESPACES = 0xFFFF_FFFF
"""The NSID of a command that concerns each of them."""
CONTROLLER_TO_HOST = 2
"""Bits 1:0 of the opcode of a command whose data goes to the host, by the tables of opcodes."""
_COMPLETION = Struct("<IIHHHH")


class AdminOpcode(IntEnum):
    """Commands of the admin queue that are implemented (5)."""

    DELETE_IO_SQ = 0x00
    CREATE_IO_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_IO_CQ = 0x04
    CREATE_IO_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C


class IoOpcode(IntEnum):
    """Commands of the I/O queues that are implemented (6)."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09


class Status(IntEnum):
    """Status code type and status code (4.6.1)."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    COMMAND_ID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    COMMAND_ABORT_REQUESTED = 0x007
    COMMAND_ABORTED_SQ_DELETION = 0x008
    INVALID_NAMESPACE_OR_FORMAT = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    INVALID_SGL_SEGMENT_DESCRIPTOR = 0x00D
    INVALID_NUMBER_OF_SGL_DESCRIPTORS = 0x00E
    DATA_SGL_LENGTH_INVALID = 0x00F
    SGL_DESCRIPTOR_TYPE_INVALID = 0x011
    PRP_OFFSET_INVALID = 0x013
    LBA_OUT_OF_RANGE = 0x080
    COMPLETION_QUEUE_INVALID = 0x100
    INVALID_QUEUE_IDENTIFIER = 0x101
    INVALID_QUEUE_SIZE = 0x102
    ASYNC_EVENT_REQUEST_LIMIT_EXCEEDED = 0x105
    INVALID_INTERRUPT_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    WRITE_FAULT = 0x280
    UNRECOVERED_READ_ERROR = 0x281
    COMPARE_FAILURE = 0x285


class FeatureId(IntEnum):
    """Features that are implemented (5.21.1)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR_CONFIGURATION = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENT_CONFIGURATION = 0x0B


class FeatureSelect(IntEnum):
    """Which value Get Features asks for."""

    CURRENT = 0
    DEFAULT = 1
    SAVED = 2
    CAPABILITIES = 3


class LogId(IntEnum):
    """Log pages that are implemented (5.14.1)."""

    ERROR_INFORMATION = 0x01
    SMART = 0x02
    FIRMWARE_SLOT = 0x03
    CHANGED_NAMESPACES = 0x04


class IdentifyKind(IntEnum):
    """CNS of Identify (5.15.1)."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03


class DataPointer(IntEnum):
    """CDW0.PSDT: what points to a command's data."""

    PRP = 0
    SGL = 1
    SGL_WITH_METADATA_SGL = 2


class SubmissionEntry(Layout, size=64):
    """What all commands have in common (4.2). A subclass declares the rest of one."""

    opcode = bits(7, 0)
    fused_operation = bits(9, 8)
    prp_or_sgl = bits(15, 14, kind=DataPointer)
    command_id = bits(31, 16)
    namespace_id = bits(63, 32)
    prp1 = bits(255, 192)
    prp2 = bits(319, 256)


class SglCommand(Layout, size=64):
    """A command whose data an SGL describes: its first descriptor is where the PRP entries are otherwise."""

    sgl1 = bits(319, 192)


class SglIdentifier(IntEnum):
    """Type and sub type of an SGL descriptor. Of the sub types there is the address alone; offsets are for fabrics."""

    DATA_BLOCK = 0x00
    BIT_BUCKET = 0x10
    SEGMENT = 0x20
    LAST_SEGMENT = 0x30


class SglDescriptor(Layout, size=16):
    """An SGL descriptor (4.4)."""

    address = bits(63, 0)
    length = bits(95, 64)
    identifier = bits(127, 120, kind=SglIdentifier)


COMPLETION_SIZE = 16


def completion_entry(
    *,
    result: int,
    sq_head: int,
    sq_id: int,
    command_id: int,
    phase: int,
    status: Status,
    do_not_retry: bool,
) -> bytes:
    """A completion (4.6). Packed at once: there is one for every command."""
    last = phase | status << 1 | do_not_retry << 15
    return _COMPLETION.pack(result, 0, sq_head, sq_id, command_id, last)


class DeleteQueueCommand(SubmissionEntry):
    """Delete I/O Submission Queue and Delete I/O Completion Queue (5.5 and 5.6)."""

    queue_id = bits(335, 320)


class CreateCompletionQueueCommand(SubmissionEntry):
    """Create I/O Completion Queue (5.3); `queue_size` is entries less one."""

    queue_id = bits(335, 320)
    queue_size = bits(351, 336)
    physically_contiguous = bits(352, kind=bool)
    interrupts_enabled = bits(353, kind=bool)
    interrupt_vector = bits(383, 368)


class CreateSubmissionQueueCommand(SubmissionEntry):
    """Create I/O Submission Queue (5.4); `queue_size` is entries less one."""

    queue_id = bits(335, 320)
    queue_size = bits(351, 336)
    physically_contiguous = bits(352, kind=bool)
    completion_queue_id = bits(383, 368)


class GetLogPageCommand(SubmissionEntry):
    """Get Log Page (5.14); `dwords` is a count less one."""

    log_id = bits(327, 320)
    retain_async_event = bits(335, kind=bool)
    dwords = bits(367, 336)
    offset = bits(447, 384)


class IdentifyCommand(SubmissionEntry):
    """Identify (5.15)."""

    kind = bits(327, 320, kind=IdentifyKind)


class AbortCommand(SubmissionEntry):
    """Abort (5.1)."""

    sq_id = bits(335, 320)
    aborted_id = bits(351, 336)


class FeaturesCommand(SubmissionEntry):
    """Set Features and Get Features (5.21 and 5.13)."""

    feature_id = bits(327, 320)
    select = bits(330, 328, kind=FeatureSelect)
    save = bits(351, kind=bool)
    content = bits(383, 352)


class BlocksCommand(SubmissionEntry):
    """Read, Write, Compare and Write Zeroes (6.6 to 6.15); `blocks` is a count less one."""

    first_block = bits(383, 320)
    blocks = bits(399, 384)
    force_unit_access = bits(414, kind=bool)


class DatasetManagementCommand(SubmissionEntry):
    """Dataset Management (6.7); `ranges` is a count less one."""

    ranges = bits(327, 320)
    deallocate = bits(354, kind=bool)


class DatasetRange(Layout, size=16):
    """A range of Dataset Management."""

    blocks = bits(63, 32)
    first_block = bits(127, 64)
