"""The `viommu` command: what a user's mistakes become, and `serve` as a process."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.client import Client
from tests.disk_tools import provided
from viommu.cli import app
from viommu.lab.config import machine_directory

SENTENCE = re.compile(r"viommu: [^\n]+\n")
GOOD = (machine_directory() / "aarch64-virt.toml").read_text()

# An old QEMU is not at hand; this is what one says, and how it ends.
OLD_QEMU = """#!/bin/sh
echo "qemu-system-aarch64: -device {}: 'vfio-user-pci' is not a valid device model name" >&2
exit 1
"""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where runs keep their directories, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="vc-", dir="/tmp") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        yield Path(path)


class Outcome:
    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Outcome]


@pytest.fixture
def viommu(home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command to its end in this process, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as raised:
            app([str(word) for word in words])
        out, err = capfd.readouterr()
        return Outcome(raised.value.code, out, err)

    return run


def left(home: Path) -> list[str]:
    """What runs have left behind, less the lock that they share."""
    return sorted(path.name for path in home.rglob("*") if path.name not in ("viommu", "lock"))


# Mistakes


def mistake(outcome: Outcome, sentence: str) -> None:
    """One sentence on one line, nothing else, and exit code 1."""
    assert re.search(sentence, outcome.err), outcome.err
    assert SENTENCE.fullmatch(outcome.err), outcome.err
    assert (outcome.code, outcome.out) == (1, "")


@pytest.mark.parametrize("command", ["serve", "boot"])
def test_a_machine_that_is_not_there(viommu: Run, command: str) -> None:
    mistake(
        viommu(command, "nope"),
        r"no machine 'nope'; known: aarch64-nvme, aarch64-virt, x86_64-nvme, x86_64-q35, or a \.toml file",
    )
    mistake(viommu(command, "/nowhere/one.toml"), "one.toml: cannot be read: No such file")


@pytest.mark.parametrize("command", ["serve", "boot"])
@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('arch = "aarch64"', "arch = ", r"one\.toml: not TOML: .*line"),
        ('arch = "aarch64"', 'arch = "mips"', r"arch: 'mips' is wrong, .*'aarch64' or 'x86_64'"),
        ("slot = 1", "slot = 5\ncolour = 1", r"devices\[0\]\.colour: unknown key, allowed: "),
    ],
)
def test_a_machine_that_is_wrong(
    viommu: Run, tmp_path: Path, command: str, old: str, new: str, sentence: str
) -> None:
    file = tmp_path / "one.toml"
    file.write_text(GOOD.replace(old, new))
    assert file.read_text() != GOOD
    mistake(viommu(command, file), sentence)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (None, r"mine\.py:Mine: there is no such file; its path begins at the folder of the TOML"),
        ("1 / 0", r"mine\.py:Mine: ZeroDivisionError: division by zero \(mine\.py, line 1\)"),
        ("", r"mine\.py:Mine: there is no 'Mine', but no endpoint at all"),
    ],
)
def test_a_model_of_ones_own_that_is_wrong(
    viommu: Run, home: Path, tmp_path: Path, source: str | None, sentence: str
) -> None:
    file = tmp_path / "one.toml"
    file.write_text(GOOD.replace('"test-engine"', '"mine.py:Mine"'))
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    mistake(viommu("serve", file), f"device 'engine0': {tmp_path}/{sentence}")
    assert left(home) == []


def test_a_directory_that_is_not_there(viommu: Run, home: Path) -> None:
    mistake(
        viommu("serve", "--directory", home / "none"),
        f"there is no directory {home}/none: make it, or choose another --directory",
    )


def test_a_directory_that_cannot_be_written(viommu: Run) -> None:
    mistake(
        viommu("serve", "--directory", "/proc/self"),
        r"the socket /proc/self/smmu\.sock cannot be made: .*; choose another --directory",
    )


def test_a_control_socket_that_cannot_be(viommu: Run) -> None:
    mistake(
        viommu("serve", "--control", "/proc/self/c.sock"),
        r"the control socket /proc/self/c\.sock cannot be made: \w",
    )


def test_a_path_that_is_too_long(viommu: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = home / ("x" * 100)
    long.mkdir()
    mistake(
        viommu("serve", "--directory", long), "is longer than the 107 that a Unix socket allows"
    )
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    mistake(viommu("serve"), "is longer than the 107 that a Unix socket allows")


def test_a_file_in_the_place_of_a_socket(viommu: Run, home: Path) -> None:
    (home / "engine0.sock").write_text("precious")
    mistake(viommu("serve", "--directory", home), "exists and is not a socket; it is left alone")
    assert left(home) == ["engine0.sock"]


def test_a_trace_that_cannot_be_written(viommu: Run, home: Path) -> None:
    mistake(
        viommu("serve", "--directory", home, "--trace", "/nowhere/trace"),
        "the trace cannot be written to /nowhere/trace: No such file or directory",
    )
    mistake(viommu("serve", "--trace", home), f"cannot be written to {home}: Is a directory")
    assert left(home) == []


@pytest.mark.parametrize("command", ["boot", "demo"])
def test_nothing_is_set_up(
    viommu: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("VIOMMU_CACHE", str(tmp_path))
    mistake(viommu(command), f"Nothing is set up in {tmp_path}: run viommu setup")


def test_no_library(viommu: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIO_USER_LIBRARY", str(tmp_path / "none.so"))
    mistake(viommu("serve"), r"cannot load the libvfio-user of \$VFIO_USER_LIBRARY: .*none\.so")
    mistake(viommu("boot", "--raw"), "`viommu serve` did not start: cannot load the libvfio-user")


def test_doctor_names_what_is_missing(
    viommu: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIOMMU_CACHE", str(tmp_path))
    outcome = viommu("doctor")
    assert outcome.code == 1
    assert outcome.out.count("missing") == 6
    assert "Run viommu setup to provide what is missing." in outcome.out


def test_a_kernel_that_is_not_there(viommu: Run) -> None:
    outcome = viommu("boot", "--kernel", "/nowhere/Image")
    assert outcome.code == 2
    assert "'--kernel': file '/nowhere/Image' does not exist" in outcome.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--snapshot"], "--disk-format and --snapshot are of an image: name it with --disk"),
        (["--disk", "/nowhere/a.raw"], "did not start: /nowhere/a.raw: No such file or directory"),
        (["--disk", "a.raw", "--append", "x"], "a disk boots its own kernel: leave out --kernel"),
        (["--firmware", "uefi"], "aarch64-virt has no disk to boot from: give one with --disk"),
        (["--disk", "a.raw", "--firmware", "bios"], "there is no BIOS for aarch64, allowed: uefi"),
    ],
)
def test_a_disk_that_cannot_boot(viommu: Run, home: Path, words: list[str], sentence: str) -> None:
    provided()
    mistake(viommu("boot", *words), sentence)
    assert left(home) == []


@pytest.fixture
def fake_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of QEMU, in a cache directory that has the rest."""
    program = tmp_path / "qemu"
    (tmp_path / "kernel").touch()
    (tmp_path / "initramfs").write_bytes(b"image")
    guest = {"origin": "test", "release": "6.12.0", "modules": []} | {
        name: str(tmp_path / name) for name in ("kernel", "initramfs")
    }
    manifest = {
        "libvfio_user": {"origin": "test", "path": str(program), "version": "0.1"},
        "qemu": {"aarch64": {"origin": "test", "argv": [str(program)], "version": "10.0.2"}},
        "guests": {"aarch64": guest},
    }
    # The library is not the matter here.
    found = Path.home() / ".cache" / "viommu"
    base = Path(os.environ.get("VIOMMU_CACHE") or found)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "libvfio-user").symlink_to(base / "libvfio-user")
    monkeypatch.setenv("VIOMMU_CACHE", str(tmp_path))
    return program


def test_a_qemu_that_is_too_old(viommu: Run, home: Path, fake_qemu: Path) -> None:
    fake_qemu.write_text(OLD_QEMU)
    fake_qemu.chmod(0o755)
    mistake(
        viommu("boot", "--raw"),
        "qemu-system-aarch64 10.0.2 has no vfio-user-pci: QEMU 10.1 or newer is needed; "
        "viommu setup provides one",
    )
    assert left(home) == []


def test_a_qemu_that_is_gone(viommu: Run, home: Path, fake_qemu: Path) -> None:
    mistake(viommu("boot", "--raw"), f"{fake_qemu} is gone: run viommu setup")
    assert left(home) == []


def test_a_qemu_that_refuses_shows_what_it_said(viommu: Run, home: Path, fake_qemu: Path) -> None:
    fake_qemu.write_text("#!/bin/sh\necho 'no luck today' >&2\nexit 3\n")
    fake_qemu.chmod(0o755)
    outcome = viommu("boot", "--raw")
    assert outcome.code == 1
    sentence, *evidence = outcome.err.splitlines()
    assert sentence == (
        "viommu: QEMU ended with exit code 3 while setting the machine up: no luck today"
    )
    assert any("| no luck today" in line for line in evidence)
    assert "Traceback" not in outcome.err
    assert left(home) == []


# Help


def test_help_fits_into_80_columns(viommu: Run) -> None:
    helps = [viommu("--help")]
    commands = ("serve", "ledger", "boot", "demo", "ctl", "doctor")
    assert all(command in helps[0].out for command in commands)
    listed = helps[0].out.partition("Commands:")[2]
    assert "..." not in listed, "each command fits into its line"
    helps += [viommu(command, "--help") for command in commands]
    for outcome in helps:
        assert outcome.code == 0
        assert max(len(line) for line in outcome.out.splitlines()) <= 80
    assert "ready-fd" not in helps[1].out


def test_version(viommu: Run) -> None:
    assert re.fullmatch(r"viommu \d+\.\d+\.\d+\n", viommu("--version").out)


# Serve


@contextmanager
def start(*words: str | Path) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "viommu.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def printed(process: "subprocess.Popen[str]") -> str:
    """What `serve` prints until it serves."""
    assert process.stdout is not None
    text = ""
    while "Ctrl-C ends it." not in text:
        line = process.stdout.readline()
        assert line, process.communicate()
        text += line
    return text


class Waiting(Client):
    """Waits for its turn, as QEMU does: there is one place in the queue."""

    def __init__(self, path: Path) -> None:
        self.serve = lambda: None
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(os.fspath(path))
        self.socket.settimeout(10)
        self._message_id = 0


def answers(path: Path) -> bool:
    client = Waiting(path)
    client.say_version()
    client.receive()
    found = client.read_int(7, 0, 2)
    client.close()
    return found not in (0, 0xFFFF)


def test_serve_prints_the_arguments_that_use_it(home: Path) -> None:
    with start("serve", "x86_64-q35") as process:
        text = printed(process)
        assert "to qemu-system-x86_64 (10.1 or newer)\n-machine q35." in text
        arguments = shlex.split(text.partition("\n\n")[2].partition("\n\n")[0].replace("\\\n", ""))
        assert "memory-backend-memfd,id=ram,size=1024M,share=on" in arguments
        devices = [json.loads(word) for word in arguments if word.startswith("{")]
        assert [(device["id"], device["addr"]) for device in devices] == [
            ("smmu", "0x1"),
            ("engine0", "0x2"),
            ("engine1", "0x3"),
        ]
        assert all(answers(Path(device["socket"]["path"])) for device in devices)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("own", [True, False])
def test_serve_leaves_nothing(home: Path, blow: signal.Signals, own: bool) -> None:
    sockets = home / "own"
    sockets.mkdir()
    words: list[str | Path] = ["--directory", sockets] if own else []
    with start("serve", *words) as process:
        printed(process)
        assert len(list(home.rglob("*.sock"))) == 4, "three functions, and control"
        process.send_signal(blow)
        assert process.wait(10) == 0
    assert left(home) == ["own"]


def test_serve_that_was_killed_is_tidied_up_by_the_next(home: Path) -> None:
    with start("serve") as process:
        printed(process)
        process.kill()
    assert len(left(home)) == 5, "four sockets and their directory"
    with start("serve") as process:
        printed(process)
        assert len(left(home)) == 5
        process.terminate()
        process.wait(10)
    assert left(home) == []


def test_serve_takes_the_sockets_of_one_that_was_killed(home: Path) -> None:
    for blow in (signal.SIGKILL, signal.SIGTERM):
        with start("serve", "--directory", home) as process:
            printed(process)
            assert answers(home / "smmu.sock")
            process.send_signal(blow)
            process.wait(10)
    assert left(home) == []


def test_a_second_serve_on_the_same_directory(viommu: Run, home: Path) -> None:
    words: list[str | Path] = ["serve", "--directory", home, "--trace", home / "trace"]
    with start(*words) as process:
        printed(process)
        assert answers(home / "engine0.sock")
        time.sleep(0.2)
        trace = (home / "trace").read_text()
        assert trace.count("ClientAttached") == 1
        mistake(
            viommu(*words),
            f"another server is listening on {home}/smmu.sock: end that one, "
            "or choose another --directory",
        )
        assert (home / "trace").read_text().startswith(trace), "the trace of the first is whole"
        assert all(answers(home / f"{name}.sock") for name in ("smmu", "engine0", "engine1"))
        process.terminate()
        assert process.wait(10) == 0
        assert process.stderr is not None
        said = process.stderr.read()
    assert "Traceback" not in said


def test_serve_goes_on_when_the_disk_is_full(home: Path) -> None:
    with start("serve", "--directory", home, "--trace", "/dev/full") as process:
        printed(process)
        assert answers(home / "engine0.sock")
        assert answers(home / "engine0.sock")
        process.terminate()
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == (
            "ERROR: the trace ends before event 1: No space left on device\n"
        )


def test_strangers_on_the_socket(home: Path) -> None:
    with start("serve", "--directory", home) as process:
        printed(process)
        for _ in range(3):
            stranger = Waiting(home / "smmu.sock")
            stranger.socket.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            stranger.close()
        assert answers(home / "smmu.sock")
        silent = Waiting(home / "smmu.sock")
        time.sleep(0.3)
        process.terminate()
        assert process.wait(10) == 0
        silent.close()
    assert left(home) == []


# Control


def test_ctl_finds_the_only_server(viommu: Run, home: Path) -> None:
    mistake(viommu("ctl"), "no server is running: start `viommu serve`, or name its --control")
    with start("serve") as first:
        printed(first)
        assert re.search(r"│ methods +│", viommu("ctl").out)
        listed = json.loads(viommu("ctl", "--json", "methods").out)
        assert "methods" in [method["name"] for method in listed]
        with start("serve", "--control", home / "own.sock", "--directory", home) as second:
            printed(second)
            assert "methods" in viommu("ctl", "--control", home / "own.sock").out
        with start("serve") as second:
            printed(second)
            mistake(viommu("ctl"), "several servers are running: choose --control /.* or /.*sock")
            second.kill()
            second.wait(10)
        assert viommu("ctl").code == 0, "what was killed is not running"


def test_ctl_says_what_is_wrong(viommu: Run, home: Path) -> None:
    mistake(viommu("ctl", "--control", home / "none"), f"nobody serves {home}/none: No such file")
    with start("serve") as process:
        printed(process)
        mistake(viommu("ctl", "nope"), "there is no method 'nope'")
        mistake(viommu("ctl", "methods", "colour"), "'colour' is no parameter: write key=value")
        mistake(viommu("ctl", "methods", "colour=1"), "methods: there is no parameter 'colour'")
