"""The way of a port's transactions through the guest's SMMU, then the host's, to guest RAM."""

import struct

import pytest

from tests.driver_rig import DATA, PAGE, STREAM, fault
from tests.host_rig import IOVA, HostRig
from viommu.driver.errors import DriverTimeout
from viommu.driver.page_tables import READ_ONLY
from viommu.endpoints.ats import ATS_ENABLE
from viommu.endpoints.port import DmaAttributes, DmaFault, DmaMoved, DmaRefused
from viommu.host.smmu import HostSmmuEvent
from viommu.layouts.records import EventType
from viommu.smmu.events import StructureFetched

FOUR = bytes(range(1, 5))


def pages(values: bytes) -> bytes:
    return b"".join(bytes([value]) * PAGE for value in values)


@pytest.fixture
def rig() -> HostRig:
    return HostRig()


def test_a_port_that_no_domain_concerns(rig: HostRig) -> None:
    assert rig.write(IOVA, pages(FOUR)) == 4 * PAGE
    assert rig.port.host is None
    assert rig.of_host() == []
    assert rig.ram(DATA, 4 * PAGE) == pages(FOUR[::-1])


@pytest.mark.parametrize("behind", [True, False])
def test_a_domain_that_maps_everything_to_itself(behind: bool) -> None:
    rig = HostRig(behind=behind)
    rig.attach()
    assert rig.write(IOVA if behind else DATA, pages(FOUR)) == 4 * PAGE
    assert rig.ram(DATA, 4 * PAGE) == pages(FOUR[::-1] if behind else FOUR)
    buffer = bytearray(PAGE)
    with rig.port.begin(IOVA + 8 if behind else DATA + 8, PAGE, write=False) as transfer:
        transfer.read_into(buffer)
    assert buffer == pages(FOUR)[8 : 8 + PAGE]
    assert rig.in_flight() == (0, 0)


def test_each_range_of_the_guest_goes_where_the_host_has_it(rig: HostRig) -> None:
    elsewhere = DATA + 0x10_0000
    domain = rig.host.driver.create_domain()
    for place, page in enumerate(rig.pages):
        domain.map(page, elsewhere + 2 * PAGE * place, PAGE)
    rig.host.concern(rig.port)
    rig.host.driver.attach(STREAM, domain)
    assert rig.write(IOVA, pages(FOUR)) == 4 * PAGE
    assert rig.ram(DATA, 4 * PAGE) == bytes(4 * PAGE)
    assert rig.ram(elsewhere, 8 * PAGE) == pages(b"\1\0\2\0\3\0\4\0")


def test_what_is_left_out_is_an_abort_after_what_came_before_it(rig: HostRig) -> None:
    rig.attach(rig.pages[2])
    assert rig.write(IOVA + 8, pages(FOUR)) == 2 * PAGE - 8, "what passes before the hole"
    assert rig.host.driver.events() == [], "the fault comes when the page is asked for"
    reason = f"host SMMU, stream 0x10: abort at {rig.pages[2] + 4:#x}: F_TRANSLATION"
    with pytest.raises(DmaFault, match=reason) as raised:
        rig.write(IOVA + 2 * PAGE + 4, pages(b"\1\2"))
    assert (raised.value.address, raised.value.done) == (IOVA + 2 * PAGE + 4, 0)
    assert rig.host.driver.events() == [
        fault(EventType.F_TRANSLATION, rig.pages[2] + 4, rnw=False),
    ]
    assert rig.guest.driver.events() == [], "the guest's SMMU has nothing to say"
    assert rig.in_flight() == (0, 0)
    assert rig.ram(rig.pages[2]) == bytes(PAGE)
    assert [each for each in rig.events if isinstance(each, DmaMoved | DmaRefused)] == [
        DmaMoved(
            STREAM, None, IOVA + 8, 2 * PAGE - 8, write=True, first=rig.pages[0] + 8, transaction=0
        ),
        DmaRefused(STREAM, IOVA + 2 * PAGE + 4, write=True, why=reason),
    ]


def test_a_fault_of_the_guest_comes_first(rig: HostRig) -> None:
    rig.attach()
    with pytest.raises(DmaFault, match=r"DMA aborted at 0x20000: stream 0x10"):
        rig.write(2 * IOVA, b"abcd")
    assert [each.event for each in rig.guest.driver.events()] == [EventType.F_TRANSLATION]
    assert rig.host.driver.events() == []
    assert "Translated" not in rig.of_host()


def test_read_only_for_the_host(rig: HostRig) -> None:
    domain = rig.attach(rig.pages[0])
    domain.map(rig.pages[0], rig.pages[0], PAGE, READ_ONLY)
    rig.port.begin(IOVA, PAGE, write=False).done()
    with pytest.raises(DmaFault, match="F_PERMISSION"):
        rig.write(IOVA, b"abcd")
    assert [each.event for each in rig.host.driver.events()] == [EventType.F_PERMISSION]


def test_to_the_host_a_transaction_is_data_of_its_stream() -> None:
    rig = HostRig(behind=False)
    rig.attach()
    attributes = DmaAttributes(privileged=True, instruction=True)
    rig.port.begin(DATA, 8, write=False, substream_id=5, attributes=attributes).done()
    assert rig.host.driver.events() == []


def test_a_translated_transaction_passes_the_host_too(rig: HostRig) -> None:
    assert rig.port.ats is not None
    rig.port.ats.capability.written(struct.pack("<HH", 0, ATS_ENABLE))
    translated = DmaAttributes(ats=True)
    with rig.port.begin(IOVA, 4 * PAGE, write=True, attributes=translated) as transfer:
        assert transfer.size == 4 * PAGE
    rig.attach(rig.pages[1])
    with rig.port.begin(IOVA, 4 * PAGE, write=True, attributes=translated) as transfer:
        assert transfer.size == PAGE
        transfer.write_from(pages(b"\5"))
    assert rig.ram(rig.pages[0]) == pages(b"\5")
    with pytest.raises(DmaFault, match=r"host SMMU, .* F_TRANSLATION"):
        rig.port.begin(IOVA + PAGE, PAGE, write=True, attributes=translated)
    assert rig.in_flight() == (0, 0)
    # What the function remembers of the guest's SMMU is no way past the host's.
    held = rig.port.begin(IOVA, PAGE, write=True, attributes=translated)
    rig.work = held.done
    rig.host.driver.detach(STREAM)
    with pytest.raises(DmaFault, match="host SMMU"):
        rig.port.begin(IOVA, PAGE, write=True, attributes=translated)


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("concerned", [True, False])
def test_a_block_waits_for_what_is_in_flight(behind: bool, concerned: bool) -> None:
    """Also for what went out before the host SMMU had anything to do with the stream."""
    rig = HostRig(behind=behind)
    if concerned:
        rig.attach()
    held = rig.port.begin(IOVA if behind else DATA, PAGE, write=True)
    looks = []

    def work() -> None:
        looks.append(rig.ram(rig.pages[0] if behind else DATA, 1))
        if len(looks) == 3:
            held.write_from(pages(b"\7"))
            held.done()

    rig.work = work
    rig.host.concern(rig.port)
    assert rig.in_flight() == (behind, 1)
    rig.host.driver.detach(STREAM)
    assert looks == [b"\0"] * 3, "it was in flight while the host's driver waited"
    assert rig.in_flight() == (0, 0)
    with pytest.raises(DmaFault, match="host SMMU"):
        rig.write(IOVA if behind else DATA, b"abcd")


def test_a_block_that_waits_in_vain_is_a_block(rig: HostRig) -> None:
    held = rig.port.begin(IOVA, PAGE, write=True)
    rig.host.concern(rig.port)
    with pytest.raises(DriverTimeout, match="CMD_SYNC"):
        rig.host.driver.detach(STREAM)
    with pytest.raises(DmaFault, match="host SMMU"):
        rig.write(IOVA, b"abcd")
    # What comes behind the command that hangs goes on with it.
    rig.work = held.done
    rig.host.driver.detach(STREAM)
    rig.host.release(rig.port)
    rig.write(IOVA, b"abcd")


def test_one_transaction_holds_up_both_smmus(rig: HostRig) -> None:
    rig.attach()
    held = rig.port.begin(IOVA, PAGE, write=True)
    assert rig.in_flight() == (1, 1)
    rig.guest.while_polling = held.done
    rig.guest.driver.detach(STREAM)
    assert rig.in_flight() == (0, 0)


def test_an_unmap_of_the_host_waits_and_holds(rig: HostRig) -> None:
    domain = rig.attach(rig.pages[1])
    domain.map(rig.pages[1], rig.pages[1], PAGE)
    held = rig.port.begin(IOVA + PAGE, PAGE, write=True)
    rig.work = held.done
    domain.unmap(rig.pages[1], PAGE)
    assert rig.in_flight() == (0, 0)
    with pytest.raises(DmaFault, match="F_TRANSLATION"):
        rig.write(IOVA + PAGE, b"abcd")


def test_a_stream_is_let_go_with_a_transaction_in_flight(rig: HostRig) -> None:
    rig.attach()
    current = rig.port.begin(IOVA, PAGE, write=True)

    def work() -> None:
        nonlocal current
        current.done()
        current = rig.port.begin(IOVA, 8, write=True)

    rig.work = work
    rig.host.release(rig.port)
    assert rig.port.host is None
    assert rig.in_flight() == (1, 0), "the last one began in the host SMMU and ends without it"
    current.write_from(b"abcdefgh")
    current.done()
    assert rig.in_flight() == (0, 0)
    assert rig.ram(rig.pages[0], 8) == b"abcdefgh"


def test_the_trace_tells_the_two_smmus_apart(rig: HostRig) -> None:
    rig.attach()
    rig.events.clear()
    rig.write(IOVA, b"abcd")
    host = rig.events[0]
    assert isinstance(host, HostSmmuEvent)
    assert isinstance(host.event, StructureFetched)
    assert host.as_dict() == {
        "kind": "HostSmmuEvent",
        "event": {
            "kind": "StructureFetched",
            "structure": "STE",
            "stream_id": STREAM,
            "substream_id": None,
            "address": host.event.address,
            "text": host.event.text,
        },
    }
    assert rig.of_host() == ["StructureFetched", "StructureFetched", "Translated"]
    assert [each.kind for each in rig.events if each.kind != "HostSmmuEvent"] == ["DmaMoved"]
