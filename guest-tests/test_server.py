"""The server and QEMU, when one of them does what it should not."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from viommu.lab.assets import Assets
from viommu.lab.config import load_machine
from viommu.lab.emulator import Emulator
from viommu.lab.errors import QemuExited
from viommu.lab.guest import Guest
from viommu.lab.rig import Rig
from viommu.lab.serving import Serving
from viommu.trace_file import TraceReader

MACHINES = ("aarch64-virt", "x86_64-q35")
INSIDE = Path(__file__).with_name("inside")
FIRST_BYTES = "5839e300"
"""What RAND48 with seed 9 writes."""

# Runs in the guest: frames that each write 2 MiB through the SMMU in small transactions, and go on alone.
ENDLESS = b"""
import sys
sys.path.insert(0, "/viommu/inside")
from board import DESTINATION, Board
from engine import RAND48
from pool import HUGE, Scattered

board = Board()
board.prepare(HUGE)
driver = board.fresh()
domain = driver.create_domain()
driver.attach(board.engines[0].stream_id, domain)
domain.map_pages(DESTINATION, Scattered(board.destination, HUGE // 4096).frames)
for number in range(4):
    board.engines[0].frame(number).start(RAND48, DESTINATION, HUGE, rate=1)
"""

# Runs in the guest: the first register of the second page of each function.
PEEK = b"""
import sys
sys.path.insert(0, "/viommu/inside")
import pci
for function in pci.find(ids=(0x13B5, 0xFF80)) + pci.find(class_code=0x080600):
    function.enable()
    print(hex(function.map_bar().cast("I")[0x4000]))
"""

# Runs in the guest: DMA by the engine at the address in argv, untranslated.
BYPASS = b"""
import sys
sys.path.insert(0, "/viommu/inside")
from engine import RAND48, Engine
from pci import Function
from pool import HUGE, Pool

region = Pool(HUGE).take(HUGE)
frame = Engine(Function(sys.argv[1])).frame()
frame.start(RAND48, region.bases[0], 4096, seed=9)
print(frame.wait().status, bytes(region.view[:4]).hex())
"""


def until(trace: TraceReader, seen: list[dict[str, Any]], holds: Callable[[], bool]) -> None:
    """Read along until `holds`, at most 20 s."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, seen[-20:]
        time.sleep(0.02)
        seen += trace.read()


def functions(seen: list[dict[str, Any]], kind: str) -> list[str]:
    return sorted(event["function"] for event in seen if event["kind"] == kind)


def copies(guest: Guest) -> bool:
    """Whether a device can be attached, copy by DMA, and be detached."""
    output = guest.python("/viommu/inside/raw.py attach two-level-8", timeout=60)
    (result,) = (json.loads(line) for line in output.splitlines() if line.startswith('{"case"'))
    assert "error" not in result, result["error"]
    attached, after = result["attached"], result["after"]
    return (attached["right_pages"], after["status"]) == (4, "ERROR")


def ended(serving: Serving) -> int | None:
    """Its exit code, after a moment in which it may end."""
    time.sleep(0.1)
    return serving.exit_code


@pytest.mark.parametrize("name", MACHINES)
def test_qemu_is_killed_while_dma_runs_and_then_the_server(name: str, assets: Assets) -> None:
    everything = ["engine0", "engine1", "smmu"]
    machine = load_machine(name)
    with Serving(name, trace=True) as serving, serving.trace() as trace:
        seen: list[dict[str, Any]] = []
        with Guest(machine, assets, devices=serving.sockets, scripts=INSIDE) as guest:
            guest.put("/tmp/endless.py", ENDLESS)
            guest.python("/tmp/endless.py")
            until(trace, seen, lambda: any(event["kind"] == "DmaMoved" for event in seen[-100:]))
            os.kill(guest.pid, signal.SIGKILL)
            with pytest.raises(QemuExited, match="killed by SIGKILL"):
                guest.run("true")
        until(trace, seen, lambda: functions(seen, "ClientDetached") == everything)
        assert ended(serving) is None
        assert seen[-1]["kind"] != "EngineEnded", "the DMA was cut, it did not run to its end"
        time.sleep(0.3)
        assert "DmaMoved" not in [event["kind"] for event in trace.read()]

        with Guest(machine, assets, devices=serving.sockets, scripts=INSIDE) as guest:
            seen.clear()
            assert copies(guest)
            # The next to be killed is the server.
            guest.put("/tmp/peek.py", PEEK)
            assert guest.python("/tmp/peek.py").split() == ["0x1", "0x1", "0x0"]
            os.kill(serving.pid, signal.SIGKILL)
            started = time.monotonic()
            assert guest.python("/tmp/peek.py").split() == ["0xffffffff"] * 3
            assert time.monotonic() - started < 10
            assert ended(serving) == -signal.SIGKILL
            assert guest.check("echo on") == "on\n"
        assert serving.output() == ""


# On q35, where the device has MSI-X, QEMU 11.1 itself aborts when a vfio-user device is unplugged.
def test_a_device_is_unplugged_and_plugged_in_again(assets: Assets) -> None:
    name, address = "aarch64-virt", "0000:01:00.0"
    function = f"/sys/bus/pci/devices/{address}"
    port = "pcie-root-port,id=root,bus=pcie.0,addr=0x8,chassis=1"
    with Serving(name, trace=True) as serving, serving.trace() as trace:
        socket = {"type": "unix", "path": str(serving.sockets["engine1"])}
        seen: list[dict[str, Any]] = []
        with Guest(
            load_machine(name),
            assets,
            devices={each: serving.sockets[each] for each in ("smmu", "engine0")},
            scripts=INSIDE,
            qemu_arguments=["-device", port],
        ) as guest:
            guest.put("/tmp/bypass.py", BYPASS)
            for _ in range(2):
                seen.clear()
                guest.qmp(
                    "device_add", driver="vfio-user-pci", id="extra", bus="root", socket=socket
                )
                guest.check(f"until [ -e {function} ]; do sleep 0.1; done")
                assert guest.python(f"/tmp/bypass.py {address}") == f"HALTED {FIRST_BYTES}\n"
                guest.qmp("device_del", id="extra")
                # The guest lets go at once instead of waiting for somebody to change his mind.
                guest.check("echo 0 > /sys/bus/pci/slots/0/power")
                guest.check(f"[ ! -e {function} ]")
                until(trace, seen, lambda: functions(seen, "ClientDetached") == ["engine1"])
            assert ended(serving) is None
            assert serving.output() == ""


def test_a_rig_whose_server_is_gone_is_lost(assets: Assets) -> None:
    with Rig("x86_64-q35", assets=assets) as rig:
        before = rig.lost
        os.kill(rig.serving.pid, signal.SIGKILL)
        assert ended(rig.serving) == -signal.SIGKILL
        assert rig.guest.check("echo on") == "on\n"
        assert (before, rig.lost) == (False, True)


def test_guest_ram_that_qemu_keeps_to_itself(
    assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a person may start it, without the lab's own look at its memory."""
    monkeypatch.setattr(Emulator, "_check_memory", lambda _: None)
    name = "x86_64-q35"  # its firmware maps and unmaps much before a driver comes
    machine = load_machine(name)
    plain = f"memory-backend-ram,id=plain,size={machine.memory_mib}M"
    with Serving(name, trace=True) as serving, serving.trace() as trace:
        with Guest(
            machine,
            assets,
            devices=serving.sockets,
            scripts=INSIDE,
            qemu_arguments=["-object", plain, "-machine", "memory-backend=plain"],
        ) as guest:
            assert serving.output() == "", "before a driver comes there is nothing to say"
            guest.put("/tmp/bypass.py", BYPASS)
            for _ in range(2):
                output = guest.python("/tmp/bypass.py 0000:00:02.0")
                assert output == "ERROR 00000000\n"
            guest.put("/tmp/peek.py", PEEK + b"function.map_bar().cast('I')[8] = 1\n")
            guest.python("/tmp/peek.py")
            lines = serving.output().splitlines()
            assert len(lines) == 2
            for line, function in zip(lines, ("engine0", "smmu"), strict=True):
                assert line.startswith(f"ERROR: {function}: no DMA goes through, ")
                assert "QEMU keeps guest RAM to itself: start it with -object memory-b" in line
        events = [event["kind"] for event in trace.read()]
        assert "DmaRefused" in events
        assert "DmaMoved" not in events
