"""`viommu report` on a trace, and what mistakes with `viommu run` become. `guest-tests/test_run.py` boots guests."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.report_rig import SYNC, Stage, attach_fault_detach
from viommu.cli import app

SENTENCE = re.compile(r"viommu: [^\n]+\n")


def viommu(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    attach_fault_detach(path)
    return path


def test_a_page_beside_the_trace(trace: Path) -> None:
    result = viommu("report", trace)
    assert result.exit_code == 0, result.output
    assert "F_TRANSLATION" in trace.with_suffix(".html").read_text()


def test_every_form_at_once(trace: Path, tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"[    1.0] a line\r\n\x1b[1mbold \xff\r\n")
    names = {"-o": "r.html", "--trace": "r.perfetto-trace", "--json": "r.json", "--junit": "r.xml"}
    words = [word for option, name in names.items() for word in (option, tmp_path / name)]
    result = viommu("report", trace, "--console", log, *words)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "pass"
    assert "a line" in (tmp_path / "r.xml").read_text()
    assert "bold \N{REPLACEMENT CHARACTER}" in (tmp_path / "r.html").read_text()
    assert b"CMD_SYNC" in (tmp_path / "r.perfetto-trace").read_bytes()


def test_a_violation_is_in_every_form_and_in_the_exit_code(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "trace.jsonl", witnessed=True)
    stage.write()
    stage.unmap(SYNC)
    stage.write()
    stage.close()
    result = viommu(
        "report", stage.path, "--json", tmp_path / "r.json", "--junit", tmp_path / "r.xml"
    )
    assert result.exit_code == 1
    assert "viommu: missing-invalidation: " in result.stderr
    verdict = json.loads((tmp_path / "r.json").read_text())
    assert (verdict["verdict"], verdict["ledger"]["verdict"]) == ("fail", "violated")
    assert (
        '<testcase classname="viommu.run" name="ledger: missing-invalidation">'
        in (tmp_path / "r.xml").read_text()
    )
    assert '"ledger":"violated"' in (tmp_path / "trace.html").read_text()


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (("report", "broken.jsonl"), "line 1 is no event of a trace"),
        (("report", "trace.jsonl", "-o", "nowhere/x.html"), "there is no directory nowhere"),
        (("report", "broken.jsonl", "-o", "."), ". cannot be written: it is a directory"),
        (("run", "aarch64-virt", "absent.py"), "there is no script absent.py"),
        (("run", "--faults", "plan.toml", "aarch64-virt", "true"), "plan.toml, line 1"),
        (("run", "no-such-machine", "true"), "no-such-machine"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: tuple[str, ...], mistake: str, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trace.parent)
    Path("broken.jsonl").write_text("{}\n")
    Path("plan.toml").write_text('[[fault]]\nat = "nowhere"\ndo = "skip"\n')
    result = viommu(*words)
    assert result.exit_code == 1
    assert SENTENCE.fullmatch(result.stderr), result.stderr
    assert mistake in result.stderr
