"""Writes cpio archives in the "newc" format, which Linux unpacks as an initramfs.

Linux takes several archives one after the other in one file; later members replace earlier ones.
An archive that this module writes ends on a 512-byte boundary, so that another can follow it.
"""

import stat
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

_MAGIC = "070701"
_ALIGNMENT = 4
_BLOCK = 512
_TRAILER = "TRAILER!!!"  # the name that ends an archive
_LARGEST = 0xFFFF_FFFF  # bytes: a size is eight hexadecimal digits


@dataclass(frozen=True)
class CpioEntry:
    """One member: its path from the root without a leading slash, its `st_mode`, its contents."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)  # major and minor number, of a device node

    @classmethod
    def directory(cls, path: str, permissions: int = 0o755) -> "CpioEntry":
        return cls(path, stat.S_IFDIR | permissions)

    @classmethod
    def file(cls, path: str, data: bytes, permissions: int = 0o644) -> "CpioEntry":
        return cls(path, stat.S_IFREG | permissions, data)

    @classmethod
    def symlink(cls, path: str, target: str) -> "CpioEntry":
        return cls(path, stat.S_IFLNK | 0o777, target.encode())

    @classmethod
    def character_device(
        cls, path: str, major: int, minor: int, permissions: int = 0o600
    ) -> "CpioEntry":
        return cls(path, stat.S_IFCHR | permissions, device=(major, minor))


def write_cpio(entries: Iterable[CpioEntry], *, present: Collection[str] = ()) -> bytes:
    """The archive of `entries`, owned by root.

    Directories that no entry names are added before what they hold, save those in `present`: an
    earlier archive has them, perhaps as symbolic links, which a directory would replace.
    Raises `ValueError` for a path that is absolute, leaves the root or appears twice, and for a
    member of 4 GiB or more.
    """
    archive = bytearray()
    written: set[str] = set()
    for number, entry in enumerate(_with_parents(entries, present), start=1):
        _check(entry, written)
        written.add(entry.path)
        _append(archive, entry, number)
    _append(archive, CpioEntry(_TRAILER, 0), 0)
    archive.extend(bytes(-len(archive) % _BLOCK))
    return bytes(archive)


def _with_parents(entries: Iterable[CpioEntry], known: Collection[str]) -> Iterable[CpioEntry]:
    present = set(known)
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.path).parents):
            path = str(parent)
            if path not in {".", "/"} and path not in present:
                present.add(path)
                yield CpioEntry.directory(path)
        if stat.S_ISDIR(entry.mode) and entry.path in present:
            continue
        present.add(entry.path)
        yield entry


def _check(entry: CpioEntry, written: set[str]) -> None:
    path = PurePosixPath(entry.path)
    if path.is_absolute() or ".." in path.parts or str(path) != entry.path or entry.path == ".":
        raise ValueError(f"not a plain relative path: {entry.path!r}")
    if "\0" in entry.path or entry.path == _TRAILER:
        raise ValueError(f"not a path that an archive can hold: {entry.path!r}")
    if entry.path in written:
        raise ValueError(f"two members have the path {entry.path!r}")
    if len(entry.data) > _LARGEST:
        raise ValueError(
            f"{entry.path!r} has {len(entry.data)} bytes; a member has less than 4 GiB"
        )


def _append(archive: bytearray, entry: CpioEntry, number: int) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        number, entry.mode, 0, 0, links, 0, len(entry.data),
        0, 0, *entry.device, len(name), 0,
    )  # fmt: skip
    archive += (_MAGIC + "".join(f"{field:08X}" for field in fields)).encode()
    archive += name
    archive += bytes(-len(archive) % _ALIGNMENT)
    archive += entry.data
    archive += bytes(-len(archive) % _ALIGNMENT)
