"""The console and the shell on it, against a peer on the other end of a socket."""

import os
import pty
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from viommu.lab.console import Console, ConsoleClosed, ConsoleTimeout, PanicSeen
from viommu.lab.interactive import pass_through
from viommu.lab.shell import COMMAND_LIMIT, Shell, transcript

PANIC = b"[    2.013829] Kernel panic - not syncing: sysrq triggered crash\r\n"


@pytest.fixture
def ends() -> Iterator[tuple[Console, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield Console(near), far


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


Ends = tuple[Console, socket.socket]


def test_a_pattern_that_comes_in_pieces(ends: Ends) -> None:
    console, far = ends
    far.sendall(b"first\r\nma")
    thread = threading.Timer(0.05, far.sendall, [b"rk, rest"])
    thread.start()
    assert console.wait_for(b"other", b"mark", timeout=5) == (1, b"first\r\n")
    assert console.wait_for(b"rest", timeout=5) == (0, b", ")
    thread.join()
    assert console.text() == "first\nmark, rest"


def test_no_answer(ends: Ends) -> None:
    console, far = ends
    far.sendall(b"something else")
    started = time.monotonic()
    with pytest.raises(ConsoleTimeout):
        console.wait_for(b"mark", timeout=0.1)
    assert 0.1 <= time.monotonic() - started < 2
    assert console.text() == "something else"


@pytest.mark.parametrize("abrupt", [False, True])
def test_the_other_end_closes(ends: Ends, abrupt: bool) -> None:
    console, far = ends
    far.sendall(b"last words")
    if abrupt:
        # What nobody read makes the kernel report a reset connection.
        console.send(b"unread")
    far.close()
    with pytest.raises(ConsoleClosed):
        console.wait_for(b"mark", timeout=5)
    with pytest.raises(ConsoleClosed):
        console.send(b"more")
    assert console.text() == "last words"


@pytest.mark.parametrize("caller", [b"", b"[    T1]", b"[   C12]"])
def test_a_panic_is_seen(ends: Ends, caller: bytes) -> None:
    console, far = ends
    far.sendall(b"output" + PANIC.replace(b"] ", b"]" + caller + b" ", 1) + b"mark")
    with pytest.raises(PanicSeen):
        console.wait_for(b"mark", timeout=5)
    console.drain(0)
    assert console.panic_reason() == "Kernel panic - not syncing: sysrq triggered crash"


def test_the_first_sign_of_a_panic_is_its_reason(ends: Ends) -> None:
    console, far = ends
    oops = b"[    1.000000] BUG: kernel NULL pointer dereference, address: 0000000000000000\r\n"
    far.sendall(oops + PANIC)
    with pytest.raises(PanicSeen):
        console.wait_for(b"mark", timeout=5)
    reason = console.panic_reason()
    assert reason == "BUG: kernel NULL pointer dereference, address: 0000000000000000"


def test_a_file_that_speaks_of_panics_is_none(ends: Ends) -> None:
    console, far = ends
    text = b"what 'Kernel panic - not syncing' means\r\n[now] Kernel panic - not syncing\r\n"
    far.sendall(text + b"mark")
    assert console.wait_for(b"mark", timeout=5) == (0, text)
    assert console.panic_reason() is None


def test_much_output_is_read_fast(ends: Ends) -> None:
    console, far = ends
    data = b"0123456789abcde\n" * (1 << 20)
    thread = in_background(lambda: far.sendall(data + b"mark"))
    started = time.monotonic()
    _, before = console.wait_for(b"mark", timeout=60)
    took = time.monotonic() - started
    thread.join()
    assert before == data
    assert took < 5, f"16 MiB took {took:.1f} s"


def test_the_log_is_bounded(ends: Ends) -> None:
    console, far = ends
    thread = in_background(lambda: far.sendall(bytes(40 << 20) + b"mark"))
    console.wait_for(b"mark", timeout=60)
    thread.join()
    assert len(console.text()) <= 17 << 20
    assert console.text().endswith("mark")


@pytest.fixture
def host_shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell of this host behind a pseudo-terminal, as the guest's stands behind its UART."""
    # This host's kernel goes on talking as it likes.
    (tmp_path / "dmesg").write_text("#!/bin/sh\n")
    (tmp_path / "dmesg").chmod(0o755)
    near, far = socket.socketpair()
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        ["sh", "-c", "PS1='host# ' exec sh -i"],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env=os.environ | {"ENV": "", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    os.close(slave)
    threads = [
        in_background(lambda: copy(lambda: os.read(master, 65536), far.sendall)),
        in_background(lambda: copy(lambda: far.recv(65536), lambda data: write(master, data))),
    ]
    yield Shell(Console(near))
    shell.kill()
    shell.wait()
    near.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()
    near.close()
    far.close()
    os.close(master)


def copy(source: Callable[[], bytes], sink: Callable[[bytes], object]) -> None:
    try:
        while data := source():
            sink(data)
    except OSError:
        return


def write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def test_commands_in_a_shell(host_shell: Shell) -> None:
    host_shell.take_over(10)
    assert host_shell.run("echo hello", 5) == (b"hello\n", 0)
    assert host_shell.run("printf 'no newline'; exit 7", 5) == (b"no newline", 7)
    assert host_shell.run("echo out; echo err >&2; false", 5) == (b"out\nerr\n", 1)
    assert host_shell.run("cat; echo read", 5) == (b"read\n", 0)
    assert host_shell.run("cd /; x=1", 5) == (b"", 0)
    assert host_shell.run('echo "[$x]"', 5) == (b"[]\n", 0)
    assert host_shell.run("echo 'a\nb' \"c'd\" ü '$5' \\\\", 5)[0].decode() == "a\nb c'd ü $5 \\\n"
    assert host_shell.run("cat <<END\none\ntwo\nEND", 5) == (b"one\ntwo\n", 0)


def test_an_error_of_syntax_ends_the_command_only(host_shell: Shell) -> None:
    host_shell.take_over(10)
    output, status = host_shell.run("if then (", 5)
    assert status != 0
    assert b"yntax" in output
    assert host_shell.run("echo on", 5) == (b"on\n", 0)


def test_a_long_command(host_shell: Shell) -> None:
    host_shell.take_over(10)
    text = "x" * (COMMAND_LIMIT - 200)
    assert host_shell.run(f"echo {text}", 5) == (text.encode() + b"\n", 0)
    with pytest.raises(ValueError, match="a command has less than 32768 bytes"):
        host_shell.run("x" * COMMAND_LIMIT, 5)


def test_the_transcript_shows_commands_and_failures() -> None:
    log = "$ ls /no\n0123456789abcdef<ls: /no\n>0123456789abcdef2;$ true\n"
    assert transcript(log) == "$ ls /no\nls: /no\n[status 2]\n$ true\n"


def test_a_person_at_a_terminal(ends: Ends) -> None:
    console, far = ends
    person, terminal = pty.openpty()
    outcome: list[bytes | None] = []
    thread = in_background(
        lambda: outcome.append(pass_through(console, b">end", terminal, terminal))
    )
    far.sendall(b"guest# ")
    assert read_until(person, b"guest# ") == b"guest# "
    os.write(person, b"ls\r\x03")
    assert far.recv(100) == b"ls\r\x03"
    far.sendall(b"file >")
    assert read_until(person, b"file ") == b"file "
    far.sendall(b"e")
    far.sendall(b"vil\r\n>en")
    assert read_until(person, b"\n") == b">evil\r\n"
    far.sendall(b"d0;")
    thread.join(5)
    assert outcome == [b"0;"]
    os.close(person)
    os.close(terminal)


def test_the_escape_key_leaves(ends: Ends) -> None:
    console, far = ends
    person, terminal = pty.openpty()
    outcome: list[bytes | None] = []
    thread = in_background(
        lambda: outcome.append(pass_through(console, b">end", terminal, terminal))
    )
    os.write(person, b"a\x1db")
    thread.join(5)
    assert outcome == [None]
    assert far.recv(100) == b"a"
    os.close(person)
    os.close(terminal)


def read_until(descriptor: int, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += os.read(descriptor, 1000)
    return data
