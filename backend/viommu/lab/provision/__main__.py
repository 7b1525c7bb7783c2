"""`python -m viommu.lab.provision [--check] [--disks] [--guest NAME]`: provides what is missing, or names it."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from viommu.lab.assets import cache_directory
from viommu.lab.provision import boot_tools, guest_image, libvfio_user, qemu
from viommu.lab.provision.apt import PrivateApt
from viommu.lab.provision.cache import Cache, Entry, ProvisionError
from viommu.lab.provision.progress import Say

_FILES = ("path", "kernel", "initramfs")
DISKS = "disks"
"""What `viommu boot --disk` needs, among what is provided on demand."""


@dataclass(frozen=True)
class Part:
    """A leaf of the manifest."""

    title: str
    place: tuple[str, ...]  # its keys in the manifest
    key: Callable[[], str]
    provide: Callable[[Cache, PrivateApt, Say], Entry]

    def find(self, manifest: dict[str, Any]) -> Entry | None:
        """Its entry, if that was made by the recipe of today and its files exist."""
        entry: Any = manifest
        for step in self.place:
            entry = entry.get(step) if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or entry.get("key") != self.key():
            return None
        files = [entry[name] for name in _FILES if name in entry]
        files += [
            word for word in entry.get("argv", ()) if word.startswith("/") and ":" not in word
        ]
        return entry if all(Path(file).exists() for file in files) else None

    def store(self, manifest: dict[str, Any], cache: Cache, apt: PrivateApt, say: Say) -> None:
        """Provides it and enters it into `manifest`."""
        key = (
            self.key()
        )  # before: to provide a library may load it, and then it looks like the system's
        *branches, leaf = self.place
        for branch in branches:
            manifest = manifest.setdefault(branch, {})
        manifest[leaf] = self.provide(cache, apt, say) | {"key": key}


def parts(further: Sequence[str] = ()) -> Iterator[Part]:
    """Every part, the ones that need least first; of `ON_DEMAND` those guests whose names are in `further`.

    `DISKS` there is what `viommu boot --disk` needs.
    """
    yield Part("libvfio-user", ("libvfio_user",), libvfio_user.key, libvfio_user.provide)
    for guest in guest_image.GUESTS:
        name = guest.architecture
        yield Part(
            f"QEMU for {name}", ("qemu", name), partial(qemu.key, name), partial(qemu.provide, name)
        )
    on_demand = [guest for guest in guest_image.ON_DEMAND if guest.name in further]
    for guest in (*guest_image.GUESTS, *on_demand):
        yield Part(
            f"guest for {guest.name}", ("guests", guest.name),
            partial(guest_image.key, guest), partial(guest_image.provide, guest),
        )  # fmt: skip
    if DISKS in further:
        yield Part("UEFI, qemu-nbd", ("boot_tools",), boot_tools.key, boot_tools.provide)


def asked_for(manifest: dict[str, Any]) -> tuple[str, ...]:
    """What is there on demand. What was asked for once is a part like the others."""
    return (*manifest.get("guests", ()), *([DISKS] if "boot_tools" in manifest else []))


def provision(cache: Cache, say: Say, further: Sequence[str] = ()) -> bool:
    """Provides what is missing; returns whether anything was. Raises `ProvisionError`.

    `further` is what of `parts` is there on demand only.
    """
    manifest = cache.read_manifest()
    wanted = list(parts((*further, *asked_for(manifest))))
    if all(part.find(manifest) for part in wanted):
        return False
    with cache.locked(say):
        manifest = cache.read_manifest()
        apt = PrivateApt(cache, say)
        for part in wanted:
            if part.find(manifest) is None:
                part.store(manifest, cache, apt, say)
                cache.write_manifest(manifest)
    return True


def check(cache: Cache) -> bool:
    """Prints a table of the parts; returns whether all are there."""
    from rich.console import Console
    from rich.table import Table

    manifest = cache.read_manifest()
    table = Table("Part", "Version", "Where from", "State", title=f"Cache: {cache.directory}")
    complete = True
    for part in parts(asked_for(manifest)):
        entry = part.find(manifest)
        complete &= entry is not None
        if entry is None:
            table.add_row(part.title, "", "", "[red]missing[/]")
        else:
            version = entry.get("version") or entry["release"]
            table.add_row(part.title, version, entry["origin"], "[green]ok[/]")
    Console().print(table)
    if not complete:
        print("Run viommu setup to provide what is missing.")
    return complete


def set_up(further: Sequence[str] = (), *, check_only: bool = False) -> int:
    """What `viommu setup` does; returns its exit code."""
    cache = Cache(cache_directory())
    try:
        if check_only:
            return 0 if check(cache) else 1
        if provision(cache, lambda text: print(text, flush=True), further):
            print(f"Everything is set up in {cache.directory}")
    except ProvisionError as error:
        print(f"viommu setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nviommu setup: interrupted; run it again and it goes on where it stopped.",
            file=sys.stderr,
        )
        return 130
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="viommu setup", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="report each part; exit status 1 if one is missing"
    )
    parser.add_argument(
        "--guest", action="append", default=[], help="another kernel too, for `viommu boot --guest`",
        choices=[guest.name for guest in guest_image.ON_DEMAND],
    )  # fmt: skip
    parser.add_argument(
        "--disks", action="append_const", const=DISKS, dest="guest",
        help="UEFI firmware and qemu-nbd too, for `viommu boot --disk`",
    )  # fmt: skip
    options = parser.parse_args()
    return set_up(options.guest, check_only=options.check)


if __name__ == "__main__":
    sys.exit(main())
