"""The demonstration as a person runs it: it passes, and it fails when the SMMU does not do its job."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from viommu.lab.assets import Assets

# An SMMU that forgets nothing: what invalidates the configuration of a stream has no effect.
SABOTAGE = """
from viommu.smmu.configuration import Configuration

for name in ("invalidate_streams", "invalidate_cd", "invalidate_cds"):
    assert callable(getattr(Configuration, name))
    setattr(Configuration, name, lambda *_: None)
"""


def demo(environment: Mapping[str, str] | None = None) -> tuple[int, list[str], dict[str, Any]]:
    """Exit code, the lines for a person, and the verdict."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "viommu.cli", "demo", "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    *lines, last = done.stdout.splitlines()
    return done.returncode, lines, json.loads(last)


def test_it_passes(assets: Assets) -> None:
    code, lines, verdict = demo()
    assert verdict == {
        "verdict": "pass",
        "machine": "aarch64-virt",
        "qemu_version": assets.qemu_for("aarch64").version,
        "guest_kernel": assets.guest_for("aarch64").release,
        "dma_bytes_verified": 2 << 20,
        "dma_bytes_after_detach": 0,
        "events": ["C_BAD_STE", "C_BAD_CD", "F_TRANSLATION"],
        "failures": [],
    }
    assert code == 0
    text = "\n".join(lines)
    for part in ("Attach", "DMA", "Detach in flight", "Refused", "CMD_SYNC is complete", "PASS"):
        assert part in text
    assert max(len(line) for line in lines) <= 80, "it fits a terminal"


def test_it_fails_when_a_detach_does_not_detach(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    code, lines, verdict = demo({"PYTHONPATH": path})
    assert code == 1
    assert verdict["verdict"] == "fail"
    assert verdict["dma_bytes_after_detach"] > 0
    assert verdict["dma_bytes_verified"] == 2 << 20, "what came before is right"
    assert "no byte lands after the detach" in verdict["failures"]
    assert any("FAIL" in line for line in lines)
