"""A person's terminal on the guest's console."""

import os
import select
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from viommu.lab.console import Console, ConsoleTimeout

ESCAPE = b"\x1d"  # Ctrl-]

_CHUNK = 1 << 16


def session_command(device: str, terminal: int) -> str:
    """The guest's command line for an interactive shell on its console `device`.

    The shell gets the size of `terminal`, a descriptor. While it runs, the kernel's errors show
    on the console too.
    """
    columns, rows = 0, 0
    with suppress(OSError):
        columns, rows = os.get_terminal_size(terminal)
    size = f"cols {columns or 80} rows {rows or 24}"
    # In the session that has the terminal already: the end of a session of its own would hang
    # the terminal up.
    return (
        f"exec <>/dev/{device} >&0 2>&0; cd; dmesg -n 4; stty sane {size}; "
        "sh -i; stty raw -echo; dmesg -n 1"
    )


def pass_through(console: Console, end: bytes, source: int, sink: int) -> bytes | None:
    """Connect a terminal (descriptors to read and to write) with the console.

    Returns what the guest printed after `end`, unless that is empty, or None when the person typed Ctrl-] or closed
    the terminal. Raises `ConsoleClosed`.
    """
    held = b""
    with _raw(source):
        while True:
            ready, _, _ = select.select([console.fileno(), source], [], [], 1.0)
            if source in ready:
                typed = os.read(source, _CHUNK)
                before, escape, _ = typed.partition(ESCAPE)
                console.send(before)
                if escape or not typed:
                    return None
            try:
                held += console.receive(0)
            except ConsoleTimeout:
                continue
            shown, found, rest = held.partition(end) if end else (held, b"", b"")
            # What may be the beginning of `end` waits for what follows.
            keep = 0 if found else _overlap(shown, end)
            held = shown[len(shown) - keep :]
            _write(sink, shown[: len(shown) - keep])
            if found:
                return rest


def _overlap(data: bytes, end: bytes) -> int:
    return next((n for n in range(len(end) - 1, 0, -1) if data.endswith(end[:n])), 0)


def _write(sink: int, data: bytes) -> None:
    while data:
        data = data[os.write(sink, data) :]


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    if not os.isatty(descriptor):
        yield
        return
    saved = termios.tcgetattr(descriptor)
    # What was typed ahead is kept.
    tty.setraw(descriptor, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, saved)
