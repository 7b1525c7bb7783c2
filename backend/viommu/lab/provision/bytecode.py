"""Compiles a guest's Python library on the host, so that no guest spends seconds of its boot on it.

Bytecode is the same on every architecture but belongs to one version of Python: Debian's build of
the same version for the host makes it.
"""

import subprocess
from pathlib import Path

from viommu.lab.provision.cache import ProvisionError


def compile_library(python_root: Path, version: str, library: Path, guest_root: Path) -> None:
    """Compiles `library`, a directory below `guest_root`, with the Python unpacked to `python_root`.

    `version` is as in "python3.13". The bytecode names its sources as the guest sees them and is
    used without a look at them.
    """
    loaders = sorted((python_root / "usr/lib").glob("*/ld-linux*.so.*"))
    if not loaders:
        raise ProvisionError(f"No dynamic loader among {version}'s packages for this host.")
    done = subprocess.run(
        [
            str(loaders[0]), "--library-path", str(loaders[0].parent),
            str(python_root / "usr/bin" / version), "-S", "-s", "-m", "compileall", "-q",
            "--invalidation-mode", "unchecked-hash", "-s", str(guest_root), "-p", "/", str(library),
        ],
        env={"PYTHONHOME": str(python_root / "usr"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ProvisionError(f"{version} from Debian cannot compile its library: {reason[-1]}")
