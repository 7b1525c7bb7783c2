"""The registers of address translation operations (IHI 0070, 6.3.37 to 6.3.40, 6.3.99 to 6.3.102, chapter 9)."""

from enum import IntEnum

from viommu.layouts.bitfields import Layout, bits


class AtosType(IntEnum):
    """ATOS_ADDR.TYPE: which stages are asked for; 0 is reserved (9.1.3)."""

    STAGE_1 = 1
    STAGE_2 = 2
    BOTH = 3


class AtosSid(Layout, size=8):
    """SMMU_GATOS_SID and SMMU_VATOS_SID (6.3.38, 6.3.100)."""

    stream_id = bits(31, 0)
    substream_id = bits(51, 32)
    ssid_valid = bits(52, kind=bool)


class AtosAddr(Layout, size=8):
    """SMMU_GATOS_ADDR and SMMU_VATOS_ADDR (6.3.39, 6.3.101)."""

    httui = bits(6, kind=bool)
    ind = bits(7, kind=bool)
    rnw = bits(8, kind=bool)
    pnu = bits(9, kind=bool)
    type = bits(11, 10, kind=AtosType)
    address = bits(63, 12, scale=4096)


class AtosResult(Layout, size=8):
    """SMMU_GATOS_PAR and SMMU_VATOS_PAR when FAULT is 0 (6.3.40, 6.3.102)."""

    fault = bits(0, kind=bool)
    sh = bits(9, 8)
    size_flag = bits(11, kind=bool)
    address = bits(55, 12, scale=4096)
    attr = bits(63, 56)


class AtosFault(Layout, size=8):
    """The same when FAULT is 1."""

    fault = bits(0, kind=bool)
    reason = bits(2, 1)
    fault_code = bits(11, 4)
    fault_address = bits(55, 12, scale=4096)


INV_REQ, INV_STAGE, INTERNAL_ERR = 0xFF, 0xFE, 0xFD
"""ATOS_PAR.FAULTCODE, besides the numbers of events (9.1.5)."""
