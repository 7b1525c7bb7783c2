"""What outlives an unmapping or a domain in the TLB or in a function's translation cache; pages that are used again."""

import struct

import pytest

from tests.driver_rig import DATA, MEGA2, OTHER, PAGE, RAM, STREAM
from tests.ledger_rig import IOVA, LedgerRig
from viommu.driver.errors import CommandQueueError
from viommu.driver.page_tables import Access
from viommu.driver.smmu import DetachMode
from viommu.endpoints.port import DmaAttributes, DmaFault
from viommu.layouts.commands import (
    ATC_INVALIDATE_ALL,
    AtcInvalidateCommand,
    Opcode,
    TlbiCommand,
)
from viommu.ledger import Severity
from viommu.ledger.events import EntriesGone, EntryStale, StaleUse
from viommu.smmu import Features

ALSO = 0x50_0000
TLBI_VA = ("missing-invalidation", "CMD_TLBI_NH_VA")
TLBI_ASID = ("missing-invalidation", "CMD_TLBI_NH_ASID")
OMIT_TLBI = {"CMD_TLBI_NH_VA", "CMD_TLBI_NH_ASID"}


@pytest.fixture(params=["normal", "hostile"])
def rig(request: pytest.FixtureRequest) -> LedgerRig:
    return LedgerRig(Features(caching=request.param))


# Unmapping


def test_a_missing_tlbi_is_named(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    rig.omit = OMIT_TLBI
    domain.unmap(IOVA, PAGE)
    assert rig.found() == [TLBI_VA]
    finding = rig.verdict().findings[0]
    assert finding.text == "1 TLB entry of ASID 1 not invalidated by the end"
    (stale,) = rig.kinds(EntryStale)
    assert (stale.iova, stale.size, stale.address) == (IOVA, PAGE, DATA)
    assert (stale.now, stale.outlived, stale.taken) == ("F_TRANSLATION", True, False)
    assert [rig.events[number - 1] for number in finding.evidence] == [stale]


def test_and_who_used_it(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    rig.omit = OMIT_TLBI
    domain.unmap(IOVA, 2 * PAGE)
    rig.write(size=PAGE)
    assert rig.found() == [TLBI_VA]
    text = rig.verdict().findings[0].text
    assert text.endswith("used by 1 transaction, 4,096 bytes moved")
    uses = rig.kinds(StaleUse)
    assert [(use.moved, use.held, use.cause, use.size, use.address) for use in uses] == [
        (False, True, "TLB", PAGE, DATA),
        (True, True, "TLB", PAGE, DATA),
    ]


def test_of_a_transaction_only_the_part_that_was_unmapped(rig: LedgerRig) -> None:
    domain = rig.attached(pages=3)
    rig.write(size=3 * PAGE)
    rig.omit = OMIT_TLBI
    domain.unmap(IOVA + PAGE, PAGE)
    rig.write(IOVA + 16, 3 * PAGE - 16)
    use = rig.kinds(StaleUse)[0]
    # What comes after the hole memory does not let through either: it ends there.
    assert (use.iova, use.size, use.address) == (IOVA + PAGE, 2 * PAGE, DATA + PAGE)


def test_a_tlbi_for_another_address_or_asid_does_not_help(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    domain.unmap(IOVA, PAGE, invalidate=False)
    opcode = Opcode.CMD_TLBI_NH_VA
    for asid, address in ((domain.asid, IOVA + PAGE), (domain.asid + 1, IOVA)):
        rig.driver.commands.issue(TlbiCommand(opcode=opcode, asid=asid, address=address))
        rig.driver.commands.sync()
    assert rig.found() == [TLBI_VA]


def test_a_write_by_an_entry_that_memory_has_made_read_only(rig: LedgerRig) -> None:
    domain = rig.attached(pages=1)
    rig.write()
    domain.unmap(IOVA, PAGE, invalidate=False)
    domain.map(IOVA, DATA, PAGE, Access(write=False), pages_only=True)
    rig.driver.commands.sync()
    rig.write()
    assert rig.found() == [TLBI_VA]
    assert rig.kinds(EntryStale)[0].now == "less permission"
    assert rig.kinds(StaleUse)[0].now == "F_PERMISSION"


def test_a_block(rig: LedgerRig) -> None:
    domain = rig.driver.create_domain()
    domain.map(0, DATA, MEGA2)
    rig.driver.attach(STREAM, domain)
    rig.write(0)
    rig.omit = OMIT_TLBI
    domain.unmap(0, MEGA2)
    assert rig.found() == [TLBI_VA]
    assert rig.kinds(EntryStale)[0].size == MEGA2


def test_many_pages_are_told_of_as_one_range(rig: LedgerRig) -> None:
    domain = rig.attached(pages=512)
    rig.write(size=512 * PAGE)
    rig.omit = OMIT_TLBI
    domain.unmap(IOVA, 512 * PAGE)
    (stale,) = rig.kinds(EntryStale)
    assert (stale.iova, stale.size, stale.entries) == (IOVA, 512 * PAGE, 512)


def test_an_unmapping_without_cmd_sync(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    rig.ends_meanwhile(rig.begin())
    rig.omit = {"CMD_SYNC"}
    domain.unmap(IOVA, PAGE)
    rig.go_on()
    assert rig.found() == [("missing-sync", "CMD_SYNC")]
    assert "64 bytes moved" in rig.verdict().findings[0].text


# Later than that


def test_an_invalidation_in_time_is_a_window(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    rig.ends_meanwhile(rig.begin())
    domain.unmap(IOVA, PAGE)
    assert rig.found(Severity.NOTE) == [("invalidation-window", None)]
    assert rig.verdict().clean


def test_a_deferred_unmapping_that_nobody_used_is_a_note(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    domain.unmap(IOVA, PAGE, invalidate=False)
    rig.driver.commands.sync()
    rig.driver.commands.sync()
    assert [finding.command for finding in rig.verdict().violations] == ["CMD_TLBI_NH_VA"]
    domain.flush()
    assert rig.found(Severity.NOTE) == [("deferred-invalidation", "CMD_TLBI_NH_VA")]
    assert rig.verdict().findings[0].text.startswith("1 TLB entry of ASID 1 outlived 2 CMD_SYNC")
    assert [gone.by for gone in rig.kinds(EntriesGone)] == ["CMD_TLBI_NH_ASID"]


def test_one_that_was_used_is_an_exposure_with_the_number_of_accesses(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    domain.unmap(IOVA, PAGE, invalidate=False)
    rig.driver.commands.sync()
    for _ in range(3):
        rig.write()
    domain.flush()
    assert rig.found() == [("deferred-invalidation", "CMD_TLBI_NH_VA")]
    assert rig.verdict().word == "exposed"
    assert "used by 3 transactions, 192 bytes moved" in rig.verdict().findings[0].text


def test_one_that_is_pending_when_the_driver_says_it_is_done(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    rig.omit = OMIT_TLBI
    rig.driver.detach(STREAM, DetachMode.UNMAP)
    rig.declare()
    rig.omit = set()
    domain.flush()
    assert rig.found() == [TLBI_VA]
    assert "where the driver said it was done" in rig.verdict().findings[0].text


# Used again


def test_an_iova_that_is_mapped_to_another_page_too_early(rig: LedgerRig) -> None:
    domain = rig.attached(pages=1)
    rig.write()
    domain.unmap(IOVA, PAGE, invalidate=False)
    domain.map(IOVA, DATA + 8 * PAGE, PAGE)
    rig.write()
    domain.flush()
    assert TLBI_VA in rig.found()
    text = rig.verdict().violations[0].text
    assert f"maps {IOVA:#x} to {DATA:#x} for ASID 1, and memory says {DATA + 8 * PAGE:#x}" in text


def test_a_page_that_is_mapped_elsewhere_while_the_tlb_has_it(rig: LedgerRig) -> None:
    domain = rig.attached(pages=1)
    other = rig.driver.create_domain()
    rig.driver.attach(OTHER, other)
    rig.write()
    domain.unmap(IOVA, PAGE, invalidate=False)
    other.map(ALSO, DATA, PAGE, pages_only=True)
    rig.write()
    domain.flush()
    assert rig.found() == [("page-reuse", "CMD_TLBI_NH_VA")]
    text = rig.verdict().findings[0].text
    assert (
        f"touched a page that was unmapped and used again: {DATA:#x} is {ALSO:#x} of ASID 2" in text
    )


def test_garbage_for_tables_maps_no_page_for_itself(rig: LedgerRig) -> None:
    """What looks like a block of 512 GiB is not looked at page by page."""
    domain = rig.attached(pages=1)
    other = rig.driver.create_domain()
    rig.driver.attach(OTHER, other)
    rig.write()
    domain.unmap(IOVA, PAGE, invalidate=False)
    assert other.lower is not None
    struct.pack_into("<Q", rig.ram, other.lower.root - RAM, 1)
    rig.write()
    domain.flush()
    assert rig.found() == [("page-reuse", "CMD_TLBI_NH_VA")]


def test_a_page_that_was_mapped_twice_all_along_is_none(rig: LedgerRig) -> None:
    domain = rig.attached(pages=1)
    domain.map(ALSO, DATA, PAGE, pages_only=True)
    rig.driver.commands.sync()
    rig.write()
    domain.unmap(IOVA, PAGE, invalidate=False)
    rig.write()
    domain.flush()
    assert rig.found() == []


def test_a_page_that_became_a_table(rig: LedgerRig) -> None:
    domain = rig.driver.create_domain()
    page = rig.arena.allocate(PAGE, PAGE)
    domain.map(IOVA, page.address, PAGE)
    rig.driver.attach(STREAM, domain)
    rig.write()
    domain.unmap(IOVA, PAGE, invalidate=False)
    rig.arena.free(page)
    domain.map(1 << 40, DATA, PAGE)
    rig.write()
    domain.flush()
    assert ("page-reuse", "CMD_TLBI_NH_VA") in rig.found()
    assert "is a table of ASID 1" in rig.verdict().violations[0].text


def test_an_asid_that_is_used_again_too_early(rig: LedgerRig) -> None:
    rig.attached(asid=7)
    rig.write()
    rig.driver.detach(STREAM)
    rig.attached(asid=7)
    assert rig.found() == [TLBI_ASID]
    assert rig.kinds(EntryStale)[0].now == "another domain"


def test_an_asid_that_is_used_again_after_its_invalidation(rig: LedgerRig) -> None:
    domain = rig.attached(asid=7)
    rig.write()
    rig.driver.detach(STREAM)
    domain.close()
    rig.attached(asid=7)
    rig.write()
    assert rig.found(Severity.NOTE) == []


def test_a_domain_that_is_freed_without_invalidation(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    rig.driver.detach(STREAM)
    rig.omit = OMIT_TLBI
    domain.unmap_all()
    rig.driver.commands.sync()
    assert rig.found() == [TLBI_ASID]


# ATS

FULL = 1 << 28  # STE.EATS, in its second word
TRANSLATED = DmaAttributes(ats=True)


class AtsRig(LedgerRig):
    """`STREAM` has a translation cache, and used it."""

    def __init__(self) -> None:
        super().__init__()
        self.domain = self.attached()
        self.driver.table.entry(STREAM)[1] |= FULL
        self.driver.invalidate_stream(STREAM)
        assert self.port.ats is not None
        self.port.ats.capability.written(struct.pack("<HH", 0, 1 << 15))
        self.use()

    def use(self) -> None:
        with self.port.begin(IOVA, 64, write=True, attributes=TRANSLATED) as transfer:
            transfer.write_from(bytes(64))

    def invalidate(self) -> None:
        command = AtcInvalidateCommand(
            opcode=Opcode.CMD_ATC_INV, stream_id=STREAM, span_log2=ATC_INVALIDATE_ALL
        )
        self.driver.commands.issue(command)
        self.driver.commands.sync()


ATC_INV = ("missing-invalidation", "CMD_ATC_INV")


def test_a_missing_atc_inv_is_named_and_what_passed_by_it() -> None:
    rig = AtsRig()
    rig.domain.unmap(IOVA, PAGE)
    rig.use()  # a real SMMU lets it pass too: nobody but the function knows
    assert rig.found() == [ATC_INV]
    finding = rig.verdict().findings[0]
    assert finding.stream_id == STREAM
    assert finding.text.startswith("1 ATC entry of stream 0x10 not invalidated by the end")
    assert finding.text.endswith("64 bytes moved")
    (use,) = rig.kinds(StaleUse)
    assert (use.moved, use.cause, use.held, use.address) == (True, "ATC", True, DATA)


def test_a_detach_without_atc_inv() -> None:
    rig = AtsRig()
    rig.driver.detach(STREAM)
    with pytest.raises(DmaFault):
        rig.use()  # the driver has ATSCHK set
    assert rig.found() == [ATC_INV]
    assert rig.kinds(StaleUse) == []


def test_with_atc_inv_it_is_clean() -> None:
    rig = AtsRig()
    rig.domain.unmap(IOVA, PAGE)
    rig.invalidate()
    with pytest.raises(DmaFault):
        rig.use()
    rig.driver.detach(STREAM)
    rig.declare()
    assert rig.found() == []
    assert [gone.by for gone in rig.kinds(EntriesGone)] == ["CMD_ATC_INV"]


def test_a_function_that_does_not_answer() -> None:
    rig = AtsRig()
    rig.domain.unmap(IOVA, PAGE)
    with rig.port.begin(IOVA, 64, write=True, attributes=TRANSLATED) as transfer:
        command = AtcInvalidateCommand(
            opcode=Opcode.CMD_ATC_INV, stream_id=STREAM, span_log2=ATC_INVALIDATE_ALL
        )
        rig.driver.commands.issue(command)
        rig.smmu.give_up()
        transfer.write_from(bytes(64))
    with pytest.raises(CommandQueueError, match="CERROR_ATC_INV_SYNC"):
        rig.driver.commands.sync()
    assert ("atc-unanswered", "CMD_ATC_INV") in rig.found()
