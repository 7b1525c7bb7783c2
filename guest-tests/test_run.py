"""`viommu run`: a script in a guest, its output and exit code, and what is told of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as Xml

from viommu.lab.config import scripts_directory

SCRIPT = """\
import sys
from board import Board
from viommu.layouts.commands import Opcode

print("arguments", *sys.argv[1:])
raise SystemExit(3)
"""


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "viommu.cli", "run", *map(str, words)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_script_runs_and_its_exit_code_is_ours(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    done = run("--raw", "--json", tmp_path / "r.json", "aarch64-virt", script, "one", "two three")
    assert done.returncode == 3
    assert done.stdout == "arguments one two three\n"
    verdict = json.loads((tmp_path / "r.json").read_text())
    assert (verdict["verdict"], verdict["status"]) == ("fail", 3)
    assert verdict["facts"]["kernel"].startswith("6.")


def test_the_guests_own_driver_is_in_the_report(tmp_path: Path) -> None:
    page, junit = tmp_path / "r.html", tmp_path / "r.xml"
    done = run("--report", page, "--junit", junit, "aarch64-virt", "ls /sys/class/iommu")
    assert done.returncode == 0, done.stderr
    assert "smmu3" in done.stdout
    text = page.read_text()
    assert "CMD_CFGI_STE" in text
    assert "arm-smmu-v3" in text  # what the kernel said, though not on the console
    (suite,) = Xml.parse(junit).getroot()
    assert suite.attrib["failures"] == "0"


def test_a_detach_that_was_none_is_a_violation_with_its_evidence(tmp_path: Path) -> None:
    script = scripts_directory() / "raw.py"
    page, verdict = tmp_path / "r.html", tmp_path / "r.json"
    done = run("--raw", "--report", page, "--json", verdict, "aarch64-virt", script, "omit", "tlbi")
    assert done.returncode == 1
    ledger = json.loads(verdict.read_text())["ledger"]
    (finding,) = [each for each in ledger["findings"] if each["severity"] == "violation"]
    assert finding["rule"] == "missing-invalidation"
    embedded = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text())
    assert embedded is not None
    data = json.loads(embedded[1])
    (shown,) = [each for each in data["findings"] if each["severity"] == "violation"]
    assert [seq for seq, _ in shown["evidence"]] == finding["evidence"][:16]
    assert all(item is not None for _, item in shown["evidence"])


def test_an_injection_of_a_plan_is_on_the_time_line(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[[fault]]\nname = "mine"\nat = "dma-translated"\nwhen = { nth = 1 }\ndo = { action = "abort" }\n'
    )
    page, script = tmp_path / "r.html", scripts_directory() / "raw.py"
    done = run(
        "--raw", "--faults", plan, "--report", page, "aarch64-virt", script, "attach", "linear"
    )
    assert '"status": "ERROR"' in done.stdout
    assert '"FaultInjected":1' in page.read_text()
    assert "mine: abort at dma-translated" in page.read_text()


def test_a_panic_is_told_and_the_report_is_written(tmp_path: Path) -> None:
    done = run(
        "--raw",
        "--report",
        tmp_path / "r.html",
        "--json",
        tmp_path / "r.json",
        "aarch64-virt",
        "echo c > /proc/sysrq-trigger",
    )
    assert done.returncode == 1
    assert "the guest kernel panicked" in done.stderr
    verdict = json.loads((tmp_path / "r.json").read_text())
    assert "the guest kernel panicked" in verdict["failure"]
    assert "sysrq triggered crash" in (tmp_path / "r.html").read_text()
