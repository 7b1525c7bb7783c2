"""A PCI function in Python, served to one client at a time over a vfio-user socket."""

import ctypes as c
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vfio_user import abi, capabilities
from vfio_user.abi import Irq, PciType, Region, ResetType
from vfio_user.callbacks import Read, Write, region_callback
from vfio_user.config_space import ConfigSpace
from vfio_user.context import Context
from vfio_user.dma import DmaRegion, DmaTable, let_go
from vfio_user.errors import ClientLost, DeviceError
from vfio_user.library import Library

_SIZES: Final = {PciType.CONVENTIONAL: 0x100, PciType.EXPRESS: 0x1000}
_LARGEST_BAR: Final = 1 << 31  # the library counts in 32 bits


class PciDevice:
    """One PCI function on one Unix socket. A context manager; not thread-safe.

    Declare it (`add_bar`, `set_interrupts`, `add_capability`), then `realize`, then in an event
    loop: `attach` until it returns True, and `run` whenever `fileno` is readable.

    The device is told what happens through these attributes, each a callable or None:

    - `on_attach()`, `on_disconnect()`: a client came or is gone.
    - `on_dma_map(region)`, `on_dma_unmap(region)`: see `DmaRegion`. When the second returns, the
      view is released; if a slice of it is still held, that is logged and the slice shows zeros.
    - `on_reset(kind)`: registers go to their initial state; config space already has.
    - `on_config_write(offset, data)`: the client wrote `data`; `config` shows the effect.
    - `config_filter(offset, data, write)`: returns what the client reads, or what is written, in
      place of `data`; None drops a write.

    No exception in a callback ends the process. It is logged with its traceback to the logger
    `vfio_user`, and the client gets the errno of an OSError, else EIO. Where the protocol's reply
    has no place for an errno (DMA map and unmap) the connection is closed instead.
    KeyboardInterrupt and SystemExit go on to the caller of `run` or `close`.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str],
        *,
        vendor_id: int,
        device_id: int,
        subsystem_vendor_id: int = 0,
        subsystem_id: int = 0,
        class_code: int,
        revision: int = 0,
        express: bool = True,
        max_dma_regions: int = 128,
        library: Library | None = None,
    ) -> None:
        """Listen on `socket_path`. A socket that nobody serves any more is replaced.

        `class_code` has 24 bits: base, sub-class, interface. With `express` the function has 4096
        bytes of config space and a PCI Express capability, else 256 and none. `max_dma_regions` has
        an effect on API 0.2 only; 0.1 has 16. What the library itself reports is logged from the
        level on that the logger `vfio_user` has now.

        Raises `SocketBusy`, `SocketError`, `LibraryNotFound`, `LibraryError`, `DeviceError`.
        """
        self.socket_path = Path(socket_path)
        self.on_attach: Callable[[], None] | None = None
        self.on_disconnect: Callable[[], None] | None = None
        self.on_dma_map: Callable[[DmaRegion], None] | None = None
        self.on_dma_unmap: Callable[[DmaRegion], None] | None = None
        self.on_reset: Callable[[ResetType], None] | None = None
        self.on_config_write: Callable[[int, bytes], None] | None = None
        self.on_pin_released: Callable[[], None] | None = None
        self.config_filter: Callable[[int, bytes, bool], bytes | None] | None = None

        self._bars: dict[int, int] = {}
        self._vectors = 0
        self._msix_bar: tuple[int, int] | None = None
        self._realized = self._closed = False
        self._context = Context(library or Library.load(), self.socket_path)
        try:
            self._config = self._lay_out_config(express)
            self._config.identify(
                vendor=vendor_id,
                device=device_id,
                subsystem=(subsystem_vendor_id, subsystem_id),
                class_code=class_code,
                revision=revision,
            )
            if express:
                self._config.add(capabilities.express())
            reset = self._context.keep(abi.ResetCallback(self._library_reset))
            self._context.check("vfu_setup_device_reset_cb", reset)
            self._dma = DmaTable(self._context, self._mapped, self._unmapped)
            self._dma.set_up(max_dma_regions)
        except BaseException:
            self._context.remove_socket()
            self._context.destroy()
            raise

    # Declaration

    def _lay_out_config(self, express: bool) -> ConfigSpace:
        kind = PciType.EXPRESS if express else PciType.CONVENTIONAL
        self._context.check("vfu_pci_init", kind, abi.HEADER_TYPE_NORMAL, 0)
        address = self.library.call.vfu_pci_get_config_space(self._context.pointer())
        memory = (c.c_ubyte * _SIZES[kind]).from_address(address)
        self._config_memory = weakref.ref(memory)
        self._setup_region(
            Region.CONFIG,
            _SIZES[kind],
            abi.REGION_FLAG_ALWAYS_CALLBACK,
            ("config space", self._read_config, self._write_config),
        )
        return ConfigSpace(memoryview(memory).cast("B"))

    def _setup_region(
        self, region: int, size: int, flags: int, access: tuple[str, Read, Write]
    ) -> None:
        flags |= abi.REGION_FLAG_READ | abi.REGION_FLAG_WRITE
        # Only while the region of config space is set up there is no config space yet.
        pin = None if region == Region.CONFIG else self._config.pin
        callback = self._context.keep(region_callback(*access, self._context.failures, pin))
        self._context.check("vfu_setup_region", region, size, callback, flags, None, 0, -1, 0)

    def _alive(self) -> None:
        if self._closed:
            raise DeviceError(f"the device on {self.socket_path} is closed")

    def _undeclared(self) -> None:
        self._alive()
        if self._realized:
            raise DeviceError("the device is realized: its declaration is complete")

    def add_bar(
        self,
        index: int,
        size: int,
        *,
        read: Read,
        write: Write,
        is_64bit: bool = True,
        prefetchable: bool = True,
    ) -> None:
        """Declare memory BAR `index` of `size` bytes, a power of two from 16 to 2 GiB.

        A 64-bit BAR takes the next index too. `read(offset, length)` returns a little-endian
        integer or `length` bytes, `write(offset, data)` gets bytes; any length and alignment that
        stays inside the BAR can occur, up to 1 MiB. Raises `DeviceError`.
        """
        self._undeclared()
        taken = {index, index + 1} if is_64bit else {index}
        if index < 0 or max(taken) > Region.BAR5:
            raise DeviceError(f"there is no {64 if is_64bit else 32}-bit BAR {index}")
        if taken & self._bars.keys():
            raise DeviceError(f"BAR {index} is taken")
        if size & (size - 1) or not 16 <= size <= _LARGEST_BAR:
            raise DeviceError(f"BAR {index}: {size:#x} is no power of two from 16 to 2 GiB")
        self._setup_region(index, size, abi.REGION_FLAG_MEMORY, (f"BAR {index}", read, write))
        self._config.set_bar(index, size, is_64bit=is_64bit, prefetchable=prefetchable)
        self._bars.update(dict.fromkeys(taken, 0) | {index: size})

    def set_interrupts(
        self,
        *,
        intx: int = 0,
        msi: int = 0,
        msix: int = 0,
        msix_bar: int | None = None,
        msix_table: int = 0,
        msix_pending: int | None = None,
    ) -> None:
        """Declare the interrupts: INTA# (`intx` 0 or 1) and how many MSI and MSI-X vectors.

        MSI-X needs `msix_bar`, with the table at offset `msix_table` and the pending bits at
        `msix_pending` (default: behind the table). If no such BAR is declared, one that fits is
        made. Virtual machines keep the table themselves. Call it once. Raises `DeviceError`.
        """
        self._undeclared()
        if self._vectors:
            raise DeviceError("the interrupts are declared")
        if intx not in (0, 1):
            raise DeviceError(f"a function has one INTx pin or none, not {intx}")
        try:
            if msi:
                self._config.add(capabilities.msi(msi))
            if msix:
                if msix_bar is None:
                    raise DeviceError("MSI-X needs msix_bar")
                pending = msix_table + 16 * msix if msix_pending is None else msix_pending
                self._config.add(capabilities.msix(msix, msix_bar, msix_table, pending))
                end = max(msix_table + 16 * msix, pending + -(-msix // 64) * 8)
                self._msix_bar = msix_bar, end
        except ValueError as error:
            raise DeviceError(str(error)) from error
        for kind, count in ((Irq.INTX, intx), (Irq.MSI, msi), (Irq.MSIX, msix)):
            self._context.check("vfu_setup_device_nr_irqs", kind, count)
        if intx:
            released = self._context.keep(abi.IrqStateCallback(self._pin_unmasked))
            self._context.check("vfu_setup_irq_state_callback", Irq.INTX, released)
        self._config.set_interrupt_pin(intx)
        self._vectors = max(intx, msi, msix)

    def add_capability(
        self,
        capability_id: int,
        body: bytes,
        *,
        writable: bytes = b"",
        clearable: bytes = b"",
        extended: bool = False,
        version: int = 1,
    ) -> int:
        """Add a PCI capability and return its offset in config space.

        For the arguments see `vfio_user.capabilities.Capability`. Raises `DeviceError` when there
        is no room.
        """
        self._undeclared()
        return self._config.add(
            capabilities.Capability(capability_id, body, writable, clearable, extended, version)
        )

    def realize(self) -> None:
        """End the declaration. What `config` holds now is what a reset restores."""
        self._undeclared()
        if self._msix_bar is not None:
            self._place_msix_table(*self._msix_bar)
        declared = bytes(self._config.data)
        self._context.check("vfu_realize_ctx")
        self._config.data[:] = declared  # the library marks each BAR that it does not know as I/O
        self._config.remember()
        self._realized = True

    def _place_msix_table(self, bar: int, end: int) -> None:
        size = self._bars.get(bar)
        if size is None:
            table = bytearray(max(0x1000, 1 << (end - 1).bit_length()))

            def write(offset: int, data: bytes) -> None:
                table[offset : offset + len(data)] = data

            self.add_bar(
                bar,
                len(table),
                read=lambda offset, length: bytes(table[offset : offset + length]),
                write=write,
                is_64bit=False,
                prefetchable=False,
            )
        elif size < end:
            raise DeviceError(f"BAR {bar} of {size:#x} bytes is too small for MSI-X: {end:#x}")

    # Service

    @property
    def library(self) -> Library:
        """The libvfio-user that serves this device."""
        return self._context.library

    @property
    def config(self) -> memoryview:
        """The config space itself, 256 or 4096 bytes; the client sees what is written here."""
        self._alive()
        return self._config.data

    @property
    def bus_master(self) -> bool:
        """Whether the guest allows DMA (PCI_COMMAND.BusMaster). The device has to respect it."""
        return not self._closed and self._config.bus_master

    @property
    def attached(self) -> bool:
        """Whether a client is connected."""
        return self._context.attached

    @property
    def dma_regions(self) -> tuple[DmaRegion, ...]:
        """The regions that are mapped now."""
        return self._dma.regions()

    def fileno(self) -> int:
        """The descriptor to poll for reading. It changes with each `attach` and each disconnect."""
        return self._context.fileno()

    def attach(self) -> bool:
        """Take the client that waits on the socket. False: none, or it did not speak vfio-user.

        Blocks only as long as a connected client takes to say its version.
        """
        if not self._realized:
            raise DeviceError("attach needs a realized device")
        if not self._context.attach():
            return False
        if self.on_attach is not None:
            self.on_attach()
        return True

    def run(self, limit: int = 64, spin: int = 16) -> int:
        """Handle the requests that are there and return how many; at most `limit`.

        After each request it looks `spin` more times for the next one: a client that waits for
        replies usually has it ready before poll(2) could tell. Use `spin=0` when other work waits.

        Raises `ClientLost` when the client is gone; `attach` takes the next one.
        """
        try:
            return self._context.run(limit, spin)
        except ClientLost:
            if self.on_disconnect is not None:
                self.on_disconnect()
            raise

    def trigger_interrupt(self, vector: int = 0) -> bool:
        """Send interrupt `vector`; the kind is what the client enabled.

        Returns False if the client listens to none. Raises `DeviceError` for a vector that the
        device does not have.
        """
        if not self._realized or not 0 <= vector < self._vectors:
            raise DeviceError(f"no interrupt {vector}: {self._vectors} declared")
        if vector == 0 and self.attached:
            self._config.pin.raise_()
        return self._context.trigger_interrupt(vector)

    def hang_up(self) -> None:
        """Close the connection to the client, as if this process had died. `run` finds out."""
        self._alive()
        self._context.hang_up()

    def close(self) -> None:
        """Disconnect the client, unmap all DMA regions and remove the socket. Idempotent."""
        context = self._context
        context.idle()
        if self._closed:
            return
        self._closed = True
        context.remove_socket()
        context.hang_up()
        self._config.reset()
        memory = let_go(self._config.data, self._config_memory)
        if memory is None:
            context.destroy()
        else:
            context.log.error("a view of the config space is still held: it is freed after that")
            weakref.finalize(memory, context.destroy).atexit = False
        was_attached, context.attached = context.attached, False
        if was_attached and self.on_disconnect is not None:
            self.on_disconnect()
        context.failures.raise_interrupt()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # What the library calls

    def _read_config(self, offset: int, length: int) -> bytes:
        data = bytes(self._config.data[offset : offset + length])
        if self.config_filter is not None:
            return self.config_filter(offset, data, False) or bytes(length)
        return data

    def _write_config(self, offset: int, data: bytes) -> None:
        if self.config_filter is not None:
            filtered = self.config_filter(offset, data, True)
            if filtered is None:
                return
            data = filtered
        if self._config.write(offset, data):
            self._reset(ResetType.FUNCTION_LEVEL)
        elif self.on_config_write is not None:
            self.on_config_write(offset, data)

    def _library_reset(self, _: int, kind: int) -> int:
        try:
            if self._context.attached:  # a context without a client is "reset" when it is destroyed
                self._reset(ResetType(kind))
        except BaseException as error:
            return self._context.failures.answer("reset", error)
        return 0

    def _reset(self, kind: ResetType) -> None:
        if not self._closed:  # closing has reset the config space and let it go
            self._config.reset()
        if self.on_reset is not None:
            self.on_reset(kind)

    def _pin_unmasked(self, _: int, start: int, count: int, masked: bool) -> None:  # noqa: ARG002
        try:
            if not masked and self.on_pin_released is not None:
                self.on_pin_released()
        except BaseException as error:
            self._context.failures.report("on_pin_released", error)

    def _mapped(self, region: DmaRegion) -> None:
        if self.on_dma_map is not None:
            self.on_dma_map(region)

    def _unmapped(self, region: DmaRegion) -> None:
        if self.on_dma_unmap is not None:
            self.on_dma_unmap(region)
