"""What `viommu setup --disks` provides, for tests: set up when they ask for it."""

import subprocess
from pathlib import Path

from viommu.endpoints.nvme.store import BlockStore
from viommu.lab.assets import BootTools, boot_tools, cache_directory
from viommu.lab.provision.__main__ import DISKS, provision
from viommu.lab.provision.apt import command_in
from viommu.lab.provision.cache import Cache


def provided() -> BootTools:
    provision(Cache(cache_directory()), print, [DISKS])
    tools = boot_tools()
    assert tools is not None
    return tools


def qemu_img(*words: str | Path) -> str:
    command = [*command_in(provided().path, "qemu-img"), *map(str, words)]
    return subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout


def flush(store: BlockStore, offset: int = 0, size: int | None = None) -> None:
    """Wait until what was written lasts."""
    for _ in store.flush(offset, size):
        pass
