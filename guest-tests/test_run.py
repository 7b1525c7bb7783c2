"""`viommu run`: a script in a guest, its output and exit code, and what is told of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as Xml

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
