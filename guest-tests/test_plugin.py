"""The pytest plugin on real guests: which tests fail by themselves, what they leave as evidence, who gets which."""

import re
from pathlib import Path

import pytest

from viommu.lab.assets import cache_directory
from viommu.lab.config import machine_directory

CACHE = cache_directory()  # pytester gives each test a home of its own

# In the order in which they run, on as few guests as possible. No body but one fails.
MISBEHAVIOUR = """
    import time
    import pytest

    FAULT = "/viommu/inside/linux.py vfio unmap"
    GUESTS = []

    def fault(guest):
        return guest.python(FAULT, timeout=60)

    def warn(guest):
        # No stock kernel can be made to WARN: it says the word for another reason, and is told that it did.
        guest.check("mkdir -p /mnt; mount -t tmpfs -o mand none /mnt; umount /mnt")
        guest.check("echo $((1 << 9)) > /proc/sys/kernel/tainted")

    def test_good(viommu_guest, viommu_endpoints, viommu_ledger):
        GUESTS.append(viommu_guest.pid)
        assert viommu_ledger.verdict().clean
        assert [endpoint.stream_id for endpoint in viommu_endpoints] == [0x10, 0x18]

    def test_event(viommu_guest):
        assert viommu_guest.pid == GUESTS[0], "a good test leaves a good guest"
        fault(viommu_guest)

    def test_event_expected(viommu_guest, viommu_lab, viommu_smmu):
        assert viommu_guest.pid == GUESTS[0], "an event is no harm to the guest"
        with viommu_lab.expect("F_TRANSLATION .*stream_id=0x10") as found:
            fault(viommu_guest)
        assert len(found) == 1
        assert len(viommu_smmu.events("EventRecorded")) == 1

    @pytest.mark.viommu_allow("F_TRANSLATION")
    def test_event_allowed(viommu_guest):
        fault(viommu_guest)

    def test_disk(viommu_guest):
        viommu_guest.check("modprobe virtio_blk")
        assert viommu_guest.check("head -c 9 /dev/vda") == "on a disk"
        viommu_guest.check("echo other > /dev/vda; sync")
        assert viommu_guest.check("head -n 1 /dev/vda") == "other\\n"

    def test_event_missed(viommu_guest, viommu_lab):
        with viommu_lab.expect("F_PERMISSION"):
            viommu_guest.check("true")

    def test_fails_anyway(viommu_guest):
        viommu_guest.check("echo said on the console")
        assert False, "for a reason of its own"

    def test_warning(viommu_guest):
        assert viommu_guest.pid == GUESTS[0]
        warn(viommu_guest)

    @pytest.mark.viommu_allow("WARNING: The mand mount option", "F_TRANSLATION")
    def test_warning_allowed(viommu_guest, viommu_faults):
        assert viommu_guest.pid != GUESTS[0], "a kernel that warned is not used on"
        GUESTS.append(viommu_guest.pid)
        warn(viommu_guest)
        viommu_faults.load('fault = [{ at = "dma-requested", when = { nth = 1 }, do = "abort" }]')
        assert '"before": "ERROR"' in fault(viommu_guest)
        assert viommu_faults.rules()[0]["count"] == 1

    def test_hang(viommu_guest):
        assert viommu_guest.pid not in GUESTS
        viommu_guest.qmp("stop")

    def test_panic(viommu_guest):
        viommu_guest.check("(sleep 0.2; echo c > /proc/sysrq-trigger) >/dev/null 2>&1 &")
        time.sleep(2)
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIOMMU_CACHE", str(CACHE))


@pytest.fixture
def impatient(pytester: pytest.Pytester) -> Path:
    """A machine whose guest must answer soon."""
    text = (machine_directory() / "aarch64-virt.toml").read_text("utf-8")
    path = pytester.path / "impatient.toml"
    path.write_text(text.replace("command = 30", "command = 12"), "utf-8")
    return path


def failure(output: str, test: str) -> str:
    """What pytest prints of a test that failed."""
    _, _, rest = output.partition(f"_ {test} _")
    assert rest, f"{test} did not fail:\n{output}"
    return rest.partition("\n____")[0]


def test_what_fails_a_test(pytester: pytest.Pytester, impatient: Path) -> None:
    pytester.makepyfile(test_it=MISBEHAVIOUR)
    disk = pytester.path / "disk.img"
    disk.write_bytes(b"on a disk".ljust(1 << 20))
    pytester.makeini(
        f"[pytest]\nviommu_machine = {impatient.name}\nviommu_disk = disk.img\nviommu_ledger = yes\n"
        "viommu_artifacts = kept\n"
    )
    result = pytester.runpytest_subprocess()
    output = result.stdout.str()
    failed = {
        line.split("::")[1].split(" ")[0]
        for line in output.splitlines()
        if line.startswith("FAILED ")
    }
    assert failed == {
        "test_event", "test_event_missed", "test_fails_anyway", "test_warning", "test_hang", "test_panic",
    }, output  # fmt: skip
    result.assert_outcomes(passed=5, failed=6)
    assert disk.read_bytes().startswith(b"on a disk"), "an image is never written to"

    event = failure(output, "test_event")
    assert "\nthe guest did what the test does not foresee:\nSMMU event F_TRANSLATION: 0x" in event
    assert "stream_id=0x10" in event.partition("- aarch64 guest: SMMU events -")[2]
    assert "event 0x10 received" in event.partition("- aarch64 guest: kernel log -")[2]
    ledger = event.partition("- aarch64 guest: ledger -")[2]
    assert "Streams and domains" in ledger
    assert " 0x10 " in ledger
    assert "$ PYTHONPATH=/viommu" in event.partition("- aarch64 guest: console -")[2]
    assert "qemu-system-aarch64" in event.partition("- aarch64 guest: QEMU -")[2]
    assert "did not happen: F_PERMISSION" in failure(output, "test_event_missed")

    own = failure(output, "test_fails_anyway")
    assert "for a reason of its own" in own
    console = own.partition("- aarch64 guest: console -")[2]
    assert "\nsaid on the console\n" in console
    assert "modprobe" not in console, "the console's log begins with the test"

    warning = failure(output, "test_warning")
    assert "\nWARNING: " in warning
    assert (
        "The mand mount option has been deprecated"
        in warning.partition("- aarch64 guest: kernel log -")[2]
    )
    assert "\nno answer within 12 s while " in failure(output, "test_hang")
    panic = failure(output, "test_panic")
    assert "\nthe guest kernel panicked: Kernel panic - not syncing: sysrq triggered crash" in panic
    assert "sysrq_handle_crash" in panic.partition("- aarch64 guest: console -")[2]

    kept = {path.name for path in (pytester.path / "kept/test_it.py-test_event").iterdir()}
    assert kept >= {
        f"aarch64-guest-{part}.txt" for part in ("console", "kernel-log", "SMMU-events", "QEMU")
    }
    trace = pytester.path / "kept/test_it.py-test_event/aarch64-guest-trace.jsonl"
    assert '"kind":"EventRecorded"' in trace.read_text("utf-8")


WORKERS = """
    import os
    import signal
    import pytest

    @pytest.mark.parametrize("number", [1, 2])
    def test_a_guest_each(viommu_rig, number):
        viommu_rig.guest.check("true")
        os.kill(viommu_rig.serving.pid, signal.SIGKILL)
        print("QEMU is", viommu_rig.guest.pid)
"""


def test_workers_have_guests_of_their_own(pytester: pytest.Pytester) -> None:
    """Each kills its server, which fails nothing when it is told to go on."""
    pytester.makepyfile(WORKERS)
    options = ("--viommu-keep-going", "--viommu-raw", "-rP", "-n", "2")
    result = pytester.runpytest_subprocess(*options)
    result.assert_outcomes(passed=2)
    output = result.stdout.str()
    assert output.count("the server of the devices killed by SIGKILL (exit code -9)") == 2
    assert len(set(re.findall(r"QEMU is (\d+)", output))) == 2
