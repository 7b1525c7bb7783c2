"""Which status each call has in each state; that a refused call changes nothing."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import pytest

from tests.domain_rig import IOVA, DomainRig, acpi_device
from tests.domain_tables import DEVICES, TYPES, in_the_document, table
from tests.driver_rig import DATA, MEGA2, PAGE, RAM
from viommu.driver.domains import (
    AttachmentState,
    ContiguousRange,
    DmaDevice,
    DmaDomain,
    DmaRemapping,
    DomainConfiguration,
    DomainType,
    FaultConfiguration,
    IdMapping,
    NtStatus,
)
from viommu.driver.errors import OutOfMemory
from viommu.driver.page_tables import READ_WRITE
from viommu.smmu import Features


class Scene(NamedTuple):
    rig: DomainRig
    remapping: DmaRemapping
    domain: DmaDomain
    device: DmaDevice


Call = Callable[[Scene], NtStatus]


# A device of several streams and a domain


def _attached(scene: Scene) -> None:
    scene.rig.attach(scene.domain, scene.device, 0, 2)


def _attached_elsewhere(scene: Scene) -> None:
    scene.rig.attach(scene.rig.domain(address=DATA), scene.device, 0, 2)


def _detached_again(scene: Scene) -> None:
    _attached(scene)
    scene.rig.detach(scene.domain, scene.device)


def _blocked(scene: Scene) -> None:
    _attached(scene)
    with scene.rig.stuck():
        assert scene.remapping.detach_device(scene.domain, scene.device) is NtStatus.IO_TIMEOUT


def _deleted(scene: Scene) -> None:
    assert scene.remapping.delete_domain(scene.domain) is NtStatus.SUCCESS


STATES: dict[str, Callable[[Scene], None]] = {
    "detached": lambda scene: None,
    "attached": _attached,
    "attached elsewhere": _attached_elsewhere,
    "detached again": _detached_again,
    "blocked": _blocked,
    "deleted": _deleted,
}
SOMEBODY = FaultConfiguration(lambda fault: None)
ALIAS = DmaDevice("alias", 0x20)


def _attach(base: int, count: int) -> Call:
    return lambda s: s.remapping.attach_device(s.domain, s.device, base, count)


def _detach(base: int) -> Call:
    return lambda s: s.remapping.detach_device(s.domain, s.device, base)


def _report(base: int, enable: bool, config: FaultConfiguration | None) -> Call:
    return lambda s: s.remapping.set_device_fault_reporting(s.device, base, enable, config)


CALLS: dict[str, Call] = {
    **{f"attach({b}, {c})": _attach(b, c) for b in (0, 1, 2, 4) for c in (0, 1, 2, 3)},
    "alias.attach(0, 1)": lambda s: s.remapping.attach_device(s.domain, ALIAS),
    **{f"detach({base})": _detach(base) for base in (0, 1, 2, 4)},
    **{f"report({base}, on)": _report(base, True, SOMEBODY) for base in (0, 1, 2, 4)},
    "report(0, off)": _report(0, False, None),
    "report(0, nobody)": _report(0, True, None),
    "flush": lambda s: s.remapping.flush_domain(s.domain),
    "delete": lambda s: s.remapping.delete_domain(s.domain),
}


def look(scene: Scene) -> dict[str, object]:
    """All that a refused call must leave as it is."""
    device, rig = scene.device, scene.rig
    return {
        "told": list(rig.seen),
        "states": [scene.remapping.state(device, each) for each in device.streams],
        "alias": scene.remapping.state(ALIAS),
        "streams": set() if scene.domain.space is None else set(scene.domain.space.streams),
        "dma": [rig.reaches(stream_id) for stream_id in device.streams.values()],
    }


@pytest.mark.parametrize(("key", "status"), table(DEVICES).items(), ids=lambda v: str(v))
def test_each_call_in_each_state(key: tuple[str, str], status: NtStatus) -> None:
    call, state = key
    rig = DomainRig()
    scene = Scene(rig, rig.remapping, rig.domain(address=DATA), acpi_device())
    STATES[state](scene)
    rig.driver.events()
    before = look(scene)
    rig.driver.events()
    assert CALLS[call](scene) is status
    rig.driver.events()
    if not status.success:
        assert look(scene) == before


def test_a_refused_call_writes_to_no_table_and_gives_no_command() -> None:
    for (call, state), status in table(DEVICES).items():
        if status.success:
            continue
        rig = DomainRig()
        scene = Scene(rig, rig.remapping, rig.domain(address=DATA), acpi_device())
        STATES[state](scene)
        rig.smmu.step()
        before, (commands, _) = rig.tables, rig.commands()
        assert CALLS[call](scene) is status
        assert rig.tables == before
        assert commands == []


def test_the_misuses_of_attach_and_detach_can_be_told_apart() -> None:
    found = table(DEVICES)
    misuses = [
        found["detach(0)", "detached"],  # not attached
        found["detach(2)", "attached"],  # a wrong base
        found["detach(1)", "attached"],  # a member instead of the base
        found["attach(0, 2)", "attached"],  # a second attach
        found["detach(0)", "detached again"],  # a detach twice
        found["detach(0)", "deleted"],  # a deleted domain
        found["attach(0, 2)", "attached elsewhere"],
        found["detach(0)", "attached elsewhere"],
    ]
    assert len(set(misuses)) == len(misuses)
    assert not any(status.success for status in misuses)


# Types of domains

BLOCK, FREE = IOVA + 16 * MEGA2 - IOVA % MEGA2, 0x800_0000
ROOT = RAM + 0x1000


def _configure(root: int, bits: int | None) -> Call:
    configuration = DomainConfiguration(ttbr0=root, input_size0=bits)
    return lambda s: s.remapping.configure_domain(s.domain, configuration)


def _map(physical: ContiguousRange | list[int], address: int = FREE) -> Call:
    return lambda s: s.remapping.map_logical_range(s.domain, READ_WRITE, physical, address)


def _unmap(address: int, pages: int) -> Call:
    return lambda s: s.remapping.unmap_logical_range(s.domain, address, pages)


def _flush_list(*addresses: int) -> Call:
    return lambda s: s.remapping.flush_domain_va_list(s.domain, True, addresses)


ONE = ContiguousRange(DATA, PAGE)
TYPE_CALLS: dict[str, Call] = {
    "configure(root)": _configure(ROOT, 39),
    "configure(odd)": _configure(ROOT + 8, 39),
    "configure(far)": _configure(1 << 48, 39),
    "configure(none)": _configure(ROOT, None),
    "configure(24 bits)": _configure(ROOT, 24),
    "map(page)": _map(ONE),
    "map(pages)": _map([DATA + PAGE, DATA]),
    "map(odd memory)": _map(ContiguousRange(DATA + 1, PAGE)),
    "map(no memory)": _map([]),
    "map(far memory)": _map([1 << 48]),
    "map(odd address)": _map(ONE, FREE + 1),
    "map(far address)": _map(ONE, 1 << 48),
    "map(mapped)": _map([DATA, DATA], IOVA - PAGE),
    "unmap(page)": _unmap(IOVA, 1),
    "unmap(block)": _unmap(BLOCK, 512),
    "unmap(half a block)": _unmap(BLOCK, 256),
    "unmap(hole)": _unmap(FREE, 1),
    "unmap(page, hole)": _unmap(IOVA, 2),
    "unmap(odd address)": _unmap(IOVA + 1, 1),
    "unmap(no pages)": _unmap(IOVA, 0),
    "unmap(too many)": _unmap(IOVA, 1 << 40),
    "flush": lambda s: s.remapping.flush_domain(s.domain),
    "flush list": _flush_list(IOVA, FREE),
    "flush odd list": _flush_list(IOVA, FREE + 1),
    "attach": lambda s: s.remapping.attach_device(s.domain, s.device),
    "delete": lambda s: s.remapping.delete_domain(s.domain),
}


def make(rig: DomainRig, kind: str) -> DmaDomain:
    if kind == "translate":
        domain = rig.domain(address=DATA)
        rig.map(domain, BLOCK, DATA, MEGA2)
        return domain
    if kind == "pass-through":
        return rig.domain(DomainType.PASS_THROUGH)
    domain = rig.domain(DomainType.UNMANAGED)
    if kind == "configured":
        configuration = DomainConfiguration(ttbr0=ROOT, input_size0=39)
        assert rig.remapping.configure_domain(domain, configuration) is NtStatus.SUCCESS
    return domain


@pytest.mark.parametrize(("key", "status"), table(TYPES).items(), ids=lambda v: str(v))
def test_each_call_on_each_type(key: tuple[str, str], status: NtStatus) -> None:
    call, kind = key
    rig = DomainRig()
    scene = Scene(rig, rig.remapping, make(rig, kind), acpi_device())
    before, (commands, _) = rig.tables, rig.commands()
    assert TYPE_CALLS[call](scene) is status
    if not status.success:
        assert rig.tables == before
        assert commands == []


def test_every_call_is_in_its_table() -> None:
    assert {call for call, _ in table(TYPES)} == set(TYPE_CALLS)
    assert {state for _, state in table(DEVICES)} == set(STATES)
    assert {call for call, _ in table(DEVICES)} <= set(CALLS)


def test_the_tables_are_those_of_the_document() -> None:
    assert in_the_document(DEVICES)
    assert in_the_document(TYPES)


def test_after_a_delete_every_call_on_the_domain_says_so() -> None:
    for name, call in TYPE_CALLS.items():
        for kind in ("translate", "unmanaged", "configured", "pass-through"):
            rig = DomainRig()
            scene = Scene(rig, rig.remapping, make(rig, kind), acpi_device())
            assert rig.remapping.delete_domain(scene.domain) is NtStatus.SUCCESS
            assert call(scene) is NtStatus.INVALID_HANDLE, (name, kind)


# The rest


def test_a_device_that_is_not_acpi_enumerated_has_one_mapping() -> None:
    rig = DomainRig()
    domain, device = rig.domain(address=DATA), DmaDevice("pci", 0x10)
    attach, detach = rig.remapping.attach_device, rig.remapping.detach_device
    assert attach(domain, device, 1, 1) is NtStatus.INVALID_PARAMETER_3
    assert attach(domain, device, 0, 2) is NtStatus.INVALID_PARAMETER_4
    assert attach(domain, device, 0, 1) is NtStatus.SUCCESS
    assert detach(domain, device, 1) is NtStatus.INVALID_PARAMETER_3
    assert rig.remapping.query_input_mappings(device) == (NtStatus.UNSUCCESSFUL, ())
    assert rig.remapping.query_input_mappings(acpi_device()) == (
        NtStatus.SUCCESS,
        (0, 1, 2, 3, 8),
    )
    assert detach(domain, device, 0) is NtStatus.SUCCESS


def test_a_device_has_one_stream_or_mappings_that_do_not_overlap() -> None:
    for arguments in (
        {"stream_id": None},
        {"stream_id": 1, "id_mappings": [IdMapping(0, 1, 1)]},
        {"id_mappings": [IdMapping(0, 2, 1), IdMapping(1, 1, 8)]},
    ):
        with pytest.raises(ValueError, match="device"):
            DmaDevice("device", **arguments)


def test_a_stream_beyond_the_table_and_features_that_are_not_there() -> None:
    rig = DomainRig(replace(Features(), ats=False, pri=False, stall_model="terminate"))
    domain = rig.domain(address=DATA)
    for device, status in (
        (DmaDevice("far", 0x100), NtStatus.NO_SUCH_DEVICE),
        (DmaDevice("ats", 0x10, ats=True), NtStatus.NOT_SUPPORTED),
        (DmaDevice("stalls", 0x10, stalls=True), NtStatus.NOT_SUPPORTED),
    ):
        assert rig.remapping.attach_device(domain, device) is status
        assert rig.remapping.state(device) is AttachmentState.DETACHED
    assert rig.reaches(0x10) is None
    assert rig.remapping.delete_domain(domain) is NtStatus.SUCCESS


def test_a_domain_of_impossible_size() -> None:
    remapping = DomainRig().remapping
    for bits in (24, 49):
        assert remapping.create_domain(input_bits=bits) == (NtStatus.INVALID_PARAMETER_2, None)


def test_without_memory_nothing_changes() -> None:
    rig = DomainRig()
    domain, device = rig.domain(address=DATA), acpi_device()
    # One table more can be made, not two.
    hoard = rig.arena.allocate(rig.arena.free_bytes - 3 * PAGE, 8)
    free = rig.arena.free_bytes
    scattered = [DATA] * 1024
    assert (
        rig.remapping.map_logical_range(domain, READ_WRITE, scattered, (1 << 47) - MEGA2)
        is NtStatus.INSUFFICIENT_RESOURCES
    )
    assert rig.arena.free_bytes == free
    rest = [rig.arena.allocate(size, 8) for size in (PAGE, PAGE, PAGE - 128)]
    assert rig.remapping.create_domain() == (NtStatus.INSUFFICIENT_RESOURCES, None)
    # Two CDs fit, not four.
    assert rig.remapping.attach_device(domain, device, 0, 4) is NtStatus.INSUFFICIENT_RESOURCES
    assert [rig.remapping.state(device, each) for each in range(4)] == [
        AttachmentState.DETACHED
    ] * 4
    assert [rig.reaches(0x20 + each) for each in range(4)] == [None] * 4
    assert rig.arena.free_bytes == 128
    rig.attach(domain, device, 0, 2)
    for buffer in (hoard, *rest):
        rig.arena.free(buffer)


def test_without_memory_and_without_an_smmu_that_answers() -> None:
    rig = DomainRig()
    domain = rig.domain()
    with suppress(OutOfMemory):
        while True:
            rig.arena.allocate(PAGE, PAGE)
    with rig.stuck():
        status = rig.remapping.map_logical_range(domain, READ_WRITE, ONE, IOVA)
    assert status is NtStatus.IO_TIMEOUT


def test_asids_run_out_and_come_back() -> None:
    rig = DomainRig(replace(Features(), asid_bits=8))
    domains = [rig.domain(DomainType.UNMANAGED) for _ in range(255)]
    assert rig.remapping.create_domain(DomainType.UNMANAGED) == (
        NtStatus.INSUFFICIENT_RESOURCES,
        None,
    )
    assert rig.remapping.delete_domain(domains[3]) is NtStatus.SUCCESS
    space = rig.domain(DomainType.UNMANAGED).space
    assert space is not None
    assert space.asid == 4
