"""Commands over a serial console: how they are sent, and where their output ends."""

import secrets
import shlex
import time

from viommu.lab.console import Console, ConsoleTimeout
from viommu.lab.interactive import pass_through, session_command

# A command travels through the guest's serial driver, which drops what exceeds its buffers.
COMMAND_LIMIT = 32 << 10

# What a root shell's prompt ends with; seconds after which we speak up without having seen it.
_PROMPT = b"# "
_PATIENCE = 5.0
_STATUS_END = b";"


class Shell:
    """Takes over the shell on a console, and runs commands in it one by one.

    It never looks at the prompt or at an echo: around each command the guest prints marks that
    nobody can guess. The methods raise what `Console.wait_for` raises.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def take_over(self, timeout: float) -> None:
        """Wait for the shell, at most `timeout` seconds, and put it to our use.

        A second shell then reads its commands from the terminal like from a script: it has no
        prompt and edits no lines. The terminal changes nothing and echoes nothing.
        From here on the kernel speaks on the console in an emergency only.
        """
        deadline = time.monotonic() + timeout
        mark = secrets.token_hex(8)
        line = (
            f"stty raw -echo; dmesg -n 1; printf '%s<' {mark}; exec sh /proc/self/fd/0\n"
        ).encode()
        speak_up = time.monotonic() + _PATIENCE
        while True:
            wait = max(min(deadline, speak_up) - time.monotonic(), 0)
            try:
                seen, _ = self._console.wait_for(f"{mark}<".encode(), _PROMPT, timeout=wait)
            except ConsoleTimeout:
                if time.monotonic() >= deadline:
                    raise
                seen = 1
            if seen == 0:
                return
            self._console.send(line)
            speak_up = time.monotonic() + _PATIENCE

    def run(self, command: str, timeout: float) -> tuple[bytes, int]:
        """Run one command; returns its output and its exit status."""
        begin, end, line = _framed(command)
        if len(line) > COMMAND_LIMIT:
            raise ValueError(f"a command has less than {COMMAND_LIMIT} bytes: put() a file first")
        deadline = time.monotonic() + timeout
        self._console.send(line)
        _, output = self._console.wait_for(end, timeout=timeout)
        left = deadline - time.monotonic()
        _, status = self._console.wait_for(_STATUS_END, timeout=max(left, 1))
        return output.partition(begin)[2], int(status)

    def attach(self, device: str, source: int, sink: int) -> bool:
        """Give a person a shell on the console `device`, see `pass_through`.

        Returns True when the person left the shell, after which commands can be run again.
        """
        begin, end, line = _framed(session_command(device, source))
        self._console.send(line)
        self._console.wait_for(begin, timeout=_PATIENCE)
        if not pass_through(self._console, end, source, sink):
            return False
        self._console.wait_for(_STATUS_END, timeout=_PATIENCE)
        return True


def _framed(command: str) -> tuple[bytes, bytes, bytes]:
    """Return the marks that the guest prints around a command's output, and what to send.

    In what is sent, no mark stands as the guest prints it.
    """
    mark = secrets.token_hex(8)
    quoted = shlex.quote(command)
    line = f"printf '%s<' {mark}; (eval {quoted}) </dev/null 2>&1; printf '>%s%d;' {mark} $?\n"
    return f"{mark}<".encode(), f">{mark}".encode(), line.encode(errors="surrogateescape")
