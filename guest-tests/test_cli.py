"""`viommu boot` and `viommu demo` as a person uses them, on a terminal; and what they leave when they are ended."""

import os
import signal
import time
from pathlib import Path

import pytest
from person import ESCAPE, descendants, ended, left, terminal


def test_a_person_boots_and_leaves(home: Path) -> None:
    with terminal("boot", "x86_64-q35") as person:
        hint = person.sees(r"Ctrl-\] leaves the guest\. Try: ([^\x1b\r\n]*)")[1]
        person.sees("# ")
        processes = descendants(person.pid)
        assert len(processes) == 2, "the server and QEMU"
        person.types("echo $((6 * 7)) $(stty size)\r")
        person.sees("\r\n42 24 80\r\n")
        # What the hint says works.
        person.types(f"{hint} && echo w''ell\r")
        person.sees("well\r\n")
        assert '"right_pages": 4' in person.before
        person.types(ESCAPE)
        assert person.status() == 0
    assert ended(processes)
    assert left(home) == []


def test_a_person_switches_a_guest_off_whose_kernel_drives_the_smmu(home: Path) -> None:
    with terminal("boot") as person:
        hint = person.sees(r"Ctrl-\] leaves the guest\. Try: ([^\x1b\r\n]*)")[1]
        person.sees("# ")
        processes = descendants(person.pid)
        person.types("ls /sys/bus/platform/drivers/arm-smmu-v3; echo s''o\r")
        person.sees("so\r\n")
        assert "8000000000.iommu" in person.before
        person.types(f"{hint} && echo w''ell\r")
        person.sees("well\r\n")
        assert "vfio" in person.before.rpartition("/dev/vfio:")[2]
        person.types("poweroff -f\r")
        person.sees("The guest switched itself off.")
        assert person.status() == 0
    assert ended(processes)
    assert left(home) == []


@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_boot_is_ended_while_it_boots(home: Path, blow: signal.Signals) -> None:
    with terminal("boot", "--raw") as person:
        person.sees("Booting")
        deadline = time.monotonic() + 20
        while len(processes := descendants(person.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(person.pid, blow)
        code = person.status()
    assert code == 128 + blow
    assert "Traceback" not in person.before
    assert ended(processes)
    assert left(home) == []


def test_boot_is_killed(home: Path) -> None:
    with terminal("boot", "--raw") as person:
        person.sees("# ")
        processes = descendants(person.pid)
        assert len(processes) == 2
        os.kill(person.pid, signal.SIGKILL)
        assert person.status() == -signal.SIGKILL
    assert ended(processes)
    # A killed process tidies nothing up. The next one does.
    assert left(home) != []
    with terminal("serve") as person:
        person.sees("Ctrl-C ends it")
        person.types("\x03")
        assert person.status() == 0
    assert left(home) == []


def test_the_server_is_killed_while_a_person_is_at_the_console(home: Path) -> None:
    with terminal("boot", "x86_64-q35") as person:
        person.sees("# ")
        (server,) = (
            pid
            for pid in descendants(person.pid)
            if b"viommu.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(server, signal.SIGKILL)
        person.types("echo $((6 * 7))\r")
        person.sees("\r\n42\r\n")
        person.types(ESCAPE)
        person.sees(r"viommu: the server of the devices: killed by SIGKILL")
        assert person.status() == 1
    assert left(home) == []


def test_demo_is_ended(home: Path) -> None:
    with terminal("demo") as person:
        person.sees("The guest is up after")
        person.sees("Attach")
        processes = descendants(person.pid)
        time.sleep(0.5)
        os.kill(person.pid, signal.SIGTERM)
        assert person.status() == 128 + signal.SIGTERM
    assert "Traceback" not in person.before
    assert ended(processes)
    assert left(home) == []
