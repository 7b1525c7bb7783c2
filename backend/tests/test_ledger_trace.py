"""The ledger from a trace file, and from the command line."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.driver_rig import PAGE, STREAM
from tests.ledger_rig import IOVA, LedgerRig
from tests.test_cli import Run, home, left, mistake, printed, start, viommu
from viommu.driver.smmu import DetachMode
from viommu.endpoints.port import DmaFault
from viommu.ledger import Ledger
from viommu.trace_file import TraceFile

__all__ = ["home", "viommu"]  # fixtures


def clean(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    rig.ends_meanwhile(rig.begin())
    rig.driver.detach(STREAM)
    domain.close()


def without_cfgi(rig: LedgerRig) -> None:
    rig.attached()
    rig.write()
    rig.omit = {"CMD_CFGI_STE"}
    rig.driver.detach(STREAM)


def without_tlbi(rig: LedgerRig) -> None:
    domain = rig.attached()
    rig.write()
    rig.omit = {"CMD_TLBI_NH_VA", "CMD_TLBI_NH_ASID"}
    domain.unmap(IOVA, PAGE)
    rig.write()


def without_sync(rig: LedgerRig) -> None:
    rig.attached()
    rig.omit = {"CMD_SYNC"}
    rig.driver.detach(STREAM, DetachMode.CD_INVALID)
    with pytest.raises(DmaFault):
        rig.write()


RUNS = {
    "clean": (clean, "clean"),
    "cfgi": (without_cfgi, "violated"),
    "tlbi": (without_tlbi, "violated"),
    "sync": (without_sync, "violated"),
}
Play = Callable[[LedgerRig], None]


def record(path: Path, run: Play) -> LedgerRig:
    """Play `run`, traced from after the reset of the driver on."""
    rig = LedgerRig()
    rig.ledger = Ledger()
    rig.ledger.follow(rig.smmu.tracer)
    with TraceFile(rig.smmu.tracer, path):
        run(rig)
        rig.witness.close()
    return rig


@pytest.mark.parametrize("name", RUNS)
def test_a_trace_file_gives_the_same_verdict(tmp_path: Path, name: str) -> None:
    run, word = RUNS[name]
    path = tmp_path / "trace.jsonl"
    rig = record(path, run)
    online, offline = rig.verdict(), Ledger.of_file(path).verdict()
    assert online.word == word
    assert offline == online


def test_evidence_is_the_number_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, without_cfgi)
    finding = Ledger.of_file(path).verdict().findings[0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (line,) = [line for line in lines if line["seq"] in finding.evidence]
    assert (line["kind"], line["state"], line["structure"]) == ("StreamConfigured", "abort", "STE")


# The command


@pytest.mark.parametrize(("run", "code"), [(clean, 0), (without_tlbi, 1)])
def test_viommu_ledger(viommu: Run, tmp_path: Path, run: Play, code: int) -> None:
    path = tmp_path / "trace.jsonl"
    record(path, run)
    outcome = viommu("ledger", path)
    assert (outcome.code, outcome.err) == (code, "")
    assert "Streams and domains" in outcome.out
    assert ("CMD_TLBI_NH_VA" in outcome.out) == bool(code)
    outcome = viommu("ledger", "--json", path)
    assert outcome.code == code
    values = json.loads(outcome.out)
    assert values == json.loads(json.dumps(Ledger.of_file(path).verdict().as_dict()))
    assert [each["command"] for each in values["findings"]] == ["CMD_TLBI_NH_VA"] * code


@pytest.mark.parametrize("text", ["hello\n", '{"seq": 1}\n', "[]\n", '{"kind": "SyncWaiting'])
def test_a_file_that_is_no_trace(viommu: Run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    mistake(viommu("ledger", path), f"{path}: line 1 is no event of a trace")


def test_a_file_that_is_not_there(viommu: Run) -> None:
    mistake(viommu("ledger", "/nowhere/trace"), "/nowhere/trace: No such file or directory")


def test_a_trace_without_a_witness(viommu: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"seq": 1, "time": 0, "kind": "ClientAttached", "function": "smmu"}\n')
    mistake(viommu("ledger", path), "was written without `viommu serve --ledger`")


def test_serve_with_a_ledger_gives_its_verdict(home: Path) -> None:
    trace = home / "trace.jsonl"
    with start("serve", "--ledger", "--trace", trace) as process:
        printed(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stdout is not None
        assert process.stdout.read().splitlines() == ["clean, 0 events"]
    assert left(home) == ["trace.jsonl"]


def test_a_machine_without_an_smmu(viommu: Run, tmp_path: Path) -> None:
    good = (Path(__file__).parents[2] / "qemu-configs" / "x86_64-q35.toml").read_text("utf-8")
    name, _, rest = good.partition("[[devices]]")
    path = tmp_path / "none.toml"
    path.write_text(name + "[[devices]]" + rest.partition("[[devices]]")[2])
    mistake(viommu("serve", "--ledger", path), "there is no SMMU in ")
