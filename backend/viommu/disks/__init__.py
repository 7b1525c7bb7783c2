"""Where a served NVMe controller keeps its blocks: in RAM, in a raw image, or in one that `qemu-nbd` reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from viommu.disks.qemu_nbd import served
from viommu.disks.raw_file import RawFile
from viommu.endpoints.nvme.store import BlockStore, RamDisk
from viommu.endpoints.nvme.write_cache import WriteCache
from viommu.lab.errors import DiskError

_QCOW2 = b"QFI\xfb"


class ImageFormat(StrEnum):
    """What a disk image is, as QEMU's tools name it."""

    RAW = "raw"
    QCOW2 = "qcow2"


def image_format(path: Path) -> ImageFormat:
    """What an image is by its name: qcow2 if it ends so, else raw.

    Its content does not count: a guest may write into its raw disk the header of a qcow2 image that names any file of
    the host. Raises `DiskError` where the content makes one doubt the name, and `OSError` when it cannot be read.
    """
    for known in ImageFormat:
        if path.suffix.lower() == f".{known}":
            return known
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_QCOW2)) == _QCOW2:
                raise DiskError(
                    f"{path} begins like a qcow2 image, and its name does not say that it is one: give its format, "
                    "qcow2, or raw if a guest has written that"
                )
    return ImageFormat.RAW


@contextmanager
def open_disk(
    path: Path | None,
    size: int | None,
    kind: ImageFormat | None = None,
    *,
    snapshot: bool = False,
    volatile: bool = False,
    wake: Callable[[], None] = lambda: None,
) -> Iterator[BlockStore]:
    """The store of a machine's disk: the image at `path`, or else RAM of `size` bytes.

    With a `size` a raw image is made that is not there. `kind` is its format, if not by its name. With `snapshot` the
    image stays as it is, and what is written is forgotten; with `volatile` it has what was flushed, and no more. See
    `Flusher` for `wake`. Raises `OSError` or `DiskError` when it cannot be opened.
    """
    if path is None:
        yield RamDisk(size or 0)
        return
    with _opened(path, size, kind or image_format(path), snapshot, wake) as store:
        yield WriteCache(store) if volatile else store


@contextmanager
def _opened(
    path: Path, size: int | None, kind: ImageFormat, snapshot: bool, wake: Callable[[], None]
) -> Iterator[BlockStore]:
    if kind == ImageFormat.RAW and not snapshot:
        with RawFile(path, size, wake=wake) as file:
            yield file
    else:
        with served(path, kind, snapshot=snapshot, wake=wake) as image:
            yield image
