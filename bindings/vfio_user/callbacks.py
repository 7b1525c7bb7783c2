"""The way from libvfio-user into Python: fast for registers, and no exception is ever lost."""

import ctypes as c
import errno
import logging
import sys
from collections.abc import Callable
from typing import Any, Final

from vfio_user import abi
from vfio_user.config_space import InterruptPin

Read = Callable[[int, int], bytes | int]
"""`read(offset, length)` returns the register, as a little-endian integer or as `length` bytes."""
Write = Callable[[int, bytes], None]
"""`write(offset, data)`"""

_LEVELS: Final = (
    logging.CRITICAL,  # LOG_EMERG, LOG_ALERT, LOG_CRIT
    logging.CRITICAL,
    logging.CRITICAL,
    logging.ERROR,
    logging.WARNING,
    logging.INFO,  # LOG_NOTICE, LOG_INFO
    logging.INFO,
    logging.DEBUG,
)


class Failures:
    """What becomes of an exception in a callback: a line in the log and an errno for the client.

    What is no `Exception` (KeyboardInterrupt, SystemExit) is for the caller of `PciDevice.run`: it
    waits in `interrupt`.
    """

    def __init__(self, log: logging.LoggerAdapter[logging.Logger]) -> None:
        self._log = log
        self.interrupt: BaseException | None = None

    def report(self, what: str, error: BaseException) -> None:
        """Log `error` with its traceback, or keep it if it is meant to end the program."""
        if isinstance(error, Exception):
            self._log.error("%s failed", what, exc_info=error)
        else:
            self.interrupt = error

    def raise_interrupt(self) -> None:
        """Raise what waits in `interrupt`, once."""
        interrupt, self.interrupt = self.interrupt, None
        if interrupt is not None:
            raise interrupt

    def answer(self, what: str, error: BaseException) -> int:
        """`report`, and make the callback fail with the errno of an OSError, else EIO.

        The result is what the callback returns. Without an errno the library would answer success.
        """
        self.report(what, error)
        code = error.errno if isinstance(error, OSError) else None
        c.set_errno(code if code and 0 < code < 4096 else errno.EIO)
        return -1


def region_callback(
    name: str, read: Read, write: Write, failures: Failures, pin: InterruptPin | None = None
) -> Any:
    """A C callback for the accesses to one region, which release `pin`.

    This is the hot path: one pointer is aimed at the library's buffer again and again, which is
    several times faster than making a ctypes object or calling memmove for each access.
    """
    slot = c.c_void_p()
    characters = c.POINTER(c.c_char).from_buffer(slot)
    types = (c.c_uint8, c.c_uint16, c.c_uint32, c.c_uint64) if sys.byteorder == "little" else ()
    integers: dict[int, Any] = {c.sizeof(t): c.POINTER(t).from_buffer(slot) for t in types}

    def access(_: int, buffer: int, length: int, offset: int, is_write: bool) -> int:
        try:
            if pin is not None and pin.asserted:
                pin.release()
            if is_write:
                slot.value = buffer
                write(offset, characters[:length])  # type: ignore[arg-type] # of c_char: bytes
                return length
            value = read(offset, length)
            if not isinstance(value, int):
                if len(value) != length:
                    raise ValueError(f"read returned {len(value)} bytes")
                c.memmove(buffer, bytes(value), length)
            elif (pointer := integers.get(length)) is None:
                c.memmove(buffer, value.to_bytes(length, "little"), length)
            elif value >> (length << 3):  # also true of every negative number
                raise OverflowError(f"read returned {value:#x}")
            else:
                slot.value = buffer
                pointer[0] = value
            return length
        except BaseException as error:
            verb = "write to" if is_write else "read from"
            return failures.answer(f"{verb} {name} at {offset:#x}, {length} bytes,", error)

    return abi.RegionCallback(access)


def library_level(log: logging.LoggerAdapter[logging.Logger]) -> int:
    """The syslog level that lets through what `log` would show."""
    effective = log.getEffectiveLevel()
    return max(level for level in range(8) if level == 0 or _LEVELS[level] >= effective)


def logging_level(level: int) -> int:
    """The level of the logging module for a syslog level."""
    return _LEVELS[min(max(level, 0), abi.LOG_DEBUG)]
