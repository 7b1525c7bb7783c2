"""What the control socket shows of an SMMU, against tables that were written word by word."""

from typing import Any

import pytest

from tests import smmu_rig as hw
from tests.control_rig import views
from tests.smmu_rig import ASID, BASE, STREAM
from tests.stages_rig import PS_48, S2_PLAIN, S2R, Stages, Table
from viommu.smmu import Access, TransactionAborted, TransactionStalled

IOVA, OUT = 0x12_3400_0000, 0x5A_8000_0000
IPA = 0x2_0000_0000
LEAF, S2_LEAF = hw.PLAIN | hw.PAGE, S2_PLAIN | hw.PAGE
GRANULES = (12, 14, 16)
OTHER = 0x45


class Looked(Stages):
    """An SMMU with everything, looked at from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.methods = views(self.smmu)

    def look(self, method: str, **parameters: Any) -> Any:
        return self.methods.call(f"smmu.{method}", parameters)

    def walk(self, iova: int, **parameters: Any) -> Any:
        return self.look("walk", **{"stream_id": STREAM, "iova": iova, **parameters})


@pytest.fixture
def rig() -> Looked:
    return Looked()


@pytest.fixture
def table(rig: Looked) -> Table:
    made = Table(rig, 12, 39)
    rig.stage_1_only(made)
    return made


# Registers and queues


def test_registers_are_decoded(rig: Looked) -> None:
    registers = {row["register"]: row for row in rig.look("registers")}
    assert registers["CR0"]["fields"] == {"smmuen": True, "eventqen": True, "cmdqen": True}
    assert registers["STRTAB_BASE"]["value"] == hw.STRTAB
    assert registers["STRTAB_BASE"]["fields"] == {"addr": hw.STRTAB}
    assert registers["EVENTQ_PROD"]["offset"] == hw.EVENTQ_PROD
    for name, offset in (("IDR0", hw.IDR0), ("IDR5", hw.IDR5), ("CMDQ_CONS", hw.CMDQ_CONS)):
        assert registers[name]["value"] == rig.read(offset)
    assert registers["GERROR"]["fields"] == {}
    rig.submit((0xFF, 0))
    (gerror,) = (row for row in rig.look("registers") if row["register"] == "GERROR")
    assert gerror["fields"] == {"CMDQ_ERR": True}


def test_queues_and_what_is_pending(rig: Looked) -> None:
    command, event, pri = rig.look("queues")
    assert (command["base"], command["slots"]) == (hw.COMMANDS, 32)
    assert (command["state"], command["pending"], command["entries"]) == ("ready", 0, [])
    assert (event["state"], event["pending"]) == ("ready", 0)
    assert (pri["enabled"], pri["slots"]) == (False, 1)

    before = command["cons"]
    rig.submit((0x03 | STREAM << 32, 1), (0xFF, 0), (0x46, 0))
    rig.fault(0, stream=OTHER)
    rig.put(hw.STRTAB + 64 * OTHER, 0)
    with pytest.raises(TransactionAborted):
        rig.go(0x1000, stream=OTHER)
    command, event, _ = rig.look("queues")
    assert command["state"] == "stopped by CERROR_ILL"
    assert (command["cons"], command["pending"]) == (before + 1, 2)
    assert [entry["fields"]["opcode"] for entry in command["entries"]] == [0xFF, "CMD_SYNC"]
    assert command["entries"][0]["address"] == hw.COMMANDS + 16 * (before + 1)
    assert event["pending"] == 1
    assert event["entries"][0]["fields"] == {"event": "C_BAD_STE", "stream_id": OTHER}
    assert rig.look("queues", limit=1)[0]["entries"] == command["entries"][:1]


def test_a_queue_that_is_not_in_memory(rig: Looked) -> None:
    rig.write(hw.CR0, 0)
    rig.write64(hw.CMDQ_BASE, 0x1000 | 5)
    rig.write(hw.CMDQ_PROD, 2)
    rig.write(hw.CMDQ_CONS, 0)
    entries = rig.look("queues")[0]["entries"]
    assert [entry["fault"] for entry in entries] == ["no memory"] * 2
    assert [entry["fields"] for entry in entries] == [None] * 2


def test_an_event_queue_that_overflowed(rig: Looked) -> None:
    rig.put(hw.STRTAB + 64 * OTHER, 0)
    for number in range(34):
        with pytest.raises(TransactionAborted):
            rig.go(number << 12, stream=OTHER)
        if number == 31:
            assert rig.look("queues")[1]["state"] == "full"
    event = rig.look("queues")[1]
    assert (event["state"], event["pending"], len(event["entries"])) == ("overflowed", 32, 8)


def test_stalled_transactions(rig: Looked, table: Table) -> None:
    rig.stage_1_only(table, cd=hw.STALL)
    with pytest.raises(TransactionStalled):
        rig.begin(IOVA, access=Access(STREAM, write=True))
    waiting = rig.look("stalls")
    assert waiting == {
        "stalls": [
            {
                "stag": 0,
                "stream_id": STREAM,
                "substream_id": None,
                "iova": IOVA,
                "direction": "write",
                "event": "F_TRANSLATION",
            }
        ],
        "more": False,
    }
    rig.write(hw.CR0, hw.SMMUEN | hw.CMDQEN)  # nowhere to record the next one
    with pytest.raises(TransactionStalled) as kept:
        rig.begin(IOVA)
    held = rig.look("stalls")["stalls"]
    assert [row["stag"] for row in held] == [0, None]
    assert rig.look("stalls", limit=1) == {"stalls": held[:1], "more": True}
    del kept
    assert rig.look("stalls")["stalls"] == held[:1], "who gives up is gone"


# Streams and contexts


def test_the_stream_table_without_what_is_plain(rig: Looked, table: Table) -> None:
    rig.put(hw.STRTAB + 64 * 0x20, hw.STE_ABORT)
    rig.put(hw.STRTAB + 64 * 0xFF, hw.STE_BYPASS)
    rig.put(hw.STRTAB + 64 * 0x21, hw.STE_S1 & ~1)
    found = rig.look("streams")
    assert found["next"] is None
    assert [(row["stream_id"], row["state"]) for row in found["streams"]] == [
        (STREAM, "translate"),
        (0x21, "C_BAD_STE"),
        (0xFF, "bypass"),
    ]
    first = found["streams"][0]
    assert first["address"] == hw.STRTAB + 64 * STREAM
    assert first["fields"]["config"] == "S1_TRANSLATE"
    assert first["fields"]["s1_context_ptr"] == rig.cd_address
    everything = rig.look("streams", everything=True)["streams"]
    assert [row["stream_id"] for row in everything] == [STREAM, 0x20, 0x21, 0xFF]
    assert everything[1]["state"] == "abort"


def test_a_page_of_streams_says_where_to_go_on(rig: Looked) -> None:
    for stream in range(0x40, 0x50):
        rig.put(hw.STRTAB + 64 * stream, hw.STE_BYPASS)
    found, after = [], 0
    while after is not None:
        answer = rig.look("streams", first=after, limit=5)
        assert len(answer["streams"]) <= 5
        found += [row["stream_id"] for row in answer["streams"]]
        after = answer["next"]
    assert found == [STREAM, *range(0x40, 0x50)]


def test_a_large_table_takes_several_looks(rig: Looked) -> None:
    table = rig.alloc(64 << 16, 64 << 16)
    rig.write(hw.CR0, 0)
    rig.write64(hw.STRTAB_BASE, table)
    rig.write(hw.STRTAB_BASE_CFG, 16)
    for stream in (STREAM, 0xC000):
        rig.put(table + 64 * stream, hw.STE_BYPASS)
    first = rig.look("streams")
    assert [row["stream_id"] for row in first["streams"]] == [STREAM]
    rest = rig.look("streams", first=first["next"])
    assert [row["stream_id"] for row in rest["streams"]] == [0xC000]
    assert STREAM < first["next"] <= 0xC000


def test_a_two_level_table(rig: Looked) -> None:
    level_1, level_2 = rig.alloc(8 << 2, 64), rig.alloc(64 * 64)
    rig.put(level_1, 0, level_2 | 7, 0x1_0000_0000_0000 | 7, level_2 | 1)
    rig.put(level_2 + 64 * 5, hw.STE_BYPASS)
    rig.write(hw.CR0, 0)
    rig.write64(hw.STRTAB_BASE, level_1)
    rig.write(hw.STRTAB_BASE_CFG, 8 | 6 << 6 | 1 << 16)
    rows = rig.look("streams")["streams"]
    assert [(row["stream_id"], row["state"]) for row in rows] == [
        (0x45, "bypass"),
        (0x80, "F_STE_FETCH"),  # the table of this group is in no memory
    ]


def test_a_table_that_reaches_beyond_memory(rig: Looked) -> None:
    rig.write(hw.CR0, 0)
    end = BASE + len(rig.ram)
    rig.write64(hw.STRTAB_BASE, end - 64 * 32)
    rig.write(hw.STRTAB_BASE_CFG, 5)
    rig.put(end - 64, hw.STE_BYPASS)
    assert [row["stream_id"] for row in rig.look("streams")["streams"]] == [31]
    rig.write64(hw.STRTAB_BASE, end)
    (beyond,) = rig.look("streams")["streams"]
    assert (beyond["stream_id"], beyond["state"], beyond["address"]) == (0, "F_STE_FETCH", None)


def test_one_stream_in_full(rig: Looked, table: Table) -> None:
    found = rig.look("stream", stream_id=STREAM)
    assert found["state"] == "translate"
    assert found["ste"]["words"][0] == hw.STE_S1 | rig.cd_address
    assert found["cd"]["address"] == rig.cd_address
    assert found["cd"]["fields"]["asid"] == ASID
    assert found["cd"]["fields"]["ttb0"] == table.pointer
    assert found["cd"]["words"][1] == table.pointer
    beyond = rig.look("stream", stream_id=1 << 20)
    assert (beyond["state"], beyond["ste"], beyond["cd"]) == ("C_BAD_STREAMID", None, None)


def test_the_contexts_of_a_stream(rig: Looked, table: Table) -> None:
    only = rig.look("contexts", stream_id=STREAM)
    assert [row["address"] for row in only["contexts"]] == [rig.cd_address]

    cds = rig.alloc(64 << 8, 64 << 8)
    for substream in (0, 3, 200):
        rig.put(cds + 64 * substream, rig.cd_word(table), table.pointer)
    rig.put(cds + 64 * 4, 1)
    for dss in (1, 2):  # CD 0 is asked for by a SubstreamID, or without
        rig.ste(hw.STE_S1 | cds | 8 << 59, dss)
        found = rig.look("contexts", stream_id=STREAM)
        assert [(row["substream_id"], row["state"]) for row in found["contexts"]] == [
            (0, "translate"),
            (3, "translate"),
            (4, "C_BAD_CD"),
            (200, "translate"),
        ]
    assert found["contexts"][1]["address"] == cds + 64 * 3
    page = rig.look("contexts", stream_id=STREAM, first=1, limit=2)
    assert [row["substream_id"] for row in page["contexts"]] == [3, 4]
    assert page["next"] == 200
    assert rig.look("contexts", stream_id=OTHER)["contexts"] == []


# Walks


@pytest.mark.parametrize("granule", GRANULES)
def test_a_walk_of_stage_1(rig: Looked, granule: int) -> None:
    table = Table(rig, granule, 39)
    rig.stage_1_only(table)
    leaf = table.map(IOVA, OUT | LEAF)
    found = rig.walk(IOVA + 0x123)
    assert (found["state"], found["fault"], found["enabled"]) == ("translate", None, True)
    assert (found["address"], found["size"]) == (OUT + 0x123, 1 << granule)
    assert found["permissions"] == "rw-/rwx"
    *above, last = found["descriptors"]
    assert [each["level"] for each in found["descriptors"]] == list(range(table.start, 4))
    assert all((each["kind"], each["stage"]) == ("table", 1) for each in above)
    assert last["address"] == leaf
    assert (last["kind"], last["value"]) == ("page", OUT | LEAF)
    assert last["fields"]["address"] == OUT
    assert last["fields"]["af"] is True


def test_a_walk_that_faults_says_where(rig: Looked, table: Table) -> None:
    leaf = table.map(IOVA, 0)
    found = rig.walk(IOVA)
    assert (found["address"], found["fault"]) == (None, "F_TRANSLATION")
    assert found["descriptors"][-1]["address"] == leaf
    assert found["descriptors"][-1]["kind"] == "invalid"
    table.map(IOVA, OUT | LEAF | hw.READ_ONLY)
    assert rig.walk(IOVA, write=True)["fault"] == "F_PERMISSION"
    assert rig.walk(IOVA)["permissions"] == "r-x/r-x"


def test_a_block(rig: Looked, table: Table) -> None:
    table.map(IOVA, OUT | hw.PLAIN | hw.BLOCK, level=2)
    found = rig.walk(IOVA + 0x12345)
    assert found["descriptors"][-1]["kind"] == "block"
    assert (found["address"], found["size"]) == (OUT + 0x12345, 2 << 20)


def test_a_walk_of_both_stages(rig: Looked) -> None:
    table_1 = Table(rig, 12, 39, offset=rig.OFFSET)
    table_2 = Table(rig, 12, 40, start=1)
    rig.nested(table_1, table_2, vmid=9)
    leaf_1 = table_1.map(IOVA, IPA | LEAF)
    leaf_2 = table_2.map(IPA, OUT | S2_LEAF)
    found = rig.walk(IOVA + 8)
    assert (found["address"], found["fault"]) == (OUT + 8, None)
    walked = [(each["stage"], each["level"]) for each in found["descriptors"]]
    # The table of stage 1 at each level by stage 2, as far as that is not known yet; and then the output.
    assert walked[0] == (2, 1)
    assert [each for each in walked if each[0] == 1] == [(1, 1), (1, 2), (1, 3)]
    assert walked[-3:] == [(2, 1), (2, 2), (2, 3)]
    read = {each["address"]: each for each in found["descriptors"]}
    assert read[leaf_1]["stage"] == 1
    assert read[leaf_1]["fields"]["address"] == IPA
    assert (read[leaf_2]["stage"], read[leaf_2]["kind"]) == (2, "page")
    assert read[leaf_2]["fields"]["s2ap_write"] is True
    assert read[leaf_2]["fields"]["address"] == OUT


def test_a_walk_of_stage_2(rig: Looked) -> None:
    table = Table(rig, 12, 40, start=1)
    rig.stage_2_only(table, S2R | PS_48, vmid=5)
    table.map(IPA, OUT | S2_LEAF)
    found = rig.walk(IPA)
    assert found["address"] == OUT
    assert {each["stage"] for each in found["descriptors"]} == {2}
    assert found["cd"] is None


def test_a_walk_where_nothing_translates(rig: Looked) -> None:
    rig.ste(hw.STE_BYPASS)
    found = rig.walk(0x1234)
    assert (found["state"], found["address"], found["descriptors"]) == ("bypass", 0x1234, [])
    assert rig.walk(1 << 60)["fault"] == "F_ADDR_SIZE"
    rig.ste(hw.STE_ABORT)
    assert (rig.walk(0)["state"], rig.walk(0)["address"]) == ("abort", None)


def test_a_walk_updates_no_flags(rig: Looked, table: Table) -> None:
    rig.stage_1_only(table, cd=hw.HA)
    leaf = table.map(IOVA, OUT | LEAF & ~hw.AF)
    assert rig.walk(IOVA)["address"] == OUT
    assert rig.get(leaf) == OUT | LEAF & ~hw.AF


# Caches and domains


def test_the_tlb_and_its_filters(rig: Looked, table: Table) -> None:
    for number in range(4):
        table.map(IOVA + (number << 12), OUT + (number << 12) | LEAF)
        rig.physical(IOVA + (number << 12))
    table.map(IOVA + (4 << 12), OUT | LEAF & ~hw.NG)
    rig.physical(IOVA + (4 << 12))
    found = rig.look("tlb")
    assert found["more"] is False
    assert {entry["asid"] for entry in found["entries"]} == {ASID, "global"}
    assert found["entries"][0] == {
        "world": "EL1",
        "vmid": 0,
        "asid": ASID,
        "iova": IOVA,
        "address": OUT,
        "size": 4096,
        "permissions": "rw-/rwx",
    }
    assert len(rig.look("tlb", asid=ASID)["entries"]) == 4
    assert rig.look("tlb", asid=ASID + 1)["entries"] == []
    assert len(rig.look("tlb", vmid=0)["entries"]) == 5
    assert rig.look("tlb", vmid=1)["entries"] == []
    (one,) = rig.look("tlb", address=IOVA + 0x2010)["entries"]
    assert (one["iova"], one["address"]) == (IOVA + 0x2000, OUT + 0x2000)
    assert rig.look("tlb", address=0)["entries"] == []
    cut = rig.look("tlb", limit=2)
    assert (len(cut["entries"]), cut["more"]) == (2, True)


def test_an_upper_address_in_the_tlb(rig: Looked) -> None:
    address = (1 << 64) - (1 << 30)
    rig.map(address, OUT | LEAF)
    rig.put(rig.cd_address, hw.CD_PLAIN, rig.low, rig.high)
    rig.forget()
    rig.physical(address)
    assert rig.look("tlb")["entries"][0]["iova"] == address
    assert len(rig.look("tlb", address=address)["entries"]) == 1


def test_what_is_cached_of_the_tables(rig: Looked, table: Table) -> None:
    table.map(IOVA, OUT | LEAF)
    rig.physical(IOVA)
    ste, cd = rig.look("cache")["structures"]
    assert (ste["structure"], ste["stream_id"], ste["stale"]) == ("STE", STREAM, False)
    assert ste["fields"]["s1_context_ptr"] == rig.cd_address
    assert (cd["structure"], cd["substream_id"], cd["stale"]) == ("CD", 0, False)
    assert (cd["fields"]["asid"], cd["fields"]["ttb0"]) == (ASID, table.pointer)
    rig.put(hw.STRTAB + 64 * STREAM, hw.STE_ABORT)
    assert rig.look("cache")["structures"][0]["stale"] is True
    assert len(rig.look("cache", limit=1)["structures"]) == 1
    assert rig.look("cache", limit=1)["more"] is True


def test_domains_are_what_streams_share(rig: Looked, table: Table) -> None:
    rig.put(hw.STRTAB + 64 * OTHER, hw.STE_S1 | rig.cd_address)
    rig.put(hw.STRTAB + 64 * 0x46, hw.STE_BYPASS)
    cds = rig.alloc(64 << 2, 64 << 2)
    rig.put(cds + 64, rig.cd_word(table) ^ ASID << 48 ^ 9 << 48, table.pointer)
    rig.put(hw.STRTAB + 64 * 0x47, hw.STE_S1 | cds | 2 << 59, 1)
    found = rig.look("domains")
    assert found["next"] is None
    first, bypass, second = found["domains"]
    assert (first["kind"], first["asid"], first["ttb0"]) == ("stage 1", ASID, table.pointer)
    assert first["ttb1"] is None
    assert first["streams"] == [
        {"stream_id": stream, "substream_id": None} for stream in (STREAM, OTHER)
    ]
    assert (bypass["kind"], bypass["streams"][0]["stream_id"]) == ("bypass", 0x46)
    assert (second["asid"], second["streams"]) == (9, [{"stream_id": 0x47, "substream_id": 1}])
    assert rig.look("domains", limit=1)["next"] == OTHER


def test_a_nested_domain_and_one_of_stage_2(rig: Looked) -> None:
    table_1, table_2 = Table(rig, 12, 39, offset=rig.OFFSET), Table(rig, 12, 40, start=1)
    rig.nested(table_1, table_2, vmid=9)
    (domain,) = rig.look("domains")["domains"]
    assert (domain["kind"], domain["vmid"], domain["asid"]) == ("nested", 9, ASID)
    assert (domain["ttb0"], domain["s2ttb"]) == (table_1.pointer, table_2.base)
    rig.stage_2_only(table_2, S2R | PS_48, vmid=5)
    (domain,) = rig.look("domains")["domains"]
    assert (domain["kind"], domain["vmid"], domain["asid"]) == ("stage 2", 5, None)
