"""Stream tables and context descriptors in guest RAM (IHI 0070, chapter 5)."""

from enum import IntEnum

from viommu.layouts.bitfields import Layout, bits


class StreamTableLevel1(Layout, size=8):
    """Level 1 Stream Table Descriptor (5.1). `span` 0 is invalid, else the table at `l2_ptr` has 2^(span-1) STEs."""

    span = bits(4, 0)
    l2_ptr = bits(51, 6, scale=64)


class SteConfig(IntEnum):
    """STE.Config (5.2)."""

    ABORT = 0
    BYPASS = 4
    S1_TRANSLATE = 5
    S2_TRANSLATE = 6
    NESTED = 7


class S1Format(IntEnum):
    """STE.S1Fmt: how the CD table is laid out when S1CDMax is not 0 (5.2)."""

    LINEAR = 0
    TWO_LEVEL_4K = 1
    TWO_LEVEL_64K = 2


class S1Default(IntEnum):
    """STE.S1DSS: what a transaction without a SubstreamID does when there are substreams (5.2)."""

    TERMINATE = 0
    BYPASS = 1
    SUBSTREAM_0 = 2


class StreamWorld(IntEnum):
    """STE.STRW: the exception level whose regime stage 1 belongs to (5.2)."""

    NS_EL1 = 0
    EL2 = 2


class Eats(IntEnum):
    """STE.EATS; 3 is for device permission tables (5.2)."""

    DISABLED = 0
    FULL = 1
    SPLIT_STAGE = 2


class StreamTableEntry(Layout, size=64):
    """Stream Table Entry (5.2)."""

    valid = bits(0, kind=bool)
    config = bits(3, 1, kind=SteConfig)
    s1_format = bits(5, 4, kind=S1Format)
    s1_context_ptr = bits(51, 6, scale=64)
    s1_cd_max = bits(63, 59)
    s1_dss = bits(65, 64, kind=S1Default)
    s1_cir = bits(67, 66)
    s1_cor = bits(69, 68)
    s1_csh = bits(71, 70)
    dre = bits(76, kind=bool)
    cont = bits(80, 77)
    dcp = bits(81, kind=bool)
    ppar = bits(82, kind=bool)
    mev = bits(83, kind=bool)
    s2fwb = bits(89, kind=bool)
    s1_mpam = bits(90, kind=bool)
    s1_stalld = bits(91, kind=bool)
    eats = bits(93, 92, kind=Eats)
    strw = bits(95, 94, kind=StreamWorld)
    mem_attr = bits(99, 96)
    mtcfg = bits(100, kind=bool)
    alloccfg = bits(104, 101)
    shcfg = bits(109, 108)
    nscfg = bits(111, 110)
    privcfg = bits(113, 112)
    instcfg = bits(115, 114)
    s2_vmid = bits(143, 128)
    s2_t0sz = bits(165, 160)
    s2_sl0 = bits(167, 166)
    s2_ir0 = bits(169, 168)
    s2_or0 = bits(171, 170)
    s2_sh0 = bits(173, 172)
    s2_tg = bits(175, 174)
    s2_ps = bits(178, 176)
    s2_aa64 = bits(179, kind=bool)
    s2_endi = bits(180, kind=bool)
    s2_affd = bits(181, kind=bool)
    s2_ptw = bits(182, kind=bool)
    s2_hd = bits(183, kind=bool)
    s2_ha = bits(184, kind=bool)
    s2_s = bits(185, kind=bool)
    s2_r = bits(186, kind=bool)
    s2_ttb = bits(243, 196, scale=16)


CD_LEAF_SPLIT = {S1Format.TWO_LEVEL_4K: 6, S1Format.TWO_LEVEL_64K: 10}
"""log2 of the CDs in one leaf table, by format (5.2, S1Fmt)."""


class ContextTableLevel1(Layout, size=8):
    """Level 1 Context Descriptor table entry (5.3)."""

    valid = bits(0, kind=bool)
    l2_ptr = bits(51, 12, scale=4096)


class ContextDescriptor(Layout, size=64):
    """Context Descriptor (5.4)."""

    t0sz = bits(5, 0)
    tg0 = bits(7, 6)
    ir0 = bits(9, 8)
    or0 = bits(11, 10)
    sh0 = bits(13, 12)
    epd0 = bits(14, kind=bool)
    endi = bits(15, kind=bool)
    t1sz = bits(21, 16)
    tg1 = bits(23, 22)
    ir1 = bits(25, 24)
    or1 = bits(27, 26)
    sh1 = bits(29, 28)
    epd1 = bits(30, kind=bool)
    valid = bits(31, kind=bool)
    ips = bits(34, 32)
    affd = bits(35, kind=bool)
    wxn = bits(36, kind=bool)
    uwxn = bits(37, kind=bool)
    tbi0 = bits(38, kind=bool)
    tbi1 = bits(39, kind=bool)
    pan = bits(40, kind=bool)
    aa64 = bits(41, kind=bool)
    hd = bits(42, kind=bool)
    ha = bits(43, kind=bool)
    s = bits(44, kind=bool)
    r = bits(45, kind=bool)
    a = bits(46, kind=bool)
    aset = bits(47, kind=bool)
    asid = bits(63, 48)
    nscfg0 = bits(64, kind=bool)
    had0 = bits(65, kind=bool)
    ttb0 = bits(115, 68, scale=16)
    nscfg1 = bits(128, kind=bool)
    had1 = bits(129, kind=bool)
    ttb1 = bits(179, 132, scale=16)
    mair0 = bits(223, 192)
    mair1 = bits(255, 224)
    amair0 = bits(287, 256)
    amair1 = bits(319, 288)


TG0_GRANULES = {0: 12, 1: 16, 2: 14}
"""log2 of the granule by CD.TG0; 3 is reserved (5.4)."""
TG1_GRANULES = {1: 14, 2: 12, 3: 16}
"""log2 of the granule by CD.TG1; 0 is reserved (5.4)."""
S2_GRANULES = {0: 12, 1: 16, 2: 14}
"""log2 of the granule by STE.S2TG; 3 is reserved (5.2)."""
