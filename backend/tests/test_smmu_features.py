"""What the ID registers advertise is there; what they do not advertise is refused (IHI 0070, 6.3.1 to 6.3.6, 4.1.3)."""

from dataclasses import replace

import pytest

from tests import smmu_rig as hw
from tests.smmu_rig import STAGE_1, Rig
from viommu.smmu import Features

# IDR0 by name, lowest bit and width, as Linux and QEMU have them.
IDR0 = {
    "S2P": (0, 1, 0),
    "S1P": (1, 1, 1),
    "TTF": (2, 2, 2),
    "COHACC": (4, 1, 1),
    "BTM": (5, 1, 0),
    "HTTU": (6, 2, 0),
    "DORMHINT": (8, 1, 0),
    "HYP": (9, 1, 0),
    "ATS": (10, 1, 0),
    "NS1ATS": (11, 1, 0),
    "ASID16": (12, 1, 1),
    "MSI": (13, 1, 1),
    "SEV": (14, 1, 0),
    "ATOS": (15, 1, 0),
    "PRI": (16, 1, 0),
    "VMW": (17, 1, 0),
    "VMID16": (18, 1, 0),
    "CD2L": (19, 1, 1),
    "VATOS": (20, 1, 0),
    "TTENDIAN": (21, 2, 2),
    "ATSRECERR": (23, 1, 0),
    "STALL_MODEL": (24, 2, 1),
    "TERM_MODEL": (26, 1, 1),
    "ST_LEVEL": (27, 2, 1),
    "above": (29, 3, 0),
}


def test_idr0() -> None:
    value = Rig(on=0).read(hw.IDR0)
    found = {name: value >> low & (1 << width) - 1 for name, (low, width, _) in IDR0.items()}
    assert found == {name: wanted for name, (_, _, wanted) in IDR0.items()}
    # What Linux's probe refuses: any endianness but mixed or little, no stage, no AArch64 tables.
    assert value == 0x0D48_301A


def test_idr1_idr3_idr5() -> None:
    rig = Rig(on=0)
    assert rig.read(hw.IDR1) == 16 | 20 << 6 | 12 << 16 | 13 << 21
    assert rig.read(hw.IDR3) == 0
    assert rig.read(hw.IDR5) == 5 | 1 << 4
    assert [rig.read(offset) for offset in (0x08, 0x10)] == [0, 0]


@pytest.mark.parametrize(("bits", "code"), [(32, 0), (36, 1), (40, 2), (42, 3), (44, 4), (48, 5)])
def test_sizes_can_be_chosen(bits: int, code: int) -> None:
    features = replace(
        STAGE_1,
        stream_id_bits=8,
        substream_id_bits=0,
        command_queue_log2=9,
        event_queue_log2=10,
        output_address_bits=bits,
    )
    rig = Rig(features, on=0)
    assert rig.read(hw.IDR1) == 8 | 10 << 16 | 9 << 21
    assert rig.read(hw.IDR5) & 7 == code


@pytest.mark.parametrize(
    "wrong",
    [
        {"stream_id_bits": 33},
        {"substream_id_bits": 21},
        {"command_queue_log2": 20},
        {"event_queue_log2": -1},
        {"output_address_bits": 52, "granules": (12, 14)},
        {"output_address_bits": 47},
        {"granules": ()},
        {"granules": (12, 13)},
        {"stage_1": False, "stage_2": False},
        {"asid_bits": 12},
        {"vmid_bits": 0},
        {"httu": 3},
        {"stall_model": "never"},
        {"stall_max": 0},
        {"stall_max": 1 << 16},
        {"caching": "sometimes"},
        {"vatos": True, "atos": False},
        {"vatos": True, "stage_2": False},
        {"vatos": True, "stage_1": False},
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("output_address_bits", "bits")):
        Features(**wrong)  # type: ignore[arg-type]


# Every advertised bit, shown.


def test_s1p_and_ttf_stage_1_translates_with_aarch64_tables() -> None:
    rig = Rig()
    rig.map(0x1000, 0x8765_4000 | hw.PLAIN | hw.PAGE)
    assert rig.physical(0x1234) == 0x8765_4234


def test_asid16_all_16_bits_tell_address_spaces_apart() -> None:
    rig = Rig()
    entry = rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE)
    for asid in (0x0107, 0x8007):
        rig.put(rig.cd_address, hw.CD_PLAIN & ~(0xFFFF << 48) | asid << 48)
        rig.submit((0x04, 31))
        assert rig.physical(0x1000) == 0xA000
    rig.put(entry, 0xB000 | hw.PLAIN | hw.PAGE)
    rig.submit((0x11 | 0x0007 << 48, 0), (0x46, 0))
    assert rig.physical(0x1000) == 0xA000
    rig.submit((0x11 | 0x8007 << 48, 0), (0x46, 0))
    assert rig.physical(0x1000) == 0xB000


def test_msi_every_source_can_write_one() -> None:
    rig = Rig()
    rig.write64(hw.GERROR_IRQ_CFG0, hw.FREE)
    rig.write(hw.GERROR_IRQ_CFG1, 0x1111)
    rig.write64(hw.EVENTQ_IRQ_CFG0, hw.FREE + 4)
    rig.write(hw.EVENTQ_IRQ_CFG1, 0x2222)
    rig.write(hw.IRQ_CTRL, 5)
    rig.fault(0x1000)
    rig.submit((0x46 | 1 << 12 | 0x3333 << 32, hw.FREE + 8), (0xFF, 0))
    assert (rig.get(hw.FREE), rig.get(hw.FREE + 8)) == (0x2222_0000_1111, 0x3333)


def test_without_msis_every_interrupt_is_wired() -> None:
    rig = Rig(replace(STAGE_1, msi=False))
    flag = rig.alloc(16)
    assert rig.read(hw.IDR0) == 0x0D48_301A & ~(1 << 13)
    for cfg0 in (hw.GERROR_IRQ_CFG0, hw.EVENTQ_IRQ_CFG0):
        rig.write64(cfg0, flag)
        rig.write64(cfg0 + 8, 0x3F_0000_1111)
        assert (rig.read64(cfg0), rig.read64(cfg0 + 8)) == (0, 0)
    rig.write(hw.IRQ_CTRL, 5)
    rig.fault(0x1000)
    rig.submit((0x46 | 1 << 12 | 0x3333 << 32, flag + 8), (0xFF, 0))
    assert (rig.get(flag), rig.get(flag + 8)) == (0, 0)
    assert rig.interrupts == 3  # of the event, the CMD_SYNC and the error


def test_term_model_and_stall_model_faults_abort_at_once() -> None:
    rig = Rig()
    event = rig.fault(0x1000)
    assert hw.number(event) == 0x10
    assert event is not None
    assert event[11] & 0x80 == 0


# CD2L, ST_LEVEL, SIDSIZE, SSIDSIZE, TTENDIAN and GRAN4K have files of their own; COHACC is how memory is shared.


UNADVERTISED = {
    0x00: "reserved",
    0x07: "CFGI_VMS_PIDM, MPAM",
    0x08: "reserved",
    0x14: "reserved",
    0x18: "TLBI_EL3_ALL, Secure",
    0x1A: "TLBI_EL3_VA, Secure",
    0x20: "TLBI_EL2_ALL, HYP",
    0x21: "TLBI_EL2_ASID, HYP",
    0x22: "TLBI_EL2_VA, HYP",
    0x23: "TLBI_EL2_VAA, HYP",
    0x28: "TLBI_S12_VMALL, S2P",
    0x2A: "TLBI_S2_IPA, S2P",
    0x40: "ATC_INV, ATS",
    0x41: "PRI_RESP, PRI",
    0x44: "RESUME, STALL_MODEL",
    0x45: "STALL_TERM, STALL_MODEL",
    0x50: "TLBI_S_EL2_ALL, Secure",
    0x58: "TLBI_S_S12_VMALL, Secure",
    0x60: "TLBI_SNH_ALL, Secure",
    0x70: "DPTI_ALL, DPT",
    0x73: "DPTI_PA, DPT",
    0x80: "IMPLEMENTATION DEFINED",
    0xFF: "reserved",
}
KNOWN = {1, 2, 3, 4, 5, 6, 0x10, 0x11, 0x12, 0x13, 0x30, 0x46}


@pytest.mark.parametrize("opcode", UNADVERTISED, ids=lambda opcode: UNADVERTISED[opcode])
def test_commands_of_absent_features_are_illegal(opcode: int) -> None:
    rig = Rig()
    rig.submit((opcode, 0))
    assert rig.read(hw.CMDQ_CONS) == 1 << 24
    assert rig.read(hw.GERROR) == 1


def test_every_other_opcode_is_illegal() -> None:
    rig = Rig()
    for opcode in range(256):
        before = rig.read(hw.CMDQ_CONS) & 0xF_FFFF
        rig.submit((opcode, 0))
        legal = rig.consumed
        assert legal == (opcode in KNOWN)
        if not legal:
            assert rig.read(hw.CMDQ_CONS) == before | 1 << 24
            rig.put(hw.COMMANDS + (before & 31) * 16, 0x46)
            rig.write(hw.GERRORN, rig.read(hw.GERROR))
            rig.run()
            assert rig.consumed


@pytest.mark.parametrize("config", [hw.STE_S2, hw.STE_NESTED])
def test_s2p_is_0_stage_2_is_illegal(config: int) -> None:
    rig = Rig()
    rig.put(hw.STRTAB + 64 * hw.STREAM, config | rig.cd_address)
    assert rig.fault(0) == hw.configuration_record(0x04)


def test_httu_is_0_the_smmu_sets_no_flags_in_descriptors() -> None:
    rig = Rig(cd=hw.CD_PLAIN | hw.AFFD)
    leaf = 0xA000 | (hw.PLAIN & ~hw.AF) | hw.PAGE | 1 << 51
    entry = rig.map(0x1000, leaf)
    assert rig.physical(0x1000, write=True) == 0xA000
    assert rig.get(entry) == leaf


def test_had_is_0_the_bits_that_would_disable_hierarchy_do_nothing() -> None:
    rig = Rig()
    rig.map(0x1000, 0xA000 | hw.PLAIN | hw.PAGE, tables=1 << 62)
    rig.put(rig.cd_address + 8, rig.low | 1 << 1)
    assert hw.number(rig.fault(0x1000, write=True)) == 0x13
