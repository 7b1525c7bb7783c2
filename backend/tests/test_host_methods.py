"""Host domains by the control socket's methods, and as docs/host-domains.md says."""

import doctest
import io
import json
import re
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.host_server_rig import PAGE, fill, served
from tests.server_rig import BASE, Function, Machine
from viommu.cli import ctl
from viommu.control import CallFailed, Refused

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "host-domains.md"


@pytest.fixture
def machine() -> Iterator[Machine]:
    yield from served()


@pytest.fixture
def engine(machine: Machine) -> Function:
    return machine.connect("engine0", bus_master=True)


def test_the_same_by_methods(machine: Machine, engine: Function) -> None:
    call = machine.server.methods.call
    hole = BASE + PAGE
    call("host.create", {"domain": "d"})
    call("host.map_identity", {"domain": "d", "leave_out": [[hole, 2 * PAGE]]})
    call("host.map", {"domain": "d", "iova": hole, "address": hole, "size": PAGE, "write": False})
    call("host.attach", {"endpoint": "engine0", "domain": "d"})
    assert call("host.endpoints", {})[0] == {
        "endpoint": "engine0",
        "stream_id": 0x10,
        "state": "attached",
        "domain": "d",
    }
    fill(engine)
    machine.run()
    (fault,) = call("host.faults", {})
    assert (fault["endpoint"], fault["fault"], fault["address"]) == ("engine0", "PERMISSION", hole)
    call("host.unmap", {"domain": "d", "iova": hole, "size": PAGE})
    call("host.flush", {"domain": "d"})
    call("host.detach", {"endpoint": "engine0", "domain": "d"})
    call("host.unblock", {"endpoint": "engine0"})
    call("host.create", {"domain": "open", "type": "pass-through"})
    assert [each["type"] for each in call("host.domains", {})] == ["translate", "pass-through"]
    call("host.block", {"endpoint": "engine0"})
    with pytest.raises(Refused, match=r"INVALID_HANDLE \(0xc0000008\)") as refused:
        call("host.attach", {"endpoint": "engine0", "domain": "x"})
    assert refused.value.data == {"status": "INVALID_HANDLE"}
    with pytest.raises(CallFailed, match=r"host.create: type: input should be"):
        call("host.create", {"domain": "own", "type": "unmanaged"})
    call("host.delete", {"domain": "d"})


def test_the_example() -> None:
    results = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert results.attempted > 10
    assert results.failed == 0


def test_the_commands(tmp_path: Path) -> None:
    """Each as a person types it, to a server that runs."""
    said = io.StringIO()
    control = tmp_path / "c.sock"
    with Machine(tmp_path, control=control) as machine:
        server = threading.Thread(target=machine.server.run)
        server.start()
        try:
            for line in re.findall(r"^viommu ctl (.*)$", DOCUMENT.read_text("utf-8"), re.MULTILINE):
                words = shlex.split(line, comments=True)
                ctl.call(Console(file=said), words, control, as_json=True)
        finally:
            machine.server.stop()
            server.join()
    results = [json.loads(line) for line in said.getvalue().splitlines()]
    assert len(results) == 8
    assert results[3][0]["state"] == "attached"
