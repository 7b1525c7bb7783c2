"""The frames of the test engine in BAR0, after the register map of Arm's SMMUv3TestEngine.

A pair of 64 KiB pages holds 128-byte frames: frame N of the first page (user) belongs to frame N of the second
(privileged). `viommu.endpoints.test_engine` says what the engine does with them.
"""

from enum import IntEnum
from typing import Any

from viommu.layouts.bitfields import Bits, Layout, bits

FRAME_SIZE = 128
"""One frame, bytes."""
FRAME_COUNT = 64
"""How many frames are implemented; a page has room for 512."""
PRIVILEGED_PAGE = 0x1_0000
"""Offset of the privileged page from the user page, bytes."""
BAR_SIZE = 0x2_0000
"""Both pages, bytes."""
NO_SUBSTREAM_ID = 0xFFFF_FFFF
"""`substreamid` of a frame whose transactions carry no SubstreamID."""


class EngineCommand(IntEnum):
    """What is written to and read from `cmd`."""

    NO_FRAME = 0
    """Read where there is no frame; when written, the same as `HALTED`."""
    HALTED = 1
    MEMCPY = 2
    """Copy [begin, end_incl] to udata0."""
    RAND48 = 3
    """Fill [begin, end_incl] with the pattern of `seed`."""
    SUM64 = 4
    """Add up [begin, end_incl] as 64-bit words into udata1."""
    FRAME_MISCONFIGURED = 0xFFFF_FFFE
    ERROR = 0xFFFF_FFFF
    """A transaction was aborted; its address is in udata2."""


class UserFrame(Layout, size=FRAME_SIZE):
    """The half of a frame that says what to do. `offset_of` gives the place of a field in it."""

    cmd = bits(31, 0, kind=EngineCommand)
    msi_aborted = bits(32, kind=bool)
    rate = bits(63, 48)
    count_of_transactions_launched = bits(95, 64)
    count_of_transactions_returned = bits(127, 96)
    msiaddress = bits(191, 128)
    msidata = bits(223, 192)
    msiattr = bits(255, 224)
    source_memory_type = bits(263, 256)
    source_privileged = bits(264, kind=bool)
    source_non_secure = bits(265, kind=bool)
    source_instruction = bits(266, kind=bool)
    source_transient = bits(269, 268)
    source_shareability = bits(271, 270)
    destination_memory_type = bits(279, 272)
    destination_privileged = bits(280, kind=bool)
    destination_non_secure = bits(281, kind=bool)
    destination_instruction = bits(282, kind=bool)
    destination_transient = bits(285, 284)
    destination_shareability = bits(287, 286)
    seed = bits(319, 288)
    begin = bits(383, 320)
    end_incl = bits(447, 384)
    stride = bits(511, 448)
    udata0 = bits(575, 512)
    udata1 = bits(639, 576)
    udata2 = bits(703, 640)
    udata3 = bits(767, 704)
    udata4 = bits(831, 768)
    udata5 = bits(895, 832)
    udata6 = bits(959, 896)
    udata7 = bits(1023, 960)


class PrivilegedFrame(Layout, size=FRAME_SIZE):
    """The half of a frame that says as whom to do it. Under PCI `streamid` is ignored."""

    ssd_ns = bits(0, kind=bool)
    ats_enable = bits(8, kind=bool)
    pri_enable = bits(9, kind=bool)
    downstream_port_index = bits(63, 32)
    streamid = bits(95, 64)
    substreamid = bits(127, 96)


def offset_of(field: Bits[Any]) -> int:
    """Where the first byte of a field lies in its frame, bytes: `offset_of(UserFrame.begin) == 0x28`."""
    return field.low // 8


def user_frame(index: int) -> int:
    """Offset of user frame `index` in BAR0, bytes."""
    return index * FRAME_SIZE


def privileged_frame(index: int) -> int:
    """Offset of privileged frame `index` in BAR0, bytes."""
    return PRIVILEGED_PAGE + index * FRAME_SIZE
