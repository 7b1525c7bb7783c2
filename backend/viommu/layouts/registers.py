"""The SMMUv3 register map, non-secure (IHI 0070, chapter 6)."""

from enum import IntEnum, IntFlag

from viommu.layouts.bitfields import Layout, bits

PAGE_1 = 0x1_0000
"""Offset of register page 1 from page 0, bytes (6.1)."""
REGISTER_FRAME_SIZE = 0x2_0000
"""Pages 0 and 1 together, bytes."""
VATOS_PAGE = 0x3_0000
"""Offset of the VATOS page, bytes: where IDR2.BA_VATOS says (6.3.3)."""
VATOS_FRAME_SIZE = 0x4_0000
"""The pages up to that one, bytes."""


class Register(IntEnum):
    """Offset of each register from the base of page 0, bytes (6.3)."""

    IDR0 = 0x00
    IDR1 = 0x04
    IDR2 = 0x08
    IDR3 = 0x0C
    IDR4 = 0x10
    IDR5 = 0x14
    IIDR = 0x18
    AIDR = 0x1C
    CR0 = 0x20
    CR0ACK = 0x24
    CR1 = 0x28
    CR2 = 0x2C
    STATUSR = 0x40
    GBPA = 0x44
    AGBPA = 0x48
    IRQ_CTRL = 0x50
    IRQ_CTRLACK = 0x54
    GERROR = 0x60
    GERRORN = 0x64
    GERROR_IRQ_CFG0 = 0x68
    GERROR_IRQ_CFG1 = 0x70
    GERROR_IRQ_CFG2 = 0x74
    STRTAB_BASE = 0x80
    STRTAB_BASE_CFG = 0x88
    CMDQ_BASE = 0x90
    CMDQ_PROD = 0x98
    CMDQ_CONS = 0x9C
    EVENTQ_BASE = 0xA0
    EVENTQ_IRQ_CFG0 = 0xB0
    EVENTQ_IRQ_CFG1 = 0xB8
    EVENTQ_IRQ_CFG2 = 0xBC
    PRIQ_BASE = 0xC0
    PRIQ_IRQ_CFG0 = 0xD0
    PRIQ_IRQ_CFG1 = 0xD8
    PRIQ_IRQ_CFG2 = 0xDC
    GATOS_CTRL = 0x100
    GATOS_SID = 0x108
    GATOS_ADDR = 0x110
    GATOS_PAR = 0x118
    VATOS_SEL = 0x180
    EVENTQ_PROD = PAGE_1 + 0xA8
    EVENTQ_CONS = PAGE_1 + 0xAC
    PRIQ_PROD = PAGE_1 + 0xC8
    PRIQ_CONS = PAGE_1 + 0xCC
    VATOS_CTRL = VATOS_PAGE + 0xA00
    VATOS_SID = VATOS_PAGE + 0xA08
    VATOS_ADDR = VATOS_PAGE + 0xA10
    VATOS_PAR = VATOS_PAGE + 0xA18


def register_name(offset: int) -> str:
    """The register at `offset`, or the offset where there is none."""
    try:
        return Register(offset).name
    except ValueError:
        return hex(offset)


WIDE_REGISTERS = frozenset(
    {
        Register.GERROR_IRQ_CFG0,
        Register.STRTAB_BASE,
        Register.CMDQ_BASE,
        Register.EVENTQ_BASE,
        Register.EVENTQ_IRQ_CFG0,
        Register.PRIQ_BASE,
        Register.PRIQ_IRQ_CFG0,
        Register.GATOS_SID,
        Register.GATOS_ADDR,
        Register.GATOS_PAR,
        Register.VATOS_SID,
        Register.VATOS_ADDR,
        Register.VATOS_PAR,
    }
)
"""The registers of 64 bits; a 32-bit access reaches either half (6.2)."""


class Idr0(Layout, size=4):
    """SMMU_IDR0 (6.3.1)."""

    s2p = bits(0, kind=bool)
    s1p = bits(1, kind=bool)
    ttf = bits(3, 2)
    cohacc = bits(4, kind=bool)
    btm = bits(5, kind=bool)
    httu = bits(7, 6)
    dormhint = bits(8, kind=bool)
    hyp = bits(9, kind=bool)
    ats = bits(10, kind=bool)
    ns1ats = bits(11, kind=bool)
    asid16 = bits(12, kind=bool)
    msi = bits(13, kind=bool)
    sev = bits(14, kind=bool)
    atos = bits(15, kind=bool)
    pri = bits(16, kind=bool)
    vmw = bits(17, kind=bool)
    vmid16 = bits(18, kind=bool)
    cd2l = bits(19, kind=bool)
    vatos = bits(20, kind=bool)
    ttendian = bits(22, 21)
    atsrecerr = bits(23, kind=bool)
    stall_model = bits(25, 24)
    term_model = bits(26, kind=bool)
    st_level = bits(28, 27)


class Idr1(Layout, size=4):
    """SMMU_IDR1 (6.3.2). Queue sizes are log2 of entries."""

    sidsize = bits(5, 0)
    ssidsize = bits(10, 6)
    priqs = bits(15, 11)
    eventqs = bits(20, 16)
    cmdqs = bits(25, 21)
    attr_perms_ovr = bits(26, kind=bool)
    attr_types_ovr = bits(27, kind=bool)
    rel = bits(28, kind=bool)
    queues_preset = bits(29, kind=bool)
    tables_preset = bits(30, kind=bool)
    ecmdq = bits(31, kind=bool)


class Idr2(Layout, size=4):
    """SMMU_IDR2 (6.3.3). The VATOS page begins at 0x2_0000 + `ba_vatos` times 64 KiB."""

    ba_vatos = bits(9, 0)


class Idr3(Layout, size=4):
    """SMMU_IDR3 (6.3.4)."""

    had = bits(2, kind=bool)
    pbha = bits(3, kind=bool)
    xnx = bits(4, kind=bool)
    pps = bits(5, kind=bool)
    mpam = bits(7, kind=bool)
    fwb = bits(8, kind=bool)
    stt = bits(9, kind=bool)
    ril = bits(10, kind=bool)
    bbml = bits(12, 11)


class Idr5(Layout, size=4):
    """SMMU_IDR5 (6.3.6)."""

    oas = bits(2, 0)
    gran4k = bits(4, kind=bool)
    gran16k = bits(5, kind=bool)
    gran64k = bits(6, kind=bool)
    vax = bits(11, 10)
    stall_max = bits(31, 16)


ADDRESS_SIZES = (32, 36, 40, 42, 44, 48, 52)
"""Address bits by the encoding that IDR5.OAS and CD.IPS share; the value 7 is reserved (6.3.6, 5.4)."""


class Cr0(Layout, size=4):
    """SMMU_CR0 and SMMU_CR0ACK (6.3.9)."""

    smmuen = bits(0, kind=bool)
    priqen = bits(1, kind=bool)
    eventqen = bits(2, kind=bool)
    cmdqen = bits(3, kind=bool)
    atschk = bits(4, kind=bool)
    vmw = bits(8, 6)


class Cr1(Layout, size=4):
    """SMMU_CR1 (6.3.11)."""

    queue_ic = bits(1, 0)
    queue_oc = bits(3, 2)
    queue_sh = bits(5, 4)
    table_ic = bits(7, 6)
    table_oc = bits(9, 8)
    table_sh = bits(11, 10)


class Cr2(Layout, size=4):
    """SMMU_CR2 (6.3.12)."""

    e2h = bits(0, kind=bool)
    recinvsid = bits(1, kind=bool)
    ptm = bits(2, kind=bool)
    rec_cfg_ats = bits(3, kind=bool)


class Gbpa(Layout, size=4):
    """SMMU_GBPA, what happens to a transaction while SMMUEN is 0 (6.3.14)."""

    memattr = bits(3, 0)
    mtcfg = bits(4, kind=bool)
    alloccfg = bits(11, 8)
    shcfg = bits(13, 12)
    privcfg = bits(17, 16)
    instcfg = bits(19, 18)
    abort = bits(20, kind=bool)
    update = bits(31, kind=bool)


class IrqCtrl(Layout, size=4):
    """SMMU_IRQ_CTRL and SMMU_IRQ_CTRLACK (6.3.16)."""

    gerror_irqen = bits(0, kind=bool)
    priq_irqen = bits(1, kind=bool)
    eventq_irqen = bits(2, kind=bool)


class GlobalError(IntFlag):
    """Bits of SMMU_GERROR and SMMU_GERRORN: an error is active where the two differ (6.3.18)."""

    CMDQ_ERR = 1 << 0
    EVENTQ_ABT_ERR = 1 << 2
    PRIQ_ABT_ERR = 1 << 3
    MSI_CMDQ_ABT_ERR = 1 << 4
    MSI_EVENTQ_ABT_ERR = 1 << 5
    MSI_PRIQ_ABT_ERR = 1 << 6
    MSI_GERROR_ABT_ERR = 1 << 7
    SFM_ERR = 1 << 8


class IrqCfg0(Layout, size=8):
    """SMMU_GERROR_IRQ_CFG0, SMMU_EVENTQ_IRQ_CFG0 and SMMU_PRIQ_IRQ_CFG0: 0 is the wired interrupt (6.3.20)."""

    addr = bits(51, 2, scale=4)


class StrtabFormat(IntEnum):
    """SMMU_STRTAB_BASE_CFG.FMT (6.3.25)."""

    LINEAR = 0
    TWO_LEVEL = 1


class StrtabBase(Layout, size=8):
    """SMMU_STRTAB_BASE (6.3.24)."""

    addr = bits(51, 6, scale=64)
    ra = bits(62, kind=bool)


class StrtabBaseCfg(Layout, size=4):
    """SMMU_STRTAB_BASE_CFG (6.3.25)."""

    log2size = bits(5, 0)
    split = bits(10, 6)
    fmt = bits(17, 16, kind=StrtabFormat)


class QueueBase(Layout, size=8):
    """SMMU_CMDQ_BASE, SMMU_EVENTQ_BASE and SMMU_PRIQ_BASE (6.3.26, 6.3.29, 6.3.33)."""

    log2size = bits(4, 0)
    addr = bits(51, 5, scale=32)
    hint = bits(62, kind=bool)


QUEUE_OVERFLOW = 1 << 31
"""EVENTQ_PROD.OVFLG and EVENTQ_CONS.OVACKFLG: an overflow is active where the two differ (7.4); so in PRIQ (8.1)."""


class CommandError(IntEnum):
    """CMDQ_CONS.ERR (7.1)."""

    CERROR_NONE = 0
    CERROR_ILL = 1
    CERROR_ABT = 2
    CERROR_ATC_INV_SYNC = 3


PRIQ_LAST_ONLY = 1 << 31
"""PRIQ_IRQ_CFG2.LO: interrupt when the last request of a group came (6.3.36)."""
COMMAND_ERROR_SHIFT = 24
"""Bit position of CMDQ_CONS.ERR, 7 bits (6.3.28)."""

REGISTER_LAYOUTS: dict[Register, type[Layout]] = {
    Register.IDR0: Idr0,
    Register.IDR1: Idr1,
    Register.IDR2: Idr2,
    Register.IDR3: Idr3,
    Register.IDR5: Idr5,
    Register.CR0: Cr0,
    Register.CR0ACK: Cr0,
    Register.CR1: Cr1,
    Register.CR2: Cr2,
    Register.GBPA: Gbpa,
    Register.IRQ_CTRL: IrqCtrl,
    Register.IRQ_CTRLACK: IrqCtrl,
    Register.GERROR_IRQ_CFG0: IrqCfg0,
    Register.EVENTQ_IRQ_CFG0: IrqCfg0,
    Register.PRIQ_IRQ_CFG0: IrqCfg0,
    Register.STRTAB_BASE: StrtabBase,
    Register.STRTAB_BASE_CFG: StrtabBaseCfg,
    Register.CMDQ_BASE: QueueBase,
    Register.EVENTQ_BASE: QueueBase,
    Register.PRIQ_BASE: QueueBase,
}
"""What the bits of a register are called; GERROR and GERRORN have `GlobalError`, the others are plain numbers."""
