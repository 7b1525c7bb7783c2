"""Bit positions against others: Linux's arm-smmu-v3.h, QEMU's smmuv3-internal.h, IHI 0070 where neither has a field.

The numbers are facts. A field that nobody outside vouches for is in no table, and fails.
"""

from enum import IntEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommu.layouts import atos, commands, page_tables, records, registers, tables
from viommu.layouts.bitfields import Layout, LayoutError, bits

# layout: field: (64-bit word, or 32-bit register: 0; high; low)
Places = dict[str, tuple[int, int, int]]

LINUX: dict[type[Layout], Places] = {
    registers.Idr0: {
        "st_level": (0, 28, 27),
        "stall_model": (0, 25, 24),
        "ttendian": (0, 22, 21),
        "cd2l": (0, 19, 19),
        "vmid16": (0, 18, 18),
        "pri": (0, 16, 16),
        "sev": (0, 14, 14),
        "msi": (0, 13, 13),
        "asid16": (0, 12, 12),
        "ats": (0, 10, 10),
        "hyp": (0, 9, 9),
        "httu": (0, 7, 6),
        "cohacc": (0, 4, 4),
        "ttf": (0, 3, 2),
        "s1p": (0, 1, 1),
        "s2p": (0, 0, 0),
    },
    registers.Idr1: {
        "tables_preset": (0, 30, 30),
        "queues_preset": (0, 29, 29),
        "rel": (0, 28, 28),
        "attr_types_ovr": (0, 27, 27),
        "cmdqs": (0, 25, 21),
        "eventqs": (0, 20, 16),
        "priqs": (0, 15, 11),
        "ssidsize": (0, 10, 6),
        "sidsize": (0, 5, 0),
    },
    registers.Idr3: {"fwb": (0, 8, 8), "ril": (0, 10, 10)},
    registers.Idr5: {
        "stall_max": (0, 31, 16),
        "gran64k": (0, 6, 6),
        "gran16k": (0, 5, 5),
        "gran4k": (0, 4, 4),
        "oas": (0, 2, 0),
        "vax": (0, 11, 10),
    },
    registers.Cr0: {
        "atschk": (0, 4, 4),
        "cmdqen": (0, 3, 3),
        "eventqen": (0, 2, 2),
        "priqen": (0, 1, 1),
        "smmuen": (0, 0, 0),
    },
    registers.Cr1: {
        "table_sh": (0, 11, 10),
        "table_oc": (0, 9, 8),
        "table_ic": (0, 7, 6),
        "queue_sh": (0, 5, 4),
        "queue_oc": (0, 3, 2),
        "queue_ic": (0, 1, 0),
    },
    registers.Cr2: {"ptm": (0, 2, 2), "recinvsid": (0, 1, 1), "e2h": (0, 0, 0)},
    registers.Gbpa: {"update": (0, 31, 31), "abort": (0, 20, 20)},
    registers.IrqCtrl: {
        "eventq_irqen": (0, 2, 2),
        "priq_irqen": (0, 1, 1),
        "gerror_irqen": (0, 0, 0),
    },
    registers.IrqCfg0: {"addr": (0, 51, 2)},
    registers.StrtabBase: {"ra": (0, 62, 62), "addr": (0, 51, 6)},
    registers.StrtabBaseCfg: {"fmt": (0, 17, 16), "split": (0, 10, 6), "log2size": (0, 5, 0)},
    registers.QueueBase: {"hint": (0, 62, 62), "addr": (0, 51, 5), "log2size": (0, 4, 0)},
    tables.StreamTableLevel1: {"span": (0, 4, 0), "l2_ptr": (0, 51, 6)},
    tables.StreamTableEntry: {
        "valid": (0, 0, 0),
        "config": (0, 3, 1),
        "s1_format": (0, 5, 4),
        "s1_context_ptr": (0, 51, 6),
        "s1_cd_max": (0, 63, 59),
        "s1_dss": (1, 1, 0),
        "s1_cir": (1, 3, 2),
        "s1_cor": (1, 5, 4),
        "s1_csh": (1, 7, 6),
        "s2fwb": (1, 25, 25),
        "s1_stalld": (1, 27, 27),
        "eats": (1, 29, 28),
        "strw": (1, 31, 30),
        "shcfg": (1, 45, 44),
        "s2_vmid": (2, 15, 0),
        "s2_t0sz": (2, 37, 32),
        "s2_sl0": (2, 39, 38),
        "s2_ir0": (2, 41, 40),
        "s2_or0": (2, 43, 42),
        "s2_sh0": (2, 45, 44),
        "s2_tg": (2, 47, 46),
        "s2_ps": (2, 50, 48),
        "s2_aa64": (2, 51, 51),
        "s2_endi": (2, 52, 52),
        "s2_ptw": (2, 54, 54),
        "s2_s": (2, 57, 57),
        "s2_r": (2, 58, 58),
        "s2_ttb": (3, 51, 4),
    },
    tables.ContextTableLevel1: {"valid": (0, 0, 0), "l2_ptr": (0, 51, 12)},
    tables.ContextDescriptor: {
        "t0sz": (0, 5, 0),
        "tg0": (0, 7, 6),
        "ir0": (0, 9, 8),
        "or0": (0, 11, 10),
        "sh0": (0, 13, 12),
        "epd0": (0, 14, 14),
        "epd1": (0, 30, 30),
        "endi": (0, 15, 15),
        "valid": (0, 31, 31),
        "ips": (0, 34, 32),
        "tbi0": (0, 38, 38),
        "ha": (0, 43, 43),
        "hd": (0, 42, 42),
        "aa64": (0, 41, 41),
        "s": (0, 44, 44),
        "r": (0, 45, 45),
        "a": (0, 46, 46),
        "aset": (0, 47, 47),
        "asid": (0, 63, 48),
        "ttb0": (1, 51, 4),
    },
    commands.Command: {"opcode": (0, 7, 0)},
    commands.StreamCommand: {
        "opcode": (0, 7, 0),
        "ssv": (0, 11, 11),
        "substream_id": (0, 31, 12),
        "stream_id": (0, 63, 32),
        "leaf_or_range": (1, 4, 0),
    },
    commands.TlbiCommand: {
        "opcode": (0, 7, 0),
        "num": (0, 16, 12),
        "scale": (0, 24, 20),
        "vmid": (0, 47, 32),
        "asid": (0, 63, 48),
        "leaf": (1, 0, 0),
        "ttl": (1, 9, 8),
        "tg": (1, 11, 10),
        "address": (1, 63, 12),
    },
    commands.ResumeCommand: {"opcode": (0, 7, 0), "stream_id": (0, 63, 32), "stag": (1, 15, 0)},
    commands.SyncCommand: {
        "opcode": (0, 7, 0),
        "cs": (0, 13, 12),
        "msh": (0, 23, 22),
        "msi_attr": (0, 27, 24),
        "msi_data": (0, 63, 32),
        "msi_address": (1, 51, 2),
    },
    commands.AtcInvalidateCommand: {
        "opcode": (0, 7, 0),
        "global_": (0, 9, 9),
        "ssv": (0, 11, 11),
        "substream_id": (0, 31, 12),
        "stream_id": (0, 63, 32),
        "span_log2": (1, 5, 0),
        "address": (1, 63, 12),
    },
    commands.PriResponseCommand: {
        "opcode": (0, 7, 0),
        "ssv": (0, 11, 11),
        "substream_id": (0, 31, 12),
        "stream_id": (0, 63, 32),
        "prg_index": (1, 8, 0),
        "response": (1, 13, 12),
    },
    records.EventRecord: {
        "event": (0, 7, 0),
        "ssv": (0, 11, 11),
        "substream_id": (0, 31, 12),
        "stream_id": (0, 63, 32),
        "stag": (1, 15, 0),
        "stall": (1, 31, 31),
        "pnu": (1, 33, 33),
        "ind": (1, 34, 34),
        "rnw": (1, 35, 35),
        "s2": (1, 39, 39),
        "fault_class": (1, 41, 40),
        "tt_rnw": (1, 44, 44),
        "address": (2, 63, 0),
    },
    records.PageRequestRecord: {
        "stream_id": (0, 31, 0),
        "substream_id": (0, 51, 32),
        "privileged": (0, 58, 58),
        "execute": (0, 59, 59),
        "read": (0, 60, 60),
        "write": (0, 61, 61),
        "last": (0, 62, 62),
        "ssv": (0, 63, 63),
        "prg_index": (1, 8, 0),
        "address": (1, 63, 12),
    },
}

QEMU: dict[type[Layout], Places] = {
    registers.Idr0: {
        "btm": (0, 5, 5),
        "dormhint": (0, 8, 8),
        "ns1ats": (0, 11, 11),
        "atos": (0, 15, 15),
        "vmw": (0, 17, 17),
        "vatos": (0, 20, 20),
        "term_model": (0, 26, 26),
    },
    registers.Idr1: {"attr_perms_ovr": (0, 26, 26), "ecmdq": (0, 31, 31)},
    registers.Idr3: {
        "had": (0, 2, 2),
        "pbha": (0, 3, 3),
        "xnx": (0, 4, 4),
        "pps": (0, 5, 5),
        "mpam": (0, 7, 7),
        "stt": (0, 9, 9),
        "bbml": (0, 12, 11),
    },
    tables.StreamTableEntry: {
        "s2_affd": (2, 53, 53),
        "s2_hd": (2, 55, 55),
        "s2_ha": (2, 56, 56),
    },
    tables.ContextDescriptor: {
        "t1sz": (0, 21, 16),
        "tg1": (0, 23, 22),
        "affd": (0, 35, 35),
        "tbi1": (0, 39, 39),
        "had0": (1, 1, 1),
        "had1": (2, 1, 1),
        "ttb1": (2, 51, 4),
    },
    commands.StreamCommand: {"ssec": (0, 10, 10)},
    commands.ResumeCommand: {"ssec": (0, 10, 10)},
}

# IHI 0070, the sections that define them.
TEXT: dict[type[Layout], Places] = {
    registers.Idr0: {"atsrecerr": (0, 23, 23)},
    registers.Idr2: {"ba_vatos": (0, 9, 0)},
    registers.Cr0: {"vmw": (0, 8, 6)},
    registers.Cr2: {"rec_cfg_ats": (0, 3, 3)},
    registers.Gbpa: {
        "memattr": (0, 3, 0),
        "mtcfg": (0, 4, 4),
        "alloccfg": (0, 11, 8),
        "shcfg": (0, 13, 12),
        "privcfg": (0, 17, 16),
        "instcfg": (0, 19, 18),
    },
    tables.StreamTableEntry: {
        "dre": (1, 12, 12),
        "cont": (1, 16, 13),
        "dcp": (1, 17, 17),
        "ppar": (1, 18, 18),
        "mev": (1, 19, 19),
        "s1_mpam": (1, 26, 26),
        "mem_attr": (1, 35, 32),
        "mtcfg": (1, 36, 36),
        "alloccfg": (1, 40, 37),
        "nscfg": (1, 47, 46),
        "privcfg": (1, 49, 48),
        "instcfg": (1, 51, 50),
    },
    tables.ContextDescriptor: {
        "ir1": (0, 25, 24),
        "or1": (0, 27, 26),
        "sh1": (0, 29, 28),
        "wxn": (0, 36, 36),
        "uwxn": (0, 37, 37),
        "pan": (0, 40, 40),
        "nscfg0": (1, 0, 0),
        "nscfg1": (2, 0, 0),
        "mair0": (3, 31, 0),
        "mair1": (3, 63, 32),
        "amair0": (4, 31, 0),
        "amair1": (4, 63, 32),
    },
    # 4.6.1: Ac and Ab; Linux has them as one field of two bits, bits 13:12.
    commands.ResumeCommand: {"retry": (0, 12, 12), "abort": (0, 13, 13)},
    records.EventRecord: {"nsipa": (1, 36, 36), "fetch_addr": (3, 51, 3)},
    # 7.3.6, and 7.3.19 for what has no number there
    records.BadTranslationRequestRecord: {
        "event": (0, 7, 0),
        "ssv": (0, 11, 11),
        "substream_id": (0, 31, 12),
        "stream_id": (0, 63, 32),
        "priv": (1, 32, 32),
        "execute": (1, 33, 33),
        "write": (1, 34, 34),
        "read": (1, 35, 35),
        "span": (1, 51, 44),
        "address": (2, 63, 12),
    },
    # 6.3.38 to 6.3.40
    atos.AtosSid: {
        "stream_id": (0, 31, 0),
        "substream_id": (0, 51, 32),
        "ssid_valid": (0, 52, 52),
    },
    atos.AtosAddr: {
        "httui": (0, 6, 6),
        "ind": (0, 7, 7),
        "rnw": (0, 8, 8),
        "pnu": (0, 9, 9),
        "type": (0, 11, 10),
        "address": (0, 63, 12),
    },
    atos.AtosResult: {
        "fault": (0, 0, 0),
        "sh": (0, 9, 8),
        "size_flag": (0, 11, 11),
        "address": (0, 55, 12),
        "attr": (0, 63, 56),
    },
    atos.AtosFault: {
        "fault": (0, 0, 0),
        "reason": (0, 2, 1),
        "fault_code": (0, 11, 4),
        "fault_address": (0, 55, 12),
    },
    # DDI 0487, D8.3
    page_tables.TableDescriptor: {
        "valid": (0, 0, 0),
        "table": (0, 1, 1),
        "next_table": (0, 47, 12),
        "pxn_table": (0, 59, 59),
        "xn_table": (0, 60, 60),
        "ap_table": (0, 62, 61),
        "ns_table": (0, 63, 63),
    },
    page_tables.LeafDescriptor: {
        "valid": (0, 0, 0),
        "page": (0, 1, 1),
        "attr_index": (0, 4, 2),
        "ns": (0, 5, 5),
        "ap_user": (0, 6, 6),
        "ap_read_only": (0, 7, 7),
        "sh": (0, 9, 8),
        "af": (0, 10, 10),
        "ng": (0, 11, 11),
        "address": (0, 47, 12),
        "dbm": (0, 51, 51),
        "contiguous": (0, 52, 52),
        "pxn": (0, 53, 53),
        "xn": (0, 54, 54),
    },
    page_tables.Stage2LeafDescriptor: {
        "valid": (0, 0, 0),
        "page": (0, 1, 1),
        "mem_attr": (0, 5, 2),
        "s2ap_read": (0, 6, 6),
        "s2ap_write": (0, 7, 7),
        "sh": (0, 9, 8),
        "af": (0, 10, 10),
        "address": (0, 47, 12),
        "dbm": (0, 51, 51),
        "contiguous": (0, 52, 52),
        "xn": (0, 54, 53),
    },
}

LAYOUTS = [
    layout
    for module in (registers, tables, commands, records, page_tables, atos)
    for layout in vars(module).values()
    if isinstance(layout, type) and issubclass(layout, Layout) and layout is not Layout
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_field_is_where_others_have_it(layout: type[Layout]) -> None:
    expected = {
        name: (word * 64 + high, word * 64 + low)
        for source in (LINUX, QEMU, TEXT)
        for name, (word, high, low) in source.get(layout, {}).items()
    }
    assert {name: (f.high, f.low) for name, f in layout.fields.items()} == expected


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (tables.StreamTableLevel1, 8),
        (tables.StreamTableEntry, 64),
        (tables.ContextTableLevel1, 8),
        (tables.ContextDescriptor, 64),
        (commands.Command, 16),
        (records.EventRecord, 32),
        (registers.QueueBase, 8),
        (registers.Cr0, 4),
    ],
)
def test_sizes(layout: type[Layout], size: int) -> None:
    assert layout.size == size


def test_register_offsets() -> None:
    expected = {
        "IDR0": 0x0, "IDR1": 0x4, "IDR2": 0x8, "IDR3": 0xC, "IDR4": 0x10, "IDR5": 0x14,
        "IIDR": 0x18, "AIDR": 0x1C, "CR0": 0x20, "CR0ACK": 0x24, "CR1": 0x28, "CR2": 0x2C,
        "STATUSR": 0x40, "GBPA": 0x44, "AGBPA": 0x48, "IRQ_CTRL": 0x50, "IRQ_CTRLACK": 0x54,
        "GERROR": 0x60, "GERRORN": 0x64, "GERROR_IRQ_CFG0": 0x68, "GERROR_IRQ_CFG1": 0x70,
        "GERROR_IRQ_CFG2": 0x74, "STRTAB_BASE": 0x80, "STRTAB_BASE_CFG": 0x88,
        "CMDQ_BASE": 0x90, "CMDQ_PROD": 0x98, "CMDQ_CONS": 0x9C, "EVENTQ_BASE": 0xA0,
        "EVENTQ_PROD": 0x1_00A8, "EVENTQ_CONS": 0x1_00AC, "EVENTQ_IRQ_CFG0": 0xB0,
        "EVENTQ_IRQ_CFG1": 0xB8, "EVENTQ_IRQ_CFG2": 0xBC, "PRIQ_BASE": 0xC0,
        "PRIQ_IRQ_CFG0": 0xD0, "PRIQ_IRQ_CFG1": 0xD8, "PRIQ_IRQ_CFG2": 0xDC,
        "GATOS_CTRL": 0x100, "GATOS_SID": 0x108, "GATOS_ADDR": 0x110, "GATOS_PAR": 0x118,
        "PRIQ_PROD": 0x1_00C8, "PRIQ_CONS": 0x1_00CC, "VATOS_SEL": 0x180, "VATOS_CTRL": 0x3_0A00,
        "VATOS_SID": 0x3_0A08, "VATOS_ADDR": 0x3_0A10, "VATOS_PAR": 0x3_0A18,
    }  # fmt: skip
    assert {register.name: int(register) for register in registers.Register} == expected


def values(kind: type[IntEnum]) -> dict[str, int]:
    return {member.name: int(member) for member in kind}


def test_opcodes() -> None:
    expected = {
        "PREFETCH_CONFIG": 0x01, "PREFETCH_ADDR": 0x02, "CFGI_STE": 0x03, "CFGI_STE_RANGE": 0x04,
        "CFGI_CD": 0x05, "CFGI_CD_ALL": 0x06, "CFGI_VMS_PIDM": 0x07, "TLBI_NH_ALL": 0x10,
        "TLBI_NH_ASID": 0x11, "TLBI_NH_VA": 0x12, "TLBI_NH_VAA": 0x13, "TLBI_EL2_ALL": 0x20,
        "TLBI_EL2_ASID": 0x21, "TLBI_EL2_VA": 0x22, "TLBI_EL2_VAA": 0x23,
        "TLBI_S12_VMALL": 0x28, "TLBI_S2_IPA": 0x2A, "TLBI_NSNH_ALL": 0x30, "ATC_INV": 0x40,
        "PRI_RESP": 0x41, "RESUME": 0x44, "STALL_TERM": 0x45, "SYNC": 0x46,
    }  # fmt: skip
    assert values(commands.Opcode) == {f"CMD_{name}": code for name, code in expected.items()}
    assert commands.CFGI_ALL_RANGE == 31


def test_event_numbers() -> None:
    assert values(records.EventType) == {
        "F_UUT": 0x01, "C_BAD_STREAMID": 0x02, "F_STE_FETCH": 0x03, "C_BAD_STE": 0x04,
        "F_BAD_ATS_TREQ": 0x05, "F_STREAM_DISABLED": 0x06, "F_TRANSL_FORBIDDEN": 0x07,
        "C_BAD_SUBSTREAMID": 0x08, "F_CD_FETCH": 0x09, "C_BAD_CD": 0x0A, "F_WALK_EABT": 0x0B,
        "F_TRANSLATION": 0x10, "F_ADDR_SIZE": 0x11, "F_ACCESS": 0x12, "F_PERMISSION": 0x13,
        "F_TLB_CONFLICT": 0x20, "F_CFG_CONFLICT": 0x21, "E_PAGE_REQUEST": 0x24,
        "F_VMS_FETCH": 0x25,
    }  # fmt: skip


def test_other_encodings() -> None:
    assert values(tables.SteConfig) == {
        "ABORT": 0, "BYPASS": 4, "S1_TRANSLATE": 5, "S2_TRANSLATE": 6, "NESTED": 7
    }  # fmt: skip
    assert values(tables.S1Format) == {"LINEAR": 0, "TWO_LEVEL_4K": 1, "TWO_LEVEL_64K": 2}
    assert values(tables.S1Default) == {"TERMINATE": 0, "BYPASS": 1, "SUBSTREAM_0": 2}
    assert values(tables.Eats) == {"DISABLED": 0, "FULL": 1, "SPLIT_STAGE": 2}
    assert values(commands.PriResponse) == {
        "RESPONSE_FAILURE": 0, "INVALID_REQUEST": 1, "SUCCESS": 2
    }  # fmt: skip
    assert commands.ATC_INVALIDATE_ALL == 52
    assert values(tables.StreamWorld) == {"NS_EL1": 0, "EL2": 2}
    assert values(registers.StrtabFormat) == {"LINEAR": 0, "TWO_LEVEL": 1}
    assert values(commands.CompletionSignal) == {"SIG_NONE": 0, "SIG_IRQ": 1, "SIG_SEV": 2}
    assert list(values(registers.CommandError).values()) == [0, 1, 2, 3]
    assert values(records.FaultClass) == {"CD": 0, "TTD": 1, "IN": 2}
    assert {error.name: int(error) for error in registers.GlobalError} == {
        "CMDQ_ERR": 1, "EVENTQ_ABT_ERR": 4, "PRIQ_ABT_ERR": 8, "MSI_CMDQ_ABT_ERR": 16,
        "MSI_EVENTQ_ABT_ERR": 32, "MSI_PRIQ_ABT_ERR": 64, "MSI_GERROR_ABT_ERR": 128,
        "SFM_ERR": 256,
    }  # fmt: skip
    assert registers.ADDRESS_SIZES == (32, 36, 40, 42, 44, 48, 52)
    assert (tables.TG0_GRANULES, tables.TG1_GRANULES) == (
        {0: 12, 1: 16, 2: 14},
        {1: 14, 2: 12, 3: 16},
    )
    assert (registers.QUEUE_OVERFLOW, registers.COMMAND_ERROR_SHIFT) == (1 << 31, 24)
    assert {int(k): v for k, v in tables.CD_LEAF_SPLIT.items()} == {1: 6, 2: 10}


# The idiom


class Colour(IntEnum):
    RED = 1
    BLUE = 2


class Sample(Layout, size=16):
    flag = bits(0, kind=bool)
    colour = bits(3, 1, kind=Colour)
    number = bits(11, 4)
    pointer = bits(127, 76, scale=4096)


def test_fields_are_read_and_written() -> None:
    sample = Sample(flag=True, colour=Colour.BLUE, number=0xAB, pointer=0x1234_5000)
    assert sample.value == 1 | 2 << 1 | 0xAB << 4 | 0x1234_5 << 76
    assert (sample.flag, sample.colour, sample.number) == (True, Colour.BLUE, 0xAB)
    sample.number = 0
    sample.flag = False
    assert sample.qwords() == [4, 0x1234_5000]
    assert sample.to_bytes() == (4 | 0x1234_5000 << 64).to_bytes(16, "little")
    assert int(sample) == sample.value


@given(st.integers(0, (1 << 128) - 1))
def test_any_value_decodes_and_encodes(value: int) -> None:
    sample = Sample(value)
    assert Sample.from_bytes(sample.to_bytes() + b"more") == sample
    assert Sample(**{n: getattr(sample, n) for n in Sample.fields}).value & ~value == 0
    assert hex(value) in str(sample)


def test_unnamed_values_of_an_enum_stay_numbers() -> None:
    assert Sample(7 << 1).colour == 7
    assert "colour=0x7" in str(Sample(7 << 1))
    assert str(Sample(3)) == "0x3 (flag colour=RED)"


@pytest.mark.parametrize(
    ("field", "value"), [("number", 256), ("number", -1), ("pointer", 1), ("colour", 8)]
)
def test_what_does_not_fit_is_refused(field: str, value: int) -> None:
    with pytest.raises(LayoutError, match=field):
        setattr(Sample(), field, value)


def test_wrong_declarations_are_refused() -> None:
    with pytest.raises(LayoutError, match="outside"):
        type("Small", (Layout,), {"field": bits(32)}, size=4)
    with pytest.raises(LayoutError, match="overlaps"):
        type("Double", (Layout,), {"one": bits(4, 2), "two": bits(2, 0)}, size=4)
    with pytest.raises(LayoutError, match="not a field"):
        bits(1, 2)
    with pytest.raises(LayoutError, match="no field"):
        Sample(other=1)
    for value in (-1, 1 << 128):
        with pytest.raises(LayoutError, match="fit"):
            Sample(value)


def test_equality_is_of_the_same_layout() -> None:
    assert Sample(3) == Sample(3)
    assert hash(Sample(3)) == hash(Sample(3))
    assert Sample(3) != Sample(4)
    assert registers.Cr0(3) != registers.Cr1(3)
