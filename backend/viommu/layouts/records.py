"""Event queue records (IHI 0070, 7.3)."""

from enum import IntEnum

from viommu.layouts.bitfields import Layout, bits


class EventType(IntEnum):
    """Bits 7:0 of an event record (7.3)."""

    F_UUT = 0x01
    C_BAD_STREAMID = 0x02
    F_STE_FETCH = 0x03
    C_BAD_STE = 0x04
    F_BAD_ATS_TREQ = 0x05
    F_STREAM_DISABLED = 0x06
    F_TRANSL_FORBIDDEN = 0x07
    C_BAD_SUBSTREAMID = 0x08
    F_CD_FETCH = 0x09
    C_BAD_CD = 0x0A
    F_WALK_EABT = 0x0B
    F_TRANSLATION = 0x10
    F_ADDR_SIZE = 0x11
    F_ACCESS = 0x12
    F_PERMISSION = 0x13
    F_TLB_CONFLICT = 0x20
    F_CFG_CONFLICT = 0x21
    E_PAGE_REQUEST = 0x24
    F_VMS_FETCH = 0x25


class FaultClass(IntEnum):
    """CLASS: what the SMMU was doing when a translation fault came up (7.3.13)."""

    CD = 0
    TTD = 1
    IN = 2


EVENT_RECORD_SIZE = 32
"""Bytes of one entry of the event queue (7.3)."""


class EventRecord(Layout, size=EVENT_RECORD_SIZE):
    """An event record; which fields an event type uses is in its section, the others are 0.

    `address` is InputAddr. Bits 255:192 are one place with two meanings: `ipa` for faults of stage 2, `fetch_addr`
    for F_STE_FETCH, F_CD_FETCH and F_WALK_EABT.
    """

    event = bits(7, 0, kind=EventType)
    ssv = bits(11, kind=bool)
    substream_id = bits(31, 12)
    stream_id = bits(63, 32)
    stag = bits(79, 64)
    stall = bits(95, kind=bool)
    pnu = bits(97, kind=bool)
    ind = bits(98, kind=bool)
    rnw = bits(99, kind=bool)
    nsipa = bits(100, kind=bool)
    s2 = bits(103, kind=bool)
    fault_class = bits(105, 104, kind=FaultClass)
    tt_rnw = bits(108, kind=bool)
    address = bits(191, 128)
    fetch_addr = bits(243, 195, scale=8)

    @property
    def ipa(self) -> int:
        """The intermediate physical address of a stage 2 fault, in units of a page: bits 51:12."""
        return self.fetch_addr & ~0xFFF


class BadTranslationRequestRecord(Layout, size=EVENT_RECORD_SIZE):
    """F_BAD_ATS_TREQ (7.3.6): `span` counts the smallest translation units that were asked for.

    The four permissions lie where those of E_PAGE_REQUEST do (7.3.19), with PRIV below them: a choice.
    """

    event = bits(7, 0, kind=EventType)
    ssv = bits(11, kind=bool)
    substream_id = bits(31, 12)
    stream_id = bits(63, 32)
    priv = bits(96, kind=bool)
    execute = bits(97, kind=bool)
    write = bits(98, kind=bool)
    read = bits(99, kind=bool)
    span = bits(115, 108)
    address = bits(191, 140, scale=4096)


PAGE_REQUEST_SIZE = 16
"""Bytes of one entry of the PRI queue (8.2)."""


class PageRequestRecord(Layout, size=PAGE_REQUEST_SIZE):
    """A page request in the PRI queue (chapter 8)."""

    stream_id = bits(31, 0)
    substream_id = bits(51, 32)
    privileged = bits(58, kind=bool)
    execute = bits(59, kind=bool)
    read = bits(60, kind=bool)
    write = bits(61, kind=bool)
    last = bits(62, kind=bool)
    ssv = bits(63, kind=bool)
    prg_index = bits(72, 64)
    address = bits(127, 76, scale=4096)
