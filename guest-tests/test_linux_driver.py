"""The guest kernel's own `arm-smmu-v3` drives the SMMU: attach, DMA and detach by what a stock kernel offers.

The kernel is Debian's, or the one that `--viommu-kernel` and `--viommu-modules` name. No module of ours is in it.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from linux_rig import (
    DOMAINS,
    LinuxRig,
    Ran,
    Result,
    Steps,
    commands,
    contexts,
    id_registers,
    late,
    logged,
    reads,
    ste_updates,
    syncs,
)
from pexpect import EOF, spawn

from viommu.lab.device_tree import SmmuTree
from viommu.lab.linux_smmu import SmmuMisplaced
from viommu.layouts.records import EventType, FaultClass

MACHINE = "aarch64-virt"
STREAM = 0x10  # function 00:02.0
ENGINE = "0000:00:02.0"
DRIVER = "/sys/bus/pci/drivers/vfio-pci"
DEVICES = "/sys/bus/pci/devices"
GROUP_TYPE = f"{DEVICES}/{ENGINE}/iommu_group/type"
MIB = 1 << 20
DESTINATION = 0x2_2000_0000
ROUNDS = 50
RSS_LIMIT_KIB, SLAB_LIMIT_KIB = 4096, 256
"""How much the server and the kernel may grow in many rounds: their allocators' own noise."""

Case = Callable[[str], Result]
Group = Callable[[str], Ran]
Profiled = Callable[[str], LinuxRig]


# Probe


# Features of the driver that one field of an ID register gives: the feature's bit, the field's register, lowest
# bit and width, and the values that mean yes.
FEATURES = {
    "2_LVL_STRTAB": (0, "IDR0", 27, 2, {1}),
    "2_LVL_CDTAB": (1, "IDR0", 19, 1, {1}),
    "TT_LE": (2, "IDR0", 21, 2, {0, 2}),
    "TT_BE": (3, "IDR0", 21, 2, {0, 3}),
    "PRI": (4, "IDR0", 16, 1, {1}),
    "ATS": (5, "IDR0", 10, 1, {1}),
    "SEV": (6, "IDR0", 14, 1, {1}),
    "MSI": (7, "IDR0", 13, 1, {1}),
    "COHERENCY": (8, "IDR0", 4, 1, {1}),
    "TRANS_S1": (9, "IDR0", 1, 1, {1}),
    "TRANS_S2": (10, "IDR0", 0, 1, {1}),
    "STALLS": (11, "IDR0", 24, 2, {0, 2}),
    "HYP": (12, "IDR0", 9, 1, {1}),
    "STALL_FORCE": (13, "IDR0", 24, 2, {2}),
    "VAX": (14, "IDR5", 10, 2, {1}),
    "RANGE_INV": (15, "IDR3", 10, 1, {1}),
    "ATTR_TYPES_OVR": (20, "IDR1", 27, 1, {1}),
    "HA": (21, "IDR0", 6, 2, {1, 2}),
    "HD": (22, "IDR0", 6, 2, {2}),
}
ADDRESS_BITS = (32, 36, 40, 42, 44, 48, 52)


def field(registers: dict[str, int], name: str, low: int, width: int) -> int:
    return registers[name] >> low & (1 << width) - 1


def test_the_probe_has_no_error_but_the_first(linux: LinuxRig) -> None:
    raw = linux.run("dmesg -r").splitlines()
    told = [line for line in raw if re.search("smmu|iommu", line, re.IGNORECASE)]
    # The level of a line is its number modulo 8: 4 is a warning, less is worse.
    bad = [
        line for line in told if (level := re.match(r"<(\d+)>", line)) and int(level[1]) % 8 <= 4
    ]
    assert len(bad) == 1, bad
    assert bad[0].endswith("8000000000.iommu: unknown/unsupported TT endianness!")


def test_features_and_sizes_are_those_of_the_id_registers(linux: LinuxRig) -> None:
    log = linux.run("dmesg | grep arm-smmu-v3")
    registers = linux.id_registers
    assert {"IDR0", "IDR1", "IDR3", "IDR5"} <= set(registers)
    told = re.search(r"(?:ias (\d+)-bit, )?oas (\d+)-bit \(features 0x([0-9a-f]+)\)", log)
    assert told is not None, log
    features = int(told[3], 16)
    found = {name for name, (bit, *_) in FEATURES.items() if features >> bit & 1}
    advertised = {
        name
        for name, (_, register, low, width, yes) in FEATURES.items()
        if field(registers, register, low, width) in yes
    }
    # A kernel that was built without PCI PRI, as Debian's is, does not look at that bit.
    assert found in (advertised, advertised - {"PRI"})
    size = ADDRESS_BITS[field(registers, "IDR5", 0, 3)]
    assert {int(bits) for bits in told.group(1, 2) if bits} == {size}  # newer kernels tell one
    for queue, low in (("cmdq", 21), ("evtq", 16)):
        entries = 1 << field(registers, "IDR1", low, 5)
        assert f"allocated {entries} entries for {queue}" in log


def test_every_engine_has_a_group(linux: LinuxRig) -> None:
    groups = linux.run(
        "cd /sys/kernel/iommu_groups; for g in *; do ls $g/devices; cat $g/type; done"
    )
    assert groups.split() == ["0000:00:02.0", "DMA", "0000:00:03.0", "DMA"]
    assert linux.run("ls /sys/class/iommu").split() == ["smmu3.0x0000008000000000"]


def test_an_smmu_that_is_elsewhere_is_told(linux: LinuxRig) -> None:
    smmu = linux.rig.smmu
    assert smmu is not None
    elsewhere = replace(smmu, tree=SmmuTree(b"", 0x80_4000_0000))
    with pytest.raises(SmmuMisplaced, match=r"0x8000000000, .* 0x8040000000"):
        elsewhere.bind(linux.rig.guest)


def test_viommu_boot(kernel: dict[str, Any]) -> None:
    """What a user types. It ends as a user ends it."""
    names = {"image": "guest"}
    options = [f"--{names.get(name, name)}={value}" for name, value in kernel.items()]
    command = ["-P", "-m", "viommu.cli", "boot", f"--append={DOMAINS}", *options, MACHINE]
    console = spawn(sys.executable, command, timeout=60)
    console.expect_exact("guest# ")
    console.send(f"echo $(cat {GROUP_TYPE}) by $(basename $(readlink {DEVICES}/{ENGINE}/driver))\n")
    console.expect_exact("\nDMA by vfio-pci")
    console.send("\x1d")
    console.expect(EOF)


# Commands


def test_sync_by_polling_memory(linux: LinuxRig) -> None:
    events = linux.events_of(lambda: linux.cases("vfio open-close"))
    texts = commands(linux.boot_events + events, "CMD_SYNC")
    assert len(texts) > 20
    assert all("cs=SIG_IRQ" in text and re.search("msi_address=0x[1-9a-f]", text) for text in texts)
    # The queue's indices are not looked at, but for the space in it.
    assert reads(events, "CMDQ_CONS") == 0


def test_sync_by_polling_the_register(profiled: Profiled) -> None:
    wired = profiled("msi = false")
    assert not wired.id_registers["IDR0"] >> 13 & 1
    events = wired.events_of(lambda: wired.cases("vfio open-close"))
    texts = commands(wired.boot_events + events, "CMD_SYNC")
    assert len(texts) > 20
    assert not any("SIG_IRQ" in text or "msi_address" in text for text in texts)
    assert reads(events, "CMDQ_CONS") >= len(commands(events, "CMD_SYNC"))


def test_without_msis_dma_and_events_work(profiled: Profiled) -> None:
    check(profiled("msi = false").cases("vfio unmap"))


def steps(linux: LinuxRig) -> tuple[int, int]:
    """CMD_SYNCs to take an STE from bypass to abort or back, and from a CD table to bypass or back.

    The kernel's own tests of its driver expect 2 and 3. A bypass STE differs from an abort STE in a second word, and
    so takes a step more, only where the SMMU can override attributes (IDR1.ATTR_TYPES_OVR).
    """
    return (2, 3) if linux.id_registers["IDR1"] >> 27 & 1 else (1, 2)


STE, CD = "CMD_CFGI_STE", "CMD_CFGI_CD"


def test_syncs_of_a_type_change(linux: LinuxRig) -> None:
    def change(kind: str) -> Steps:
        events = linux.events_of(lambda: linux.run(f"echo {kind} > {GROUP_TYPE}"))
        assert linux.run(f"cat {GROUP_TYPE}").strip() == kind
        return syncs(events)

    _, bypass = steps(linux)
    assert change("identity") == [(STE, bypass), (CD, 2)]  # and the CD is cleared
    assert change("DMA") == [(CD, 2), (STE, bypass)]
    assert change("DMA-FQ") == []  # the same domain from now on
    assert change("DMA") == [(CD, 3)]  # ASID and table change: not without an invalid CD in between


def test_syncs_of_vfio(linux: LinuxRig) -> None:
    """Open: to the blocked domain, to a new one. Close: to the blocked domain, to the default domain.

    Newer kernels block a function that has ATS around each of its resets too, and so there are more updates.
    """
    events = linux.events_of(lambda: linux.cases("vfio open-close"))
    updates = ste_updates(events)
    assert len(updates) >= 4
    assert set(updates) == {2}
    # With each, a CD is written or cleared.
    assert sum(count for kind, count in syncs(events) if kind == CD) == 2 * len(updates)


def test_syncs_of_vfio_from_identity(linux: LinuxRig) -> None:
    abort, _ = steps(linux)
    linux.run(f"echo identity > {GROUP_TYPE}")
    updates = ste_updates(linux.events_of(lambda: linux.cases("vfio open-close")))
    linux.run(f"echo DMA > {GROUP_TYPE}")
    assert len(updates) >= 4
    assert (updates[0], updates[1], updates[-1]) == (abort, 2, abort)
    assert set(updates) <= {abort, 2}


def test_syncs_of_remove_and_rescan(linux: LinuxRig) -> None:
    removed = linux.events_of(lambda: linux.run(f"echo 1 > {DEVICES}/{ENGINE}/remove"))
    assert syncs(removed) == [(STE, 2), (CD, 2)]
    found = linux.events_of(lambda: linux.run(RESCAN))
    assert syncs(found) == [(CD, 2), (STE, 2)]


# VFIO from user space


def check_refused(result: Result, event: EventType, address: int) -> None:
    """A write of 64 bytes faulted, nothing landed, one interrupt came, and the kernel logged the record."""
    assert (result["status"], result["error_address"]) == ("ERROR", address)
    assert result["zero"]
    assert result["interrupts"] == 1
    (record,) = logged(result["log"])
    assert (record.event, record.stream_id, record.address) == (event, STREAM, address)
    assert (record.rnw, record.fault_class) == (False, FaultClass.IN)


def check_dma(result: Result) -> None:
    """Both ways, from one page to 64 MiB."""
    page = result["page"]
    sizes = [page, 4 * page, 2 * MIB, 2 * MIB, 64 * MIB]
    assert [each["size"] for each in result["results"]] == sizes
    for each in result["results"]:
        assert (each["status"], each["wrong_pages"], each["unmapped"]) == ("HALTED", 0, True), each


def check_not_mapped(result: Result, address: int) -> None:
    """A write before landed."""
    assert (result["before"], result["landed"]) == ("HALTED", True)
    check_refused(result, EventType.F_TRANSLATION, address)


def check_in_flight(result: Result) -> None:
    """A DMA that was met in the middle stayed there."""
    assert result["running"]
    assert 0 < result["untouched"] < result["pages"]
    assert result["late"] == 0
    assert result.get("outcomes", ["ERROR"]) == ["ERROR"]


def check_reopen(result: Result) -> None:
    """A container has nothing of the one before."""
    assert (result["mapped"], result["forgotten"], result["zero"]) == ("HALTED", "ERROR", True)
    assert (result["again"], result["landed"]) == ("HALTED", True)


def check_isolated(result: Result) -> None:
    assert (result["status"], result["landed"]) == (["HALTED"] * 2, [True] * 2)
    assert (result["other"], result["zero"], result["own"]) == ("ERROR", True, "HALTED")


def check_rounds(result: Result) -> None:
    assert result["good"] == result["rounds"]


CHECKS: dict[str, Callable[[Result], None]] = {
    "vfio/dma": check_dma,
    "vfio/unmap": lambda result: check_not_mapped(result, DESTINATION + 64),
    "vfio/read-only": lambda result: check_refused(result, EventType.F_PERMISSION, DESTINATION),
    "vfio/last-page": lambda result: check_not_mapped(result, result["end"]),
    "vfio/close-in-flight": check_in_flight,
    "vfio/unmap-in-flight": check_in_flight,
    "vfio/reopen": check_reopen,
    "vfio/isolated": check_isolated,
    "vfio/few-rounds": check_rounds,
    "vfio/rounds": check_rounds,
}


def check(results: list[Result]) -> None:
    for result in results:
        assert "error" not in result, result["error"]
        CHECKS[result["case"]](result)


@pytest.mark.parametrize("name", CHECKS)
def test_vfio(case: Case, name: str) -> None:
    CHECKS[name](case(name))


def test_the_granule_is_the_kernels_page(linux: LinuxRig) -> None:
    page = linux.run("grep -m 1 KernelPageSize /proc/self/smaps").split()[1:]
    granule = {"4": None, "16": "0x2", "64": "0x1"}[page[0]]
    events = linux.events_of(lambda: linux.cases("vfio unmap"))
    texts = contexts(linux.boot_events + events)
    assert texts
    for text in texts:
        found = re.search(r"tg0=(\w+)", text)
        assert (found and found[1]) == granule, text


# The same on other SMMUs

QUICK = "vfio unmap read-only close-in-flight unmap-in-flight reopen isolated few-rounds"


def test_vfio_where_stage_2_is_all_there_is(profiled: Profiled) -> None:
    linux = profiled("stage_1 = false")
    assert linux.id_registers["IDR0"] & 3 == 1
    results: list[Result] = []
    events = linux.events_of(lambda: results.extend(linux.cases(QUICK)))
    check(results)
    for record in (record for result in results[:2] for record in logged(result["log"])):
        assert (record.s2, record.ipa) == (True, record.address & ~0xFFF)
    assert not commands(events, "CMD_CFGI_CD")
    assert commands(events, "CMD_TLBI_S12_VMALL")
    # The domain of stage 2 is in the STE itself.
    assert set(ste_updates(linux.events_of(lambda: linux.cases("vfio open-close")))) == {2}
    flip = f"echo identity > {GROUP_TYPE}; echo DMA > {GROUP_TYPE}"
    assert syncs(linux.events_of(lambda: linux.run(flip))) == [(STE, 4)]


def test_iovas_are_as_wide_as_the_driver_says(profiled: Profiled) -> None:
    """With VAX and pages of 64 KiB up to 52 bits, as many as the kernel's own addresses may have; otherwise 48."""
    linux = profiled("output_address_bits = 52")
    results: list[Result] = []
    events = linux.events_of(lambda: results.extend(linux.cases("vfio last-page")))
    check(results)
    sizes = {int(size, 16) for size in re.findall(r"t0sz=(\w+)", " ".join(contexts(events)))}
    assert {1 << 64 - size for size in sizes} == {results[0]["end"]}


def test_the_driver_forgets_no_invalidation(profiled: Profiled) -> None:
    """An SMMU that keeps everything until it is told, and fetches ahead, is one that it can drive."""
    linux = profiled('caching = "hostile"')
    check(linux.cases(QUICK))
    flip, remove = linux.cases("groups")
    check_flip(flip)
    check_remove(remove)


# Other knobs


def test_type_change_with_dma_in_flight(case: Case) -> None:
    check_flip(case("groups/flip"))


def test_remove_with_dma_in_flight(case: Case) -> None:
    check_remove(case("groups/remove"))


def test_a_sync_waits_for_what_was_translated_before(group: Group) -> None:
    events = group("groups").events
    assert any(event["kind"] == "SyncWaiting" for event in events)
    assert late(events) == []
    assert late(group("vfio").events) == []


def check_flip(result: Result) -> None:
    assert result["running"]
    assert 0 < result["landed"] < result["size"]
    assert not result["late"]
    assert set(result["status"]) == {"ERROR"}
    records = logged(result["log"])
    assert records
    assert {(record.event, record.stream_id) for record in records} == {
        (EventType.F_TRANSLATION, STREAM)
    }


def check_remove(result: Result) -> None:
    assert result["running"]
    assert 0 < result["landed"] < result["size"]
    assert not result["late"]


PROBE = f"echo vfio-pci > {DEVICES}/{ENGINE}/driver_override; echo {ENGINE} > /sys/bus/pci/drivers_probe"
RESCAN = f"echo 1 > /sys/bus/pci/rescan; {PROBE}"
UNBIND, BIND = f"echo {ENGINE} > {DRIVER}/unbind", f"echo {ENGINE} > {DRIVER}/bind"
VFIO = "python3 /viommu/inside/linux.py vfio"
FLIPS = f"for t in identity DMA DMA-FQ DMA; do echo $t > {GROUP_TYPE} || exit 1; done"


def times(rounds: int, commands: str) -> str:
    return f"set -e; i=0; while [ $i -lt {rounds} ]; do {commands}; i=$((i+1)); done"


KNOBS: dict[str, Callable[[int], str]] = {
    "bind": lambda rounds: times(rounds, f"{UNBIND}; {BIND}"),
    "type": lambda rounds: times(rounds, FLIPS),
    "type-unbound": lambda rounds: f"{UNBIND}; ({times(rounds, FLIPS)}) && {BIND}",
    "remove": lambda rounds: times(rounds, f"echo 1 > {DEVICES}/{ENGINE}/remove; {RESCAN}"),
    "vfio": lambda rounds: (
        f"{VFIO} {'rounds' if rounds == ROUNDS else 'few-rounds'} | grep '\"good\": {rounds},'"
    ),
}
# What the CPUs have counted for themselves has to be added up first.
COUNTERS = """
    cat /proc/sys/vm/stat_refresh
    grep -e iommu -e sec_page /proc/vmstat
    ls -R /sys/kernel/iommu_groups
    ls /proc/self/fd
"""


def resident(pid: int) -> int:
    """KiB of memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])


def belongings(linux: LinuxRig) -> dict[str, object]:
    """All that grows where something leaks, on both sides."""
    server, qemu = linux.rig.serving.pid, linux.rig.guest.pid
    return {
        "guest": linux.run(COUNTERS),
        "server": linux.holds(),
        "descriptors": [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (server, qemu)],
    }


@pytest.mark.parametrize("knob", KNOBS)
def test_rounds_leave_nothing(linux: LinuxRig, knob: str) -> None:
    # The first rounds fill caches that stay.
    linux.run(KNOBS[knob](5))
    before, memory, objects = belongings(linux), resident(linux.rig.serving.pid), slab(linux)
    linux.run(KNOBS[knob](ROUNDS))
    assert belongings(linux) == before
    assert resident(linux.rig.serving.pid) - memory < RSS_LIMIT_KIB
    assert slab(linux) - objects < SLAB_LIMIT_KIB
    assert not linux.rig.serving.output()


def slab(linux: LinuxRig) -> int:
    """KiB of the kernel's objects. Free memory tells less: each CPU keeps some for itself."""
    command = "echo 3 > /proc/sys/vm/drop_caches; grep SUnreclaim /proc/meminfo"
    return int(linux.run(command).split()[1])


def test_live_type_change_of_a_bound_function(linux: LinuxRig) -> None:
    """With a driver that uses the DMA API the kernel lets nobody leave the domain, but its flushes may become lazy."""
    script = f"""
    modprobe uio_pci_generic 2>/dev/null
    {UNBIND}; echo uio_pci_generic > {DEVICES}/{ENGINE}/driver_override; echo {ENGINE} > /sys/bus/pci/drivers_probe
    for t in identity DMA-FQ; do echo $t > {GROUP_TYPE} 2>/dev/null; cat {GROUP_TYPE}; done
    echo {ENGINE} > /sys/bus/pci/drivers/uio_pci_generic/unbind
    for t in identity DMA; do echo $t > {GROUP_TYPE}; cat {GROUP_TYPE}; done
    {PROBE}
    """
    assert linux.run(script).split() == ["DMA", "DMA-FQ", "identity", "DMA"]


LEAVE_RUNNING = """
    python3 /viommu/inside/linux.py left > /run/left 2>&1 &
    for i in $(seq 100); do [ -s /run/started ] && break; sleep 0.1; done
    cat /run/left
    grep True /run/started
"""


def test_the_guest_reboots_and_the_server_stays(
    linux: LinuxRig, request: pytest.FixtureRequest
) -> None:
    """Each boot probes the SMMU anew and finds nothing of the one before, which ended in the middle of a DMA."""
    before = belongings(linux)
    pid = linux.rig.serving.pid
    for _ in range(int(request.config.getoption("reboots"))):
        linux.run(LEAVE_RUNNING)
        events = linux.events_of(linux.rig.reboot)
        ended = [event["status"] for event in events if event["kind"] == "EngineEnded"]
        # The driver switches the SMMU off when the kernel goes down: from there on no IOVA means anything.
        assert ended == ["ERROR"]
        assert id_registers(events) == linux.id_registers
        assert sum(event["kind"] == "FunctionReset" for event in events) == 3
        assert not [
            event for event in events if event["kind"] in ("ClientDetached", "ClientAttached")
        ]
        after = belongings(linux)
        assert {k: after[k] for k in ("server", "descriptors")} == {
            k: before[k] for k in ("server", "descriptors")
        }
        check(linux.cases("vfio reopen"))
    assert (linux.rig.serving.pid, linux.rig.serving.exit_code) == (pid, None)
