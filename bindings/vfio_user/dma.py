"""Guest memory that the client has mapped for DMA, as memoryviews that die with their mapping."""

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from vfio_user.abi import (
    PROTECTION_READ,
    PROTECTION_WRITE,
    DmaInfo,
    DmaRegisterCallback,
    DmaUnregisterCallback,
)
from vfio_user.context import Context

_MAP_PRIVATE: Final = 0x02
_MAP_FIXED: Final = 0x10
_MAP_ANONYMOUS: Final = 0x20
_MAP_NORESERVE: Final = 0x4000


@dataclass(frozen=True, eq=False, slots=True)
class DmaRegion:
    """A range of the client's address space that the device may access.

    `iova` and `size` are in bytes. `view` is the memory itself, shared with the client, read-only
    if not `writable`. It is None where the client gave no file descriptor (guest RAM that is not
    shared, ROMs) or no right to read: such a region is known, but out of reach. After the unmap
    callback `view` is released, and each use of it raises ValueError.
    """

    iova: int
    size: int
    readable: bool
    writable: bool
    view: memoryview | None

    def __repr__(self) -> str:
        rights = ("r" if self.readable else "-") + ("w" if self.writable else "-")
        reach = "" if self.view is not None else ", not accessible"
        return f"<DmaRegion {self.iova:#x}+{self.size:#x} {rights}{reach}>"


def let_go(view: memoryview, memory: weakref.ref[Any]) -> Any:
    """Release `view`, and return the memory behind it if somebody still holds another view of it.

    Each view keeps the ctypes array that it was made from alive; a slice does not show elsewhere.
    """
    with contextlib.suppress(BufferError):
        view.release()
        if memory() is not None:
            gc.collect()  # a view in a dead cycle, such as a traceback, is no leak
    return memory()


class _Mapping:
    """The life of one region's memory in this process."""

    def __init__(self, info: DmaInfo) -> None:
        readable = bool(info.prot & PROTECTION_READ)
        writable = bool(info.prot & PROTECTION_WRITE)
        size = info.iova.iov_len
        self._memory: weakref.ref[Any] | None = None
        view = None
        if info.vaddr and readable:
            memory = (ctypes.c_ubyte * size).from_address(info.vaddr)
            self._memory = weakref.ref(memory)
            view = memoryview(memory).cast("B")
            if not writable:
                view = view.toreadonly()
        self.region = DmaRegion(info.iova.iov_base or 0, size, readable, writable, view)

    def end(self, info: DmaInfo, libc: ctypes.CDLL) -> bool:
        """Release the view; the library unmaps the memory as soon as its callback returns.

        Returns False if another view is still held somewhere. Then its holder must neither crash
        nor reach guest memory again: private zero pages take the place of the mapping, and stay
        until the last view is gone.
        """
        if self.region.view is None or self._memory is None:
            return True
        memory = let_go(self.region.view, self._memory)
        if memory is None:
            return True
        base, size = info.mapping.iov_base, info.mapping.iov_len
        flags = _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS | _MAP_NORESERVE
        libc.mmap(base, size, PROTECTION_READ | PROTECTION_WRITE, flags, -1, 0)
        weakref.finalize(memory, libc.munmap, base, size).atexit = False
        # The library unmaps what this describes: make it nothing, the pages are ours now.
        info.mapping.iov_len = 0
        return False


class DmaTable:
    """The regions that the client has mapped, kept by the two callbacks of the library.

    `on_map` and `on_unmap` are called with each region that comes or goes, and may raise.
    """

    def __init__(
        self,
        context: Context,
        on_map: Callable[[DmaRegion], None],
        on_unmap: Callable[[DmaRegion], None],
    ) -> None:
        self._context = context
        self._on_map = on_map
        self._on_unmap = on_unmap
        self._mappings: dict[tuple[int, int], _Mapping] = {}
        self._libc = _load_libc()

    def regions(self) -> tuple[DmaRegion, ...]:
        """The regions that are mapped now."""
        return tuple(mapping.region for mapping in self._mappings.values())

    def set_up(self, limit: int) -> None:
        """Have the library tell about regions, at most `limit` (0.1 has its own limit)."""
        register = self._context.keep(DmaRegisterCallback(self._mapped))
        unregister = self._context.keep(DmaUnregisterCallback(self._unmapped))
        limits = () if self._context.library.api == (0, 1) else (limit,)
        self._context.check("vfu_setup_device_dma", *limits, register, unregister)

    def _mapped(self, _: int, pointer: Any) -> None:
        try:
            info = pointer.contents
            key = info.iova.iov_base or 0, info.iova.iov_len
            if key in self._mappings:  # the library allows to map the same again
                return
            mapping = self._mappings[key] = _Mapping(info)
            self._on_map(mapping.region)
        except BaseException as error:
            self._refuse("DMA map", error)

    def _unmapped(self, _: int, pointer: Any) -> None:
        try:
            info = pointer.contents
            mapping = self._mappings.pop((info.iova.iov_base or 0, info.iova.iov_len))
            try:
                self._on_unmap(mapping.region)
            except BaseException as error:
                self._refuse("DMA unmap", error)
            if not mapping.end(info, self._libc):
                log = self._context.log
                log.error("a view of %r is still held: it shows zeros from now on", mapping.region)
        except BaseException as error:
            self._refuse("DMA unmap", error)

    def _refuse(self, what: str, error: BaseException) -> None:
        # The reply that follows says success and cannot be changed: let there be none.
        self._context.failures.report(what, error)
        if not self._context.closed:
            self._context.hang_up()


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.munmap.restype = ctypes.c_int
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
