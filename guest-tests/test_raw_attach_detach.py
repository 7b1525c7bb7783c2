"""Attach, DMA and detach, by a script in the guest that is the SMMU's only driver, on both machines.

What a script saw comes back as JSON; it is judged here. Event records are compared bit by bit: a record is the 32
bytes that lay in the event queue.
"""

from collections.abc import Callable

import pytest
from raw_rig import Case, Result, results

from viommu.lab.rig import Rig
from viommu.layouts.records import EventRecord, EventType, FaultClass

PAGE, MEGA2, MEGA64 = 4096, 2 << 20, 64 << 20
SOURCE, DESTINATION = 0x1000_0000, 0x2_2000_0000
STREAM, SECOND_STREAM = 0x10, 0x18  # functions 00:02.0 and 00:03.0


@pytest.fixture
def case(raw_case: Case) -> Case:
    return raw_case


def record(event: EventType, stream_id: int = STREAM, **fields: int) -> EventRecord:
    return EventRecord(event=event, stream_id=stream_id, **fields)


def fault(
    event: EventType, address: int, *, write: bool = False, stream_id: int = STREAM, **fields: int
) -> EventRecord:
    """The record of a fault of the transaction's own translation."""
    return record(
        event, stream_id, address=address, rnw=not write, fault_class=FaultClass.IN, **fields
    )


def events(result: Result) -> list[EventRecord]:
    return [EventRecord(int(value, 16)) for value in result["events"]]


def assert_copied(result: Result, pages: int = 1) -> None:
    assert result["status"] == "HALTED"
    assert result["bytes"] == pages * PAGE
    assert result["right_pages"] == pages
    assert result["stray_bytes"] == 0


def assert_refused(result: Result, address: int, *expected: EventRecord) -> None:
    """The engine was told so, at the right address; no byte moved; exactly these records came."""
    assert result["status"] == "ERROR"
    assert result["error_address"] == address
    assert result["stray_bytes"] == 0
    assert events(result) == list(expected)


# Attach


TABLES = ("linear", "two-level-6", "two-level-8", "two-level-10")
COMPLETIONS = ("cons", "sev", "msi")


@pytest.mark.parametrize("table", [*TABLES, *(f"sync-by-{kind}" for kind in COMPLETIONS)])
def test_attach_lets_dma_through_and_detach_stops_it(case: Case, table: str) -> None:
    result = case(f"attach/{table}")
    assert result["stream_id"] == STREAM
    # In a linear table every stream has an STE; in a 2-level one the first attach makes it.
    absent = [] if table == "linear" else [record(EventType.C_BAD_STREAMID)]
    assert_refused(result["before"], SOURCE, *absent)
    assert_copied(result["attached"], pages=4)
    assert_refused(result["after"], SOURCE)
    assert result["events"] == []


def test_bypass_reaches_physical_addresses(case: Case) -> None:
    result = case("attach/bypass")
    assert_copied(result["attached"])
    assert result["after"]["status"] == "ERROR"
    assert result["after"]["stray_bytes"] == 0
    assert result["after"]["events"] == result["events"] == []


def test_two_endpoints_reach_different_pages_by_one_iova(case: Case) -> None:
    result = case("attach/two-domains")
    assert result["status"] == ["HALTED", "HALTED"]
    assert result["right_pages"] == result["pages"] == 512
    assert result["events"] == []


def test_an_endpoint_does_not_reach_what_another_domain_maps(case: Case) -> None:
    result = case("attach/isolation")
    assert_copied(result["attached"])
    assert result["stream_id"] == SECOND_STREAM
    expected = fault(EventType.F_TRANSLATION, SOURCE, stream_id=SECOND_STREAM)
    assert_refused(result["after"], SOURCE, expected)


@pytest.mark.parametrize("table", ["cd-linear", "cd-4k", "cd-64k"])
def test_each_substream_has_its_own_domain(case: Case, table: str) -> None:
    result = case(f"attach/{table}")
    assert result["status"] == ["HALTED"] * 3
    assert result["right_pages"] == 3
    assert result["stray_bytes"] == 0
    assert result["events"] == []
    expected = record(EventType.C_BAD_CD, ssv=True, substream_id=0x7FE)
    assert_refused(result["after"], SOURCE, expected)


LOWER, UPPER = (48, 39, 32, 30, 25), (48, 39, 25)


@pytest.mark.parametrize(
    "half", [*(f"ttbr0-{bits}" for bits in LOWER), *(f"ttbr1-{bits}" for bits in UPPER)]
)
def test_each_input_size_ends_where_it_says(case: Case, half: str) -> None:
    result = case(f"attach/{half}")
    base, bits = half.split("-")
    size = 1 << int(bits)
    outside = size if base == "ttbr0" else (1 << 64) - size - PAGE
    assert_copied(result["attached"])
    assert result["events"] == []
    assert_refused(result["after"], outside, fault(EventType.F_TRANSLATION, outside))


# DMA


@pytest.mark.parametrize(("name", "size"), [("4k", PAGE), ("2m", MEGA2), ("64m", MEGA64)])
def test_every_byte_of_a_dma_over_scattered_pages(case: Case, name: str, size: int) -> None:
    result = case(f"dma/{name}")
    pages = size // PAGE
    assert_copied(result["copy"], pages)
    write, read = result["write"], result["read"]
    assert set(write["status"]) == {"HALTED"}
    assert write["right_pages"] == pages
    assert write["stray_bytes"] == 0
    assert read["status"] == "HALTED"
    assert read["sum"] == read["expected"]
    assert result["events"] == []
    assert result["unmapped"] == 2 * pages
    assert_refused(result["after"], SOURCE, fault(EventType.F_TRANSLATION, SOURCE))


def test_dma_over_blocks(case: Case) -> None:
    result = case("dma/block")
    assert result["status"] == "HALTED"
    assert result["mappings"] == [MEGA2] * 4
    assert result["right"]
    assert result["beyond_is_blank"]
    assert result["events"] == []


def test_dma_touches_nothing_beside_its_range(case: Case) -> None:
    result = case("dma/unaligned")
    assert result["status"] == "HALTED"
    assert result["right"]
    assert result["stray_bytes"] == 0
    assert result["events"] == []


# Detach

FORMS: dict[str, Callable[[int, bool], list[EventRecord]]] = {
    "unmap": lambda address, write: [fault(EventType.F_TRANSLATION, address, write=write)],
    "ste-abort": lambda address, write: [],
    "ste-invalid": lambda address, write: [record(EventType.C_BAD_STE)],
    "cd-invalid": lambda address, write: [record(EventType.C_BAD_CD)],
    "smmu-disabled": lambda address, write: [],
}


@pytest.mark.parametrize("form", list(FORMS))
def test_after_a_detach_nothing_gets_through(case: Case, form: str) -> None:
    result = case(f"detach/{form}")
    assert_copied(result["attached"])
    assert result["before"] == []
    assert_refused(result["read"], SOURCE, *FORMS[form](SOURCE, False))
    assert_refused(result["write"], DESTINATION, *FORMS[form](DESTINATION, True))
    assert_copied(result["back"])
    assert result["events"] == []


def test_a_detach_leaves_the_other_endpoint_of_the_domain_alone(case: Case) -> None:
    result = case("detach/one-of-two")
    assert_copied(result["attached"])
    assert_refused(result["read"], SOURCE)
    assert_copied(result["back"])
    assert result["events"] == []


def test_a_closed_domain_leaves_nothing_under_its_asid(case: Case) -> None:
    result = case("detach/domain-closed")
    assert_copied(result["attached"])
    assert_refused(result["read"], SOURCE, fault(EventType.F_TRANSLATION, SOURCE))


@pytest.mark.parametrize("form", list(FORMS))
def test_a_detach_in_flight_is_the_end_of_it(rig: Rig, form: str) -> None:
    """64 MiB are being copied. When the detach returns, the last byte has landed; the device is told soon after."""
    with rig.serving.trace() as reader:
        reader.read()
        (result,) = results(rig, f"flight {form}")
        trace = reader.read()
    assert "error" not in result, result["error"]

    # It was in flight: some had landed when the detach began, and not all ever did.
    size, pages_each = result["transaction_size"], result["transaction_size"] // PAGE
    assert result["returned_before_detach"] > 0
    assert result["returned_before_detach"] * pages_each <= result["landed_pages"]
    assert 0 < result["landed_pages"] < result["total_pages"] == MEGA64 // PAGE
    # Nothing landed after the detach returned, and what did not land was not touched.
    assert result["late_pages"] == 0
    assert result["landed_pages"] + result["blank_pages"] == result["total_pages"]

    # The device's own account: one frame was copying all of it, the others parts; each ends in a refused transaction.
    expected: list[EventRecord] = []
    moves = 0
    for part, frame in enumerate(result["frames"]):
        assert frame["status"] == "ERROR"
        assert frame["launched"] == frame["returned"]
        moves += frame["returned"] - 1
        place = part * MEGA64 // len(result["frames"]) + (frame["returned"] - 1) * size
        write = frame["error_address"] == DESTINATION + place
        assert write or frame["error_address"] == SOURCE + place
        expected += FORMS[form](frame["error_address"], write)
    assert sorted(events(result), key=int) == sorted(expected, key=int)

    # And the server's: the last DMA before the completion of the first CMD_SYNC was the last one at all.
    start = max(e["seq"] for e in trace if e["kind"] == "EngineStarted")
    sync = next(e["seq"] for e in trace if e["kind"] == "SyncCompleted" and e["seq"] > start)
    moved = [e["seq"] for e in trace if e["kind"] == "DmaMoved" and e["write"]]
    assert len(moved) == moves
    assert max(moved) < sync


# Refusals


@pytest.mark.parametrize(
    ("name", "pnu", "ind"),
    [
        ("unmapped", False, False),
        ("unmapped-privileged", True, False),
        ("unmapped-instruction", False, True),
    ],
)
def test_an_unmapped_address(case: Case, name: str, pnu: bool, ind: bool) -> None:
    result = case(f"events/{name}")
    expected = fault(EventType.F_TRANSLATION, SOURCE + 0x10, pnu=pnu, ind=ind)
    assert_refused(result["read"], SOURCE + 0x10, expected)
    # A write is always a data access.
    expected = fault(EventType.F_TRANSLATION, SOURCE + 0x20, write=True, pnu=pnu)
    assert_refused(result["write"], SOURCE + 0x20, expected)


def test_both_ends_of_a_copy(case: Case) -> None:
    result = case("events/both-directions")
    write = fault(EventType.F_TRANSLATION, DESTINATION, write=True)
    assert_refused(result["no_destination"], DESTINATION, write)
    assert_refused(result["no_source"], DESTINATION, fault(EventType.F_TRANSLATION, DESTINATION))


def test_what_is_before_the_fault_lands(case: Case) -> None:
    result = case("events/half-way")
    end = DESTINATION + 3 * PAGE
    assert result["copy"]["status"] == "ERROR"
    assert result["copy"]["error_address"] == end
    assert result["copy"]["right_pages"] == 3
    assert result["copy"]["stray_bytes"] == 0
    assert events(result) == [fault(EventType.F_TRANSLATION, end, write=True)]


PERMISSION, ACCESS = EventType.F_PERMISSION, EventType.F_ACCESS


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("read-only", PERMISSION, None),
        ("privileged-page", PERMISSION, PERMISSION),
        ("privileged-page-by-privileged", None, None),
        ("never-executed", None, PERMISSION),
        ("executable", None, None),
        ("access-flag", ACCESS, ACCESS),
    ],
)
def test_permissions(
    case: Case, name: str, write: EventType | None, read: EventType | None
) -> None:
    result = case(f"events/{name}")
    for direction, event in (("write", write), ("read", read)):
        outcome = result[direction]
        is_write = direction == "write"
        ind = name == "never-executed" and not is_write
        expected = [] if event is None else [fault(event, DESTINATION, write=is_write, ind=ind)]
        assert outcome["status"] == ("HALTED" if event is None else "ERROR")
        assert events(outcome) == expected
    # Nearly every byte of a page of the pattern is other than before, else none is.
    assert (result["write"]["bytes"] > PAGE // 2) == (write is None)


def test_an_output_address_that_is_too_wide(case: Case) -> None:
    result = case("events/address-size")
    assert_refused(result["read"], SOURCE, fault(EventType.F_ADDR_SIZE, SOURCE))


def test_a_walk_that_meets_no_memory(case: Case) -> None:
    result = case("events/walk-abort")
    iova = result["iova"]
    expected = record(
        EventType.F_WALK_EABT,
        address=iova,
        rnw=True,
        fault_class=FaultClass.TTD,
        fetch_addr=result["fetch_addr"],
    )
    assert_refused(result["read"], iova, expected)


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("bad-streamid-linear", EventType.C_BAD_STREAMID),
        ("bad-streamid-two-level", EventType.C_BAD_STREAMID),
        ("ste-invalid", EventType.C_BAD_STE),
        ("cd-invalid", EventType.C_BAD_CD),
        ("ste-abort", None),
    ],
)
def test_a_stream_without_a_domain(case: Case, name: str, event: EventType | None) -> None:
    result = case(f"events/{name}")
    expected = [] if event is None else [record(event)]
    read_at = SOURCE if name.startswith("bad-streamid") else DESTINATION
    assert_refused(result["read"], read_at, *expected)
    assert_refused(result["write"], DESTINATION, *expected)


def test_an_illegal_ste(case: Case) -> None:
    result = case("events/ste-illegal")
    assert_refused(result["read"], DESTINATION, record(EventType.C_BAD_STE))


@pytest.mark.parametrize(
    ("name", "event", "address"),
    [
        ("ste-fetch", EventType.F_STE_FETCH, SOURCE),
        ("cd-fetch", EventType.F_CD_FETCH, DESTINATION),
    ],
)
def test_a_structure_that_is_not_in_memory(
    case: Case, name: str, event: EventType, address: int
) -> None:
    result = case(f"events/{name}")
    assert_refused(result["read"], address, record(event, fetch_addr=result["fetch_addr"]))


def test_substreams_that_do_not_exist(case: Case) -> None:
    result = case("events/substreams")
    bad = EventType.C_BAD_SUBSTREAMID
    assert_refused(result["outside"], SOURCE, record(bad, substream_id=0x800))
    assert_refused(result["no_leaf"], SOURCE, record(bad, substream_id=0x200))
    expected = record(EventType.C_BAD_CD, ssv=True, substream_id=2)
    assert_refused(result["no_cd"], SOURCE, expected)
    expected = record(
        EventType.F_CD_FETCH, ssv=True, substream_id=65, fetch_addr=result["fetch_addr"]
    )
    assert_refused(result["no_memory"], SOURCE, expected)
    expected = fault(EventType.F_TRANSLATION, SOURCE, ssv=True, substream_id=1)
    assert_refused(result["unmapped"], SOURCE, expected)
    assert_refused(result["none"], SOURCE, record(EventType.F_STREAM_DISABLED))


def test_a_substream_where_there_are_none(case: Case) -> None:
    result = case("events/no-substreams")
    expected = record(EventType.C_BAD_SUBSTREAMID, substream_id=1)
    assert_refused(result["translated"], DESTINATION, expected)
    assert result["bypassed"]["status"] == "ERROR"
    assert events(result["bypassed"]) == [expected]


def test_without_bus_master_the_smmu_sees_nothing(case: Case) -> None:
    result = case("events/no-bus-master")
    assert_refused(result["refused"], DESTINATION)
    assert result["again"] == "HALTED"
    assert result["events"] == []


def test_the_smmu_switched_off(case: Case) -> None:
    result = case("events/gbpa")
    assert_refused(result["aborted"], DESTINATION)
    assert_copied(result["bypassed"])
    assert result["again"]["status"] == "ERROR"
    assert result["again"]["stray_bytes"] == 0
    assert result["again"]["events"] == []


def test_a_full_event_queue(case: Case) -> None:
    result = case("events/overflow")
    kept = [fault(EventType.F_TRANSLATION, SOURCE + page * PAGE) for page in range(4)]
    assert [EventRecord(int(value, 16)) for value in result["first"]] == kept
    assert result["overflows"] == result["overflows_after"] == 1
    address = SOURCE + 6 * PAGE
    assert_refused(result["after"], address, fault(EventType.F_TRANSLATION, address))


# What is not invalidated


def assert_landed(result: Result, page: int | None) -> None:
    assert result["status"] == ("ERROR" if page is None else "HALTED")
    assert result["landed"] == ([] if page is None else [page])
    assert result["stray_bytes"] == 0


GONE = fault(EventType.F_TRANSLATION, DESTINATION, write=True)


@pytest.mark.parametrize("name", ["unmapped-page", "other-asid", "other-address", "ste"])
def test_without_invalidation_the_old_way_still_works(case: Case, name: str) -> None:
    result = case(f"stale/{name}")
    assert_landed(result["stale"], 0)
    assert result["stale"]["events"] == []
    assert_landed(result["flushed"], None)
    assert result["flushed"]["error_address"] == DESTINATION
    assert events(result["flushed"]) == [record(EventType.C_BAD_STE) if name == "ste" else GONE]


def test_without_invalidation_the_old_page_receives_the_new_ones_bytes(case: Case) -> None:
    result = case("stale/remapped-page")
    for step, page in (("mapped", 0), ("stale", 0), ("flushed", 1)):
        assert_landed(result[step], page)
        assert result[step]["events"] == []


def test_a_translation_that_was_never_used_is_not_stale(case: Case) -> None:
    result = case("stale/never-used")
    assert_landed(result["unmapped"], None)
    assert events(result["unmapped"]) == [GONE]


# Commands


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_more_commands_than_the_queue_holds(case: Case, completion: str) -> None:
    result = case(f"commands/many-{completion}")
    assert_copied(result["works"])
    assert result["events"] == []


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_an_illegal_command(case: Case, completion: str) -> None:
    result = case(f"commands/illegal-{completion}")
    # CERROR_ILL, and the queue as it was when it stopped: the command itself is at CONS.
    assert [(error["code"], error["entry"]) for error in result["errors"]] == [
        (1, "0xee"),
        (1, "0x3046"),
    ]
    assert_copied(result["works"])
    assert result["events"] == []
    assert result["global_errors"] == 0
