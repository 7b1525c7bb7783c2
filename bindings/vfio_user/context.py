"""One libvfio-user context: its life, its client, its log. Knows nothing of PCI."""

import contextlib
import ctypes as c
import errno
import logging
import os
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final

from vfio_user import abi
from vfio_user.callbacks import Failures, library_level, logging_level
from vfio_user.errors import ClientLost, DeviceError, LibraryError
from vfio_user.library import Library
from vfio_user.socket_path import claim

_OUT_OF_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class _Log(logging.LoggerAdapter[logging.Logger]):
    """Lines that begin with the name of the socket."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{(self.extra or {})['socket']}: {msg}", kwargs


class Context:
    """A context that listens on `path` and serves one client at a time without blocking."""

    def __init__(self, library: Library, path: Path) -> None:
        """Create the context and its socket. Raises `SocketError` or `LibraryError`."""
        self.library = library
        self.path = path
        self.log = _Log(logging.getLogger("vfio_user"), {"socket": path.name})
        self.failures = Failures(self.log)
        self.attached = False
        self._kept: list[Any] = []
        self._in_library = False
        self._expect_refusal = False
        self._pointer: int | None = library.call.vfu_create_ctx(
            abi.TRANSPORT_SOCKET, claim(path), abi.FLAG_ATTACH_NON_BLOCKING, None, 0
        )
        if self._pointer is None:
            raise LibraryError(f"vfu_create_ctx on {path}", c.get_errno())
        created = path.stat()
        self._socket_identity = created.st_dev, created.st_ino
        os.set_inheritable(self.fileno(), False)
        self.check("vfu_setup_log", self.keep(abi.LogCallback(self._logged)), self._level())

    def _level(self) -> int:
        return library_level(self.log)

    @property
    def closed(self) -> bool:
        """Whether `destroy` has been called."""
        return self._pointer is None

    def pointer(self) -> int:
        """The context for a call into C. Raises `DeviceError` if there is none any more."""
        if self._pointer is None:
            raise DeviceError(f"the device on {self.path} is closed")
        return self._pointer

    def check(self, function: str, *arguments: object) -> int:
        """Call a C function with this context. Raises `LibraryError` for a negative result."""
        return self.library.check(function, self.pointer(), *arguments)

    def keep(self, callback: Any) -> Any:
        """Keep a C callback as long as the context that may call it."""
        self._kept.append(callback)
        return callback

    def idle(self) -> None:
        """Raise `DeviceError` inside a callback: the library cannot be entered twice."""
        if self._in_library:
            raise DeviceError("attach, run and close cannot be called from a callback")

    def fileno(self) -> int:
        """The descriptor to poll: that of the client, else that of the listening socket."""
        descriptor: int = self.library.call.vfu_get_poll_fd(self.pointer())
        return descriptor

    def attach(self) -> bool:
        """Take the waiting client. False: none, or the negotiation failed (logged)."""
        self.idle()
        if self.attached:
            raise DeviceError("a client is attached already")
        if self.library.call.vfu_attach_ctx(self.pointer()) < 0:
            code = c.get_errno()
            if code in _OUT_OF_RESOURCES:
                raise LibraryError("vfu_attach_ctx", code)
            if code not in (errno.EAGAIN, errno.EINTR):
                self.log.warning("a client failed to attach: %s", os.strerror(code))
            return False
        os.set_inheritable(self.fileno(), False)
        self.attached = True
        return True

    def run(self, limit: int, spin: int) -> int:
        """Handle up to `limit` requests; after each, look `spin` times for the next.

        Raises `ClientLost`, `LibraryError`, and what a callback raised to end the program.
        """
        self.idle()
        if not self.attached:
            raise DeviceError("there is no client to run for")
        run, context = self.library.call.vfu_run_ctx, self.pointer()
        handled = misses = result = 0
        self._in_library = True
        try:
            while handled < limit:
                result = run(context)
                if result > 0:
                    handled += result
                    misses = 0
                elif result < 0 or not handled or misses >= spin:
                    break
                else:
                    misses += 1
            code = c.get_errno()
        finally:
            self._in_library = False
        if result >= 0:
            self.failures.raise_interrupt()
            return handled
        if code != errno.ENOTCONN:
            raise LibraryError("vfu_run_ctx", code)
        self.attached = False
        self.failures.raise_interrupt()
        raise ClientLost(f"the client of {self.path} closed its connection")

    def trigger_interrupt(self, vector: int) -> bool:
        """Signal a vector. False if the client gave no eventfd for it."""
        self._expect_refusal = True
        try:
            result = self.library.call.vfu_irq_trigger(self.pointer(), vector)
            code = c.get_errno()
        finally:
            self._expect_refusal = False
        if result < 0 and code != errno.ENOENT:
            raise LibraryError("vfu_irq_trigger", code)
        return bool(result >= 0)

    def hang_up(self) -> None:
        """Close the connection to the client; the library finds out at its next reply.

        The client reads the end of the stream. If a request of its was left unread, the kernel would tell it of a
        connection reset instead, and QEMU 11.1 aborts on that (`error_setv: Assertion '*errp == NULL'`).
        """
        if not self.attached:
            return
        connection = socket.socket(fileno=self.fileno())  # a copy would need a descriptor
        try:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # no more can come …
                while connection.recv(1 << 16):  # … and nothing is left
                    pass
        finally:
            connection.detach()

    def remove_socket(self) -> None:
        """Unlink the socket, unless another server has put its own in that place."""
        with contextlib.suppress(FileNotFoundError):
            found = self.path.stat()
            if (found.st_dev, found.st_ino) == self._socket_identity:
                self.path.unlink()

    def destroy(self) -> None:
        """Unmap all DMA regions, drop the client and free the context. Idempotent."""
        self.idle()
        context, self._pointer = self._pointer, None
        if context is None:
            return
        self._in_library = True
        try:
            self.library.call.vfu_destroy_ctx(context)
        finally:
            self._in_library = False

    def _logged(self, _: int, level: int, message: bytes) -> None:
        try:
            # That the client has not enabled an interrupt is an answer, not an error.
            chosen = logging.DEBUG if self._expect_refusal else logging_level(level)
            self.log.log(chosen, "%s", message.decode(errors="replace"))
        except BaseException as error:
            self.failures.interrupt = error
