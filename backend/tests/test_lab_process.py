"""Processes and directories that do not outlive those who made them."""

import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from viommu.lab.errors import LabError, SocketPathError, describe_exit
from viommu.lab.process import BoundProcess
from viommu.lab.rundir import SOCKET_PATH_LIMIT, RunDirectory, run_base


@contextmanager
def script(text: str) -> Iterator["subprocess.Popen[str]"]:
    """Another Python, whose first line of output tells that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        yield process
        process.kill()


def ends_within(pidfd: int, seconds: float) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


PARENT = """
    import threading, time
    from viommu.lab.process import BoundProcess
    child = BoundProcess(["sleep", "1000"])
    print(child.pid, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_dies_with_its_parent(blow: signal.Signals) -> None:
    with script(PARENT) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        assert not ends_within(child, 0.2)
        parent.send_signal(blow)
        assert ends_within(child, 5)
        os.close(child)


def test_a_child_outlives_the_thread_that_asked_for_it() -> None:
    made: list[BoundProcess] = []
    thread = threading.Thread(target=lambda: made.append(BoundProcess(["sleep", "1000"])))
    thread.start()
    thread.join()
    (child,) = made
    assert child.wait(0.3) is None
    child.close()
    assert not Path(f"/proc/{child.pid}").exists()


def test_a_child_whose_parent_died_before_it_began_does_not_begin() -> None:
    launcher = Path(sys.modules[BoundProcess.__module__].__file__ or "").with_name("exec_bound.py")
    done = subprocess.run(
        [sys.executable, launcher, "1", "9", "echo", "begun"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "the parent process is gone\n")


def test_output_and_exit_code_are_kept() -> None:
    child = BoundProcess(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert child.wait(5) == 3
    assert child.output() == "out\nerr"
    child.close()
    child.close()


def test_a_program_that_is_not_there() -> None:
    child = BoundProcess(["/nowhere/qemu"])
    assert child.wait(5) == 1
    assert child.output() == "/nowhere/qemu: No such file or directory"
    child.close()


def test_descriptors_are_inherited_only_if_wanted() -> None:
    wanted, unwanted = os.pipe()
    child = BoundProcess(["ls", "/proc/self/fd"], pass_fds=[wanted])
    assert child.wait(5) == 0
    assert str(wanted) in child.output().split()
    assert str(unwanted) not in child.output().split()
    child.close()
    os.close(wanted)
    os.close(unwanted)


def test_exit_codes_in_words() -> None:
    assert describe_exit(None) == "still running"
    assert describe_exit(1) == "ended with exit code 1"
    assert describe_exit(-9) == "killed by SIGKILL (exit code -9)"
    assert describe_exit(-77) == "killed by signal 77 (exit code -77)"


def test_a_run_directory_is_private_and_goes(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "base") as run:
        assert run.path.stat().st_mode & 0o777 == 0o700
        run.socket("smmu").touch()
    assert not run.path.exists()
    run.close()


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    text = f"""
        import time
        from pathlib import Path
        from viommu.lab.rundir import RunDirectory
        run = RunDirectory(Path({str(tmp_path)!r}))
        run.socket("smmu").touch()
        print(run.path, flush=True)
        time.sleep(1000)
    """
    with script(text) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        with RunDirectory(tmp_path):
            assert left.is_dir(), "a run that lives keeps its directory"
        other.kill()
        other.wait()
    assert left.is_dir()
    with RunDirectory(tmp_path) as run:
        assert not left.exists()
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == [run.path]


def test_the_base_is_this_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run_base() == tmp_path / "viommu"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    assert run_base().name == f"viommu-{os.getuid()}"


def test_a_base_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match=r"file/base cannot hold a run's directory: Not a dir"):
        RunDirectory(tmp_path / "file" / "base")


def test_a_socket_path_that_is_too_long(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as run:
        room = SOCKET_PATH_LIMIT - len(os.fsencode(run.socket("x"))) + 1
        assert len(os.fsencode(run.socket("x" * room))) == SOCKET_PATH_LIMIT
        with pytest.raises(SocketPathError, match=r"has 108 bytes, and at most 107 are possible"):
            run.socket("x" * (room + 1))


def test_a_killed_process_ends_at_once() -> None:
    child = BoundProcess(["sleep", "1000"])
    started = time.monotonic()
    child.close()
    assert time.monotonic() - started < 10
    assert child.exit_code == -signal.SIGKILL
