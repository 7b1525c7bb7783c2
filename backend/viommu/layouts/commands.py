"""Command queue entries (IHI 0070, chapter 4)."""

from enum import IntEnum

from viommu.layouts.bitfields import Layout, bits


class Opcode(IntEnum):
    """Bits 7:0 of a command (4.1.1)."""

    CMD_PREFETCH_CONFIG = 0x01
    CMD_PREFETCH_ADDR = 0x02
    CMD_CFGI_STE = 0x03
    CMD_CFGI_STE_RANGE = 0x04
    CMD_CFGI_CD = 0x05
    CMD_CFGI_CD_ALL = 0x06
    CMD_CFGI_VMS_PIDM = 0x07
    CMD_TLBI_NH_ALL = 0x10
    CMD_TLBI_NH_ASID = 0x11
    CMD_TLBI_NH_VA = 0x12
    CMD_TLBI_NH_VAA = 0x13
    CMD_TLBI_EL2_ALL = 0x20
    CMD_TLBI_EL2_ASID = 0x21
    CMD_TLBI_EL2_VA = 0x22
    CMD_TLBI_EL2_VAA = 0x23
    CMD_TLBI_S12_VMALL = 0x28
    CMD_TLBI_S2_IPA = 0x2A
    CMD_TLBI_NSNH_ALL = 0x30
    CMD_ATC_INV = 0x40
    CMD_PRI_RESP = 0x41
    CMD_RESUME = 0x44
    CMD_STALL_TERM = 0x45
    CMD_SYNC = 0x46


COMMAND_SIZE = 16
"""Bytes of one entry of the command queue (4.1)."""

CFGI_ALL_RANGE = 31
"""The Range of CMD_CFGI_STE_RANGE that makes it CMD_CFGI_ALL (4.3.2)."""


class Command(Layout, size=COMMAND_SIZE):
    """What every command has (4.1)."""

    opcode = bits(7, 0, kind=Opcode)


class StreamCommand(Command):
    """CMD_CFGI_STE, CMD_CFGI_STE_RANGE, CMD_CFGI_CD, CMD_CFGI_CD_ALL and CMD_PREFETCH_* (4.2, 4.3)."""

    ssec = bits(10, kind=bool)
    ssv = bits(11, kind=bool)
    substream_id = bits(31, 12)
    stream_id = bits(63, 32)
    leaf_or_range = bits(68, 64)


class TlbiCommand(Command):
    """CMD_TLBI_* (4.4)."""

    num = bits(16, 12)
    scale = bits(24, 20)
    vmid = bits(47, 32)
    asid = bits(63, 48)
    leaf = bits(64, kind=bool)
    ttl = bits(73, 72)
    tg = bits(75, 74)
    address = bits(127, 76, scale=4096)


class ResumeCommand(Command):
    """CMD_RESUME and CMD_STALL_TERM, which has no STAG and no action (4.6)."""

    ssec = bits(10, kind=bool)
    retry = bits(12, kind=bool)
    abort = bits(13, kind=bool)
    stream_id = bits(63, 32)
    stag = bits(79, 64)


class AtcInvalidateCommand(Command):
    """CMD_ATC_INV: 4096 × 2^size bytes from `address`, which the SMMU aligns to them; 52 is everything (4.5.1)."""

    global_ = bits(9, kind=bool)
    ssv = bits(11, kind=bool)
    substream_id = bits(31, 12)
    stream_id = bits(63, 32)
    span_log2 = bits(69, 64)
    address = bits(127, 76, scale=4096)


class PriResponse(IntEnum):
    """CMD_PRI_RESP.Resp; 3 is ILLEGAL (4.5.2)."""

    RESPONSE_FAILURE = 0
    INVALID_REQUEST = 1
    SUCCESS = 2


class PriResponseCommand(Command):
    """CMD_PRI_RESP (4.5.2)."""

    ssv = bits(11, kind=bool)
    substream_id = bits(31, 12)
    stream_id = bits(63, 32)
    prg_index = bits(72, 64)
    response = bits(77, 76, kind=PriResponse)


class CompletionSignal(IntEnum):
    """CMD_SYNC.CS (4.7.3)."""

    SIG_NONE = 0
    SIG_IRQ = 1
    SIG_SEV = 2


class SyncCommand(Command):
    """CMD_SYNC (4.7.3)."""

    cs = bits(13, 12, kind=CompletionSignal)
    msh = bits(23, 22)
    msi_attr = bits(27, 24)
    msi_data = bits(63, 32)
    msi_address = bits(115, 66, scale=4)


ATC_INVALIDATE_ALL = 52
"""The size of a CMD_ATC_INV that means the whole address space (4.5.1)."""

LAYOUTS: dict[Opcode, type[Command]] = {
    **dict.fromkeys(
        (
            Opcode.CMD_PREFETCH_CONFIG,
            Opcode.CMD_PREFETCH_ADDR,
            Opcode.CMD_CFGI_STE,
            Opcode.CMD_CFGI_STE_RANGE,
            Opcode.CMD_CFGI_CD,
            Opcode.CMD_CFGI_CD_ALL,
        ),
        StreamCommand,
    ),
    **dict.fromkeys((op for op in Opcode if op.name.startswith("CMD_TLBI")), TlbiCommand),
    Opcode.CMD_ATC_INV: AtcInvalidateCommand,
    Opcode.CMD_PRI_RESP: PriResponseCommand,
    Opcode.CMD_RESUME: ResumeCommand,
    Opcode.CMD_STALL_TERM: ResumeCommand,
    Opcode.CMD_SYNC: SyncCommand,
}
"""The layout that decodes each opcode; a command that is not here has only its opcode to show."""
