"""Translation Requests and Translated transactions (IHI 0070, 3.9.1, 5.2, 7.3.6, 7.3.8, 13.6, 13.7)."""

from array import array
from dataclasses import replace

import pytest

from tests import smmu_rig as hw
from tests.ats_rig import (
    ATS,
    ATSCHK,
    BOTH,
    EATS_DPT,
    EATS_FULL,
    EATS_SPLIT,
    ON,
    REC_CFG_ATS,
    RECINVSID,
    S2_MEM,
    S2_RO,
    S2_RW,
    S2_WORD,
    AtsRig,
)
from tests.smmu_rig import AF, BLOCK, PAGE, PLAIN, READ_ONLY, STREAM, USER, record
from viommu.smmu import Access, AtsStatus, Features, TranslationCompletion

SC, UR, CA = AtsStatus.SUCCESS, AtsStatus.UNSUPPORTED_REQUEST, AtsStatus.COMPLETER_ABORT
LEAF = PLAIN | PAGE
NOTHING = TranslationCompletion(SC, 0, 4096)
IPA = 0x1_4000_0000


def test_a_page_and_a_block_are_answered_with_address_size_and_permissions() -> None:
    rig = AtsRig()
    rig.map(0x1000, 0xA_5000 | LEAF)
    rig.map(0x4000_0000, 0x2_0020_0000 | PLAIN | BLOCK, level=2)
    assert rig.ask(0x1234) == TranslationCompletion(SC, 0xA_5000, 4096, read=True, write=True)
    assert rig.ask(0x4012_3456) == TranslationCompletion(SC, 0x2_0020_0000, 1 << 21, True, True)
    assert rig.events() == []


def test_the_data_entry_has_the_size_below_the_address() -> None:
    assert TranslationCompletion(SC, 0xA_5000, 4096, True, True).entry == 0xA_5003
    # S, and the lowest zero from bit 12 on says 2^21.
    assert TranslationCompletion(SC, 0x4020_0000, 1 << 21, True).entry == 0x402F_F801
    assert (
        TranslationCompletion(SC, 0x8000, 1 << 13, True, execute=True, privileged=True).entry
        == 0x8819
    )


@pytest.mark.parametrize(
    ("leaf", "access", "no_write", "expected"),
    [
        # The table of 13.7: user RO, privileged RW; user RW; …
        (READ_ONLY | USER, {}, True, "r"),
        (USER, {}, False, "rw"),
        (READ_ONLY | USER, {}, False, "r"),
        (0, {"privileged": True, "substream_id": 1}, False, "rwp"),
        (0, {"substream_id": 1}, False, ""),
        (0, {"privileged": True}, False, ""),  # without a PASID nobody is privileged
        (USER | hw.UXN, {"instruction": True, "substream_id": 1}, True, "r"),
        (USER, {"instruction": True, "substream_id": 1}, False, "rwx"),
        (READ_ONLY | USER, {"instruction": True, "substream_id": 1}, True, "rx"),
        (USER, {"instruction": True}, False, "rw"),
        (0, {"instruction": True, "substream_id": 1}, False, ""),  # execute-only for EL0
    ],
)
def test_permissions(leaf: int, access: dict[str, int], no_write: bool, expected: str) -> None:
    rig = AtsRig()
    # Two CDs for the streams with a PASID, and the first without one (S1DSS 2).
    rig.put(rig.cd_address, hw.CD_PLAIN, rig.low, rig.high)
    table = rig.alloc(128, 128)
    for index in (0, 1):
        rig.put(table + 64 * index, hw.CD_PLAIN, rig.low, rig.high)
    rig.ste(hw.STE_S1 | table | 1 << 59, EATS_FULL | 2)
    rig.map(0x1000, 0xA000 | leaf | AF | PAGE)
    answer = rig.ask(0x1000, no_write=no_write, **access)
    flags = (answer.read, answer.write, answer.execute, answer.privileged)
    assert "".join(c for c, f in zip("rwxp", flags, strict=True) if f) == expected
    assert answer.status is SC
    assert rig.events() == []


@pytest.mark.parametrize("no_write", [False, True])
def test_a_request_marks_a_page_dirty_only_when_it_wants_to_write(no_write: bool) -> None:
    rig = AtsRig(replace(ATS, httu=2))
    rig.context(hw.CD_PLAIN | hw.HA | hw.HD)
    clean = 0xA000 | PLAIN & ~AF | READ_ONLY | 1 << 51 | PAGE
    entry = rig.map(0x1000, clean)
    answer = rig.ask(0x1000, no_write=no_write)
    assert (answer.read, answer.write) == (True, not no_write)
    assert rig.get(entry) == clean & ~(0 if no_write else READ_ONLY) | AF


@pytest.mark.parametrize(
    "leaf",
    [0, 0xA000 | PLAIN & ~AF | PAGE, 1 << 47 | LEAF],
    ids=["F_TRANSLATION", "F_ACCESS", "F_ADDR_SIZE"],
)
@pytest.mark.parametrize("stalls", [False, True])
def test_faults_of_translation_are_an_answer_without_an_event(leaf: int, stalls: bool) -> None:
    rig = AtsRig(replace(ATS, output_address_bits=44, stall_model="both"))
    rig.configure(REC_CFG_ATS | RECINVSID)
    rig.context(hw.CD_PLAIN | (hw.STALL if stalls else 0))
    rig.map(0x1000, leaf)
    assert rig.ask(0x1000) == NOTHING
    assert rig.ask(1 << 52) == NOTHING  # in neither half
    assert rig.events() == []
    assert len(rig.smmu.stalls) == 0


def bad_request(
    address: int, second: int, *, stream: int = STREAM, substream: int | None = None
) -> bytes:
    ssid = 0 if substream is None else 1 << 11 | substream << 12
    return record(0x05 | stream << 32 | ssid, second, address)


R, W, X, P = 1 << 35, 1 << 34, 1 << 33, 1 << 32


def test_where_ats_is_off_a_request_is_unsupported_and_recorded() -> None:
    rig = AtsRig(eats=0)
    assert rig.ask(0x1234_5678, span=3).status is UR
    assert rig.events() == [bad_request(0x1234_5000, R | W | 3 << 44)]
    assert (
        rig.ask(
            0xFFFF_8000_1234_5678, no_write=True, privileged=1, instruction=1, substream_id=5
        ).status
        is UR
    )
    assert rig.events() == [bad_request(0xFFFF_8000_1234_5000, R | X | P | 1 << 44, substream=5)]
    rig.ste(hw.STE_BYPASS, EATS_FULL)
    assert rig.ask(0x1000).status is UR
    rig.ste(hw.STE_S1 | rig.cd_address, EATS_DPT)
    assert rig.ask(0x1000).status is UR
    assert rig.events() == [bad_request(0x1000, R | W | 1 << 44)] * 2
    rig.ste(hw.STE_ABORT, EATS_FULL)
    assert rig.ask(0x1000).status is UR
    assert rig.events() == []


def test_smmuen_0_refuses_requests_and_translated_transactions_with_events() -> None:
    rig = AtsRig(on=hw.EVENTQEN | hw.CMDQEN)
    assert rig.ask(0x1000).status is UR
    assert rig.events() == [bad_request(0x1000, R | W | 1 << 44)]
    assert rig.barred(0xA123, 1) == [record(0x07 | STREAM << 32, R, 0xA123)]


def test_without_ats_everything_is_refused_in_silence_and_its_bits_are_res0() -> None:
    rig = AtsRig(hw.STAGE_1, eats=EATS_SPLIT)
    assert rig.ask(0x1000).status is UR
    assert rig.barred(0xA000, 1) == []
    rig.write(hw.CR0, ON | ATSCHK)
    assert rig.read(hw.CR0) == rig.read(hw.CR0ACK) == ON
    rig.configure(0xF)
    assert rig.read(hw.CR2) == 6
    rig.map(0x1000, 0xA000 | LEAF)
    assert rig.physical(0x1000) == 0xA000  # EATS is ignored
    rig.submit((0x40 | STREAM << 32, 0))
    assert rig.read(hw.CMDQ_CONS) >> 24 == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_errors_of_configuration_are_completer_aborts_recorded_on_request(recorded: bool) -> None:
    rig = AtsRig()
    rig.configure(REC_CFG_ATS | RECINVSID if recorded else RECINVSID)

    def refused(expected: bytes, **access: int) -> None:
        assert rig.ask(0x1000, **access).status is CA  # type: ignore[arg-type]
        assert rig.events() == ([expected] if recorded else [])

    refused(hw.configuration_record(0x02, stream=0x1000), stream_id=0x1000)
    refused(hw.configuration_record(0x04, stream=0x20), stream_id=0x20)
    refused(record(0x08 | 7 << 12 | STREAM << 32), substream_id=7)
    rig.map(0x1000, 0xA000 | LEAF)
    table = rig.get(rig.low)
    rig.put(rig.low, 0xDEAD_F003)
    rig.forget()
    refused(hw.translation_record(0x0B, 0x1000, second=hw.CLASS_TT, fetch=0xDEAD_F000))
    rig.put(rig.low, table)
    rig.context(hw.CD_PLAIN & ~hw.CD_V)
    refused(hw.configuration_record(0x0A))
    rig.ste(hw.STE_S1 | 0xDEAD_0000, EATS_FULL)
    refused(hw.configuration_record(0x09, fetch=0xDEAD_0000))
    rig.ste(hw.STE_S1 | rig.cd_address | 1 << 59, EATS_FULL)
    refused(record(0x06 | STREAM << 32))


def test_a_bad_stream_of_a_request_needs_recinvsid_too() -> None:
    rig = AtsRig()
    rig.configure(REC_CFG_ATS)
    assert rig.ask(0x1000, stream_id=0x1000).status is CA
    assert rig.events() == []


def test_a_skipped_stage_1_is_an_identity() -> None:
    rig = AtsRig()
    rig.ste(hw.STE_S1 | rig.cd_address | 1 << 59, EATS_FULL | 1)
    assert rig.ask(0x1234_5678) == TranslationCompletion(SC, 0x1234_5000, 4096, True, True)
    assert rig.ask(1 << 48) == NOTHING


# Both stages


def test_full_ats_answers_with_what_both_stages_make() -> None:
    rig = AtsRig(BOTH)
    rig.nest(EATS_FULL)
    rig.map(0x20_0000, IPA | PLAIN | BLOCK, level=2)
    rig.map_2(IPA + 0x3000, 0xB_7000 | S2_RO | S2_MEM | AF | PAGE)
    assert rig.ask(0x20_3000) == TranslationCompletion(SC, 0xB_7000, 4096, True, False)
    assert rig.ask(0x20_4000) == NOTHING
    rig.ste(hw.STE_S2, EATS_FULL, S2_WORD, rig.stage_2)
    assert rig.ask(IPA + 0x3000) == TranslationCompletion(SC, 0xB_7000, 4096, True, False)
    assert rig.events() == []


def test_a_cd_or_table_that_stage_2_does_not_map_is_no_access() -> None:
    rig = AtsRig(BOTH)
    rig.nest(EATS_FULL)
    rig.configure(REC_CFG_ATS)
    rig.put(rig.low, 0x5000_0000 | hw.TABLE)
    rig.forget()
    assert rig.ask(0x1000) == NOTHING
    rig.ste(hw.STE_NESTED | 0x5000_0000, EATS_FULL, S2_WORD, rig.stage_2)
    assert rig.ask(0x1000) == NOTHING
    assert rig.events() == []


def test_split_stage_answers_with_ipas_that_stage_2_translates_later() -> None:
    rig = AtsRig(BOTH, on=ON | ATSCHK)
    rig.nest(EATS_SPLIT)
    rig.map(0x20_0000, IPA | PLAIN | BLOCK, level=2)
    rig.map_2(IPA + 0x3000, 0xB_7000 | S2_RW | S2_MEM | AF | PAGE)
    rig.map_2(IPA + 0x4000, 0xB_9000 | S2_RO | S2_MEM | AF | PAGE)
    assert rig.ask(0x20_3123) == TranslationCompletion(SC, IPA + 0x3000, 4096, True, True)
    assert rig.ask(0x20_4123) == TranslationCompletion(SC, IPA + 0x4000, 4096, True, False)
    assert rig.pass_through(IPA + 0x3123, 8, IPA + 0x4000, 16) == [0xB_7123, 8, 0xB_9000, 16]
    assert rig.pass_through(IPA + 0x3000, 0x3000) == [0xB_7000, 0x1000, 0xB_9000, 0x1000]
    # What fails is cut off, or an ordinary fault of stage 2.
    assert rig.pass_through(IPA + 0x3000, 8, IPA + 0x5000, 8) == [0xB_7000, 8]
    s2, ipa = 1 << 39, IPA + 0x5000
    assert rig.barred(ipa, 8) == [record(0x10 | STREAM << 32, R | s2 | hw.CLASS_IN, ipa, ipa)]
    ipa = IPA + 0x4000
    assert rig.barred(ipa + 8, 8, write=True) == [
        record(0x13 | STREAM << 32, s2 | hw.CLASS_IN, ipa + 8, ipa)
    ]
    assert rig.barred(1 << 50, 8) == [record(0x11 | STREAM << 32, R | hw.CLASS_IN, 1 << 50)]


@pytest.mark.parametrize("eats", [EATS_FULL, EATS_SPLIT], ids=["full", "split"])
@pytest.mark.parametrize("execute", [False, True])
def test_what_is_not_executable_can_be_read(eats: int, execute: bool) -> None:
    """Also when execute permission is asked for too (13.7.1)."""
    rig = AtsRig(BOTH, on=ON | ATSCHK)
    contexts = rig.alloc(4096)
    for place in (contexts, contexts + 64):
        rig.put(place, hw.CD_PLAIN, rig.low, rig.high)
    rig.nest(0)
    rig.ste(hw.STE_NESTED | contexts | 1 << 59, eats | 2, S2_WORD, rig.stage_2)
    rig.map(0x1000, IPA | PLAIN | PAGE | hw.UXN)
    rig.map_2(IPA, 0xB_7000 | S2_RW | S2_MEM | AF | PAGE)
    address = IPA if eats == EATS_SPLIT else 0xB_7000
    assert rig.ask(0x1000, substream_id=1, instruction=execute) == TranslationCompletion(
        SC, address, 4096, read=True, write=True
    )


def test_what_stage_2_refuses_of_the_tables_is_a_refusal_of_everything() -> None:
    """The walk for a write would make a descriptor dirty (3.9.1.2)."""
    rig = AtsRig(BOTH, on=ON | ATSCHK)
    rig.nest(EATS_FULL)
    rig.put(rig.stage_2 + 8 * (hw.BASE >> 30), hw.BASE | S2_RO | S2_MEM | AF | BLOCK)
    rig.put(rig.cd_address, hw.CD_PLAIN | hw.HA | hw.HD, rig.low, rig.high)
    rig.map(0x1000, IPA | PLAIN | READ_ONLY | 1 << 51 | PAGE)
    rig.map_2(IPA, 0xB_7000 | S2_RW | S2_MEM | AF | PAGE)
    rig.forget()
    assert rig.ask(0x1000) == NOTHING
    assert rig.ask(0x1000, no_write=True).read


def test_split_stage_without_atschk_is_no_ats() -> None:
    rig = AtsRig(BOTH)
    rig.nest(EATS_SPLIT)
    assert rig.ask(0x1000).status is UR
    assert rig.events() == [bad_request(0x1000, R | W | 1 << 44)]


@pytest.mark.parametrize(
    ("config", "eats", "s2s", "illegal"),
    [
        (hw.STE_NESTED, EATS_FULL, 0, False),
        (hw.STE_NESTED, EATS_FULL, 1, True),
        (hw.STE_S2, EATS_FULL, 1, True),
        (hw.STE_S1, EATS_FULL, 1, False),
        (hw.STE_NESTED, EATS_SPLIT, 0, False),
        (hw.STE_NESTED, EATS_SPLIT, 1, True),
        (hw.STE_S1, EATS_SPLIT, 0, True),
        (hw.STE_S2, EATS_SPLIT, 0, True),
        (hw.STE_BYPASS, EATS_SPLIT, 1, False),
        (hw.STE_NESTED, EATS_DPT, 0, False),
    ],
)
def test_eats_that_is_illegal(config: int, eats: int, s2s: int, illegal: bool) -> None:
    rig = AtsRig(BOTH)
    rig.nest(0)
    cd = rig.cd_address if config in (hw.STE_NESTED, hw.STE_S1) else 0
    rig.ste(config | cd, eats, S2_WORD | s2s << 57, rig.stage_2)
    found = hw.number(rig.fault(0xFF_0000_0000_0000))
    assert (found == 0x04) == illegal


# Translated transactions


def test_translated_transactions_pass_unchecked_without_atschk() -> None:
    rig = AtsRig(eats=0)
    assert rig.pass_through(0xA123, 8, 0xC000, 4096) == [0xA123, 8, 0xC000, 4096]
    assert rig.pass_through(0xA123, 8, stream=0x7777) == [0xA123, 8]
    assert rig.barred(1 << 48, 8) == []  # above the OAS
    assert rig.pass_through((1 << 48) - 8, 16) == [(1 << 48) - 8, 8]


@pytest.mark.parametrize("write", [False, True])
def test_atschk_checks_the_stream(write: bool) -> None:
    rig = AtsRig(on=ON | ATSCHK)
    forbidden = record(0x07 | STREAM << 32, 0 if write else R, 0xA123)
    assert rig.pass_through(0xA123, 8, write=write) == [0xA123, 8]
    assert rig.barred(1 << 48, 8, write=write) == []
    for words in (
        (hw.STE_S1 | rig.cd_address, 0),
        (hw.STE_S1 | rig.cd_address, EATS_DPT),
        (hw.STE_BYPASS, EATS_FULL),
    ):
        rig.ste(*words)
        assert rig.barred(0xA123, 8, write=write) == [forbidden]
    rig.ste(hw.STE_ABORT, EATS_FULL)
    assert rig.barred(0xA123, 8, write=write) == []
    assert rig.barred(0xA123, 8, stream=0x20) == []
    rig.configure(REC_CFG_ATS)
    # RECINVSID has no say here.
    assert rig.barred(0xA123, 8, stream=0x20) == [hw.configuration_record(0x04, stream=0x20)]
    assert rig.barred(0xA123, 8, stream=0x1000) == [hw.configuration_record(0x02, stream=0x1000)]


def test_a_translated_transaction_is_in_flight() -> None:
    rig = AtsRig()
    held = rig.smmu.translated(Access(STREAM), array("Q", (0xA000, 8)))
    rig.submit((0x30, 0), (0x46, 0))
    assert not rig.consumed
    rig.smmu.retire(held)
    assert rig.consumed


def test_the_id_registers_advertise_it() -> None:
    rig = AtsRig()
    assert rig.read(hw.IDR0) >> 10 & 1 == rig.read(hw.IDR0) >> 23 & 1 == 1
    assert rig.read(hw.IDR0) >> 11 & 1 == 0  # split-stage is there
    assert Features().ats
