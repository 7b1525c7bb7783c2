"""Kernel modules for an image: which need which, and the files by which `modprobe` finds them.

Reads the modules themselves, so nothing of the guest's architecture has to run.
"""

import lzma
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KernelModule:
    """A module as the kernel loads it."""

    name: str  # as lsmod prints it: with underscores
    path: str  # below /lib/modules/<release>, as "kernel/drivers/vfio/vfio.ko"
    image: bytes  # the ELF file, not compressed
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


def select_modules(release_directory: Path, names: Iterable[str]) -> list[KernelModule]:
    """The modules of `names` that exist, and what they need, each after what it needs.

    A name without a module is left out: that driver is built in, or the architecture lacks it.
    """
    files = {_module_name(path): path for path in (release_directory / "kernel").rglob("*.ko*")}
    selected: dict[str, KernelModule] = {}

    def add(name: str) -> None:
        if name in files and name not in selected:
            module = _read(files[name], release_directory)
            for needed in module.depends:
                add(needed)
            selected[name] = module

    for name in names:
        add(name.replace("-", "_"))
    return list(selected.values())


def modules_dep(modules: Iterable[KernelModule]) -> str:
    """The text of modules.dep. A line names all that its module needs, with their own needs."""
    by_name = {module.name: module for module in modules}

    def needs(module: KernelModule) -> dict[str, None]:
        found: dict[str, None] = {}
        for name in module.depends:
            found[by_name[name].path] = None
            found |= needs(by_name[name])
        return found

    return "".join(
        f"{module.path}: {' '.join(needs(module))}".rstrip() + "\n" for module in by_name.values()
    )


def modules_alias(modules: Iterable[KernelModule]) -> str:
    """The text of modules.alias."""
    return "".join(
        f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases
    )


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _read(path: Path, release_directory: Path) -> KernelModule:
    image = path.read_bytes()
    if path.suffix == ".xz":
        image = lzma.decompress(image)
    relative = path.relative_to(release_directory)
    facts = list(_modinfo(image))
    depends = next((value for key, value in facts if key == "depends"), "")
    return KernelModule(
        name=_module_name(path),
        path=str(relative.with_name(relative.name.split(".ko")[0] + ".ko")),
        image=image,
        depends=tuple(name.replace("-", "_") for name in depends.split(",") if name),
        aliases=tuple(value for key, value in facts if key == "alias"),
    )


def _modinfo(image: bytes) -> Iterator[tuple[str, str]]:
    """The key=value strings of an ELF64 file's section .modinfo."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("a kernel module is not a little-endian 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", image, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", image, 0x3A)

    def section(index: int) -> tuple[int, int, int]:
        name, _, _, _, offset, size = struct.unpack_from(
            "<IIQQQQ", image, table + index * entry_size
        )
        return name, offset, size

    _, names, _ = section(names_index)
    for index in range(count):
        name, offset, size = section(index)
        if image.startswith(b".modinfo\0", names + name):
            for item in image[offset : offset + size].split(b"\0"):
                key, separator, value = item.decode(errors="replace").partition("=")
                if separator:
                    yield key, value
