"""Commands over a serial console: how they are sent, and where their output ends."""

import re
import secrets
import shlex
import time
from collections.abc import Callable

from viommu.lab.console import Console, ConsoleTimeout
from viommu.lab.interactive import pass_through, session_command

# A command travels through the guest's serial driver, which drops what exceeds its buffers.
COMMAND_LIMIT = 32 << 10

# What a root shell's prompt ends with; seconds after which we ask for one.
_PROMPT = b"# "
_PATIENCE = 5.0
_STATUS_END = b";"

_BEGIN_MARK = re.compile(r"\b[0-9a-f]{16}<")
_END_MARK = re.compile(r">[0-9a-f]{16}(\d+);")


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
        # We may take something else for a prompt and say it twice. The second time, it must not
        # replace a shell that has already read our first command.
        line = (
            f'[ "$viommu" ] || {{ stty raw -echo; dmesg -n 1; printf "%s<" {mark}; '
            "export viommu=1; exec sh /proc/self/fd/0; }\n"
        )
        while True:
            wait = min(deadline - time.monotonic(), _PATIENCE)
            try:
                seen, _ = self._console.wait_for(f"{mark}<".encode(), _PROMPT, timeout=max(wait, 0))
            except ConsoleTimeout:
                if time.monotonic() >= deadline:
                    raise
                # Perhaps the prompt is an odd one, or a message of the kernel stands in it.
                self._console.send(b"\n")
                continue
            if seen == 0:
                return
            self._console.send(line.encode())

    def run(
        self, command: str, timeout: float, follow: Callable[[bytes], None] | None = None
    ) -> tuple[bytes, int]:
        """Run one command; returns its output and its exit status. `follow` gets the output as it comes."""
        begin, end, line = _framed(command)
        if len(line) > COMMAND_LIMIT:
            raise ValueError(f"a command has less than {COMMAND_LIMIT} bytes: put() a file first")
        deadline = time.monotonic() + timeout
        self._console.note(f"$ {command}")
        ignore = self._console.listen(Between(begin, end, follow).feed) if follow else None
        try:
            self._console.send(line)
            _, output = self._console.wait_for(end, timeout=timeout)
        finally:
            if ignore is not None:
                ignore()
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
        rest = pass_through(self._console, end, source, sink)
        if rest is None:
            return False
        if _STATUS_END not in rest:
            self._console.wait_for(_STATUS_END, timeout=_PATIENCE)
        return True


class Between:
    """Hands on to `follow` what comes between two marks, as it comes in pieces."""

    def __init__(self, begin: bytes, end: bytes, follow: Callable[[bytes], None]) -> None:
        self._begin, self._end, self._follow = begin, end, follow
        self._rest = b""
        self._inside = self._over = False

    def feed(self, data: bytes) -> None:
        """The next piece. What may be the beginning of the end mark waits for the next one."""
        if self._over:
            return
        self._rest += data
        if not self._inside:
            _, found, rest = self._rest.partition(self._begin)
            if not found:
                return
            self._inside, self._rest = True, rest
        output, self._over, rest = self._split()
        self._rest = rest
        if output:
            self._follow(output)

    def _split(self) -> tuple[bytes, bool, bytes]:
        output, found, rest = self._rest.partition(self._end)
        if found:
            return output, True, rest
        size = len(self._end)
        held = next((n for n in range(size - 1, 0, -1) if output.endswith(self._end[:n])), 0)
        return output[: len(output) - held], False, output[len(output) - held :]


def transcript(log: str) -> str:
    """Return a console's log without our marks; what a command failed with takes their place."""
    return _END_MARK.sub(_outcome, _BEGIN_MARK.sub("", log))


def _outcome(end: re.Match[str]) -> str:
    return "" if end[1] == "0" else f"[status {end[1]}]\n"


def _framed(command: str) -> tuple[bytes, bytes, bytes]:
    """Return the marks that the guest prints around a command's output, and what to send.

    In what is sent, no mark stands as the guest prints it.
    """
    mark = secrets.token_hex(8)
    quoted = shlex.quote(command)
    line = f"printf '%s<' {mark}; (eval {quoted}) </dev/null 2>&1; printf '>%s%d;' {mark} $?\n"
    return f"{mark}<".encode(), f">{mark}".encode(), line.encode(errors="surrogateescape")
