"""The evidence of a failed test as files."""

import re
import shutil
from pathlib import Path

from viommu.pytest_plugin.lab import Lab


def keep(folder: Path, test: str, lab: Lab) -> Path:
    """Write what `lab` has to `folder`/<test>; returns that. Raises `OSError`."""
    place = folder / _file_name(test)
    place.mkdir(parents=True, exist_ok=True)
    for title, text in lab.sections():
        (place / f"{_file_name(title)}.txt").write_text(text, "utf-8")
    for title, path in lab.traces():
        shutil.copy(path, place / f"{_file_name(title)}{path.suffix}")
    return place


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[-150:]
