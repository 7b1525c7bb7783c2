"""Where the Chromium of the report's tests comes from. That a downloaded one runs, those tests show."""

from pathlib import Path

import pytest

from viommu.lab.provision import chromium
from viommu.lab.provision.cache import Cache, ProvisionError


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_one_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = program(tmp_path / "bin" / "chromium")
    monkeypatch.setenv("PATH", str(ours.parent))
    assert chromium.provide(Cache(tmp_path / "cache"), print) == ours
    assert not (tmp_path / "cache").exists()


def test_without_one_and_without_apt_it_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProvisionError, match="apt-get install chromium"):
        chromium.provide(Cache(tmp_path / "cache"), lambda _: None)
