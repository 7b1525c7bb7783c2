"""The cache directory: who may write, what a recipe's result is called, what is there.

A part is built in a directory of its own whose name ends in the key of its recipe. It is built under
another name and renamed when it is complete, so a directory that exists is whole, whatever
interrupted the one who built it.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from viommu.lab.errors import LabError
from viommu.lab.provision.progress import Say

MIB = 1 << 20

Entry = dict[str, Any]


class ProvisionError(LabError):
    """A part cannot be provided. The message is one line that says what to do about it."""


def recipe_key(*ingredients: Path | str) -> str:
    """A short name of what a part is made of: the contents of files and plain strings."""
    digest = hashlib.sha256()
    for ingredient in ingredients:
        data = ingredient.read_bytes() if isinstance(ingredient, Path) else ingredient.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:12]


def explain_os_error(error: OSError, directory: Path) -> ProvisionError:
    """The sentence that a failed write to the cache deserves."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return ProvisionError(
            f"The cache directory {directory} is full: free some space there, "
            "or set VIOMMU_CACHE to a directory on a larger disk, and run viommu setup again."
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return ProvisionError(
            f"The cache directory {directory} cannot be written ({os.strerror(error.errno)}): "
            "set VIOMMU_CACHE to a directory that you may write to."
        )
    where = f" ({error.filename})" if error.filename else ""
    return ProvisionError(
        f"The cache directory {directory} cannot be used: {error.strerror or error}{where}; "
        "set VIOMMU_CACHE to another directory."
    )


class Cache:
    """A cache directory, made when it is first written to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def locked(self, say: Say) -> Iterator[None]:
        """Makes the cache and holds it against other setups; waits for the one that has it.

        Every `OSError` about the cache that leaves the block becomes a `ProvisionError`.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / "lock").open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say("Waiting for another setup that uses the same cache")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                self._remove_remains()
                yield
        except OSError as error:
            raise explain_os_error(error, self.directory) from error

    def _remove_remains(self) -> None:
        # Under the lock nobody builds, so what is half built was interrupted.
        for remains in self.directory.glob(".building-*"):
            shutil.rmtree(remains, ignore_errors=True)

    def require_space(self, needed: int, purpose: str) -> None:
        """Raises when fewer than `needed` bytes are free."""
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise ProvisionError(
                f"The cache directory {self.directory} is full: {purpose} needs "
                f"{needed / MIB:.0f} MiB and {free / MIB:.0f} MiB are free; free some space "
                "there, or set VIOMMU_CACHE to a directory on a larger disk."
            )

    @contextmanager
    def building(self, name: str) -> Iterator[Path]:
        """An empty directory that becomes `<cache>/<name>` when the block ends well."""
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=self.directory))
        try:
            yield work
            work.chmod(0o755)
            target = self.directory / name
            if target.exists():
                shutil.rmtree(target)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    @property
    def manifest_path(self) -> Path:
        return self.directory / "manifest.json"

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, or an empty one where there is none that can be read as JSON."""
        try:
            manifest = json.loads(self.manifest_path.read_text())
        except (OSError, ValueError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        partial = self.directory / "manifest.json.partial"
        partial.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        partial.replace(self.manifest_path)
