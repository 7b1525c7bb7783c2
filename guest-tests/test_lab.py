"""The lab itself, on real guests: commands, and each way in which a guest can be lost."""

import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from viommu.lab.assets import Assets
from viommu.lab.config import Machine
from viommu.lab.errors import (
    CommandFailed,
    GuestPanic,
    GuestTimeout,
    LabError,
    MemoryNotShared,
    QemuExited,
)
from viommu.lab.guest import CommandResult, Guest

NewGuest = Callable[..., Guest]

# For what happens on the host's side alone.
ON_ONE_MACHINE = pytest.mark.parametrize("machine_name", ["aarch64-virt"], indirect=True)


def test_a_guest_is_what_was_asked_for(guest: Guest, machine: Machine, assets: Assets) -> None:
    assert guest.check("uname -r").strip() == assets.guest_for(machine.arch).release
    assert guest.check("uname -m").strip() == machine.arch
    memory = int(guest.check("grep MemTotal /proc/meminfo").split()[1])
    assert 0.85 < memory / (machine.memory_mib << 10) <= 1
    assert int(guest.check("nproc")) == machine.cpus
    functions = guest.check("ls /sys/bus/pci/devices").split()
    assert "0000:00:00.0" in functions
    assert not {"0000:00:01.0", "0000:00:02.0", "0000:00:03.0"} & set(functions)


@pytest.mark.parametrize(
    ("command", "result"),
    [
        ("echo hello", CommandResult("hello\n", 0)),
        ("printf 'no newline'; exit 7", CommandResult("no newline", 7)),
        ("echo out; echo err >&2; false", CommandResult("out\nerr\n", 1)),
        ("cat; echo read", CommandResult("read\n", 0)),
        ("kill -9 $(sh -c 'echo $PPID')", CommandResult("Killed\n", 137)),
        ("printf 'a\\r\\nb\\n'", CommandResult("a\nb\n", 0)),
        ("echo 'a\nb' \"c'd\" ü '$5' \\\\", CommandResult("a\nb c'd ü $5 \\\n", 0)),
        ("cat <<END\none\n\ttwo\nEND", CommandResult("one\n\ttwo\n", 0)),
        ("for i in 1 2; do\n  echo $i\ndone", CommandResult("1\n2\n", 0)),
        ("echo '[    1.000000] Kernel: no panic'", CommandResult("[    1.000000] Kernel: no panic\n", 0)),
    ],
)  # fmt: skip
def test_a_command(guest: Guest, command: str, result: CommandResult) -> None:
    assert guest.run(command) == result


def test_commands_do_not_know_of_each_other(guest: Guest) -> None:
    guest.check("cd /; x=1; export y=2; set -e")
    assert guest.check('echo "$PWD[$x$y]"') == "/root[]\n"
    result = guest.run("if then (")
    assert result.status != 0
    assert "syntax error" in result.output
    assert guest.check("echo on") == "on\n"


def test_a_command_that_fails(guest: Guest) -> None:
    with pytest.raises(CommandFailed) as raised:
        guest.check("echo before; ls /nowhere")
    error = raised.value
    assert error.message == "in the guest, 'echo before; ls /nowhere' ended with status 1"
    assert (error.status, error.output.splitlines()[0]) == (1, "before")
    assert error.console[-3:-1] == ("before", "ls: /nowhere: No such file or directory")
    assert error.console[-1] == "[status 1]"
    assert "QEMU: still running" in str(error)
    assert not guest.lost


def test_much_output(guest: Guest) -> None:
    started = time.monotonic()
    output = guest.check("seq 1 100000", timeout=60)
    took = time.monotonic() - started
    assert output == "".join(f"{number}\n" for number in range(1, 100_001))
    assert took < 20, f"{len(output)} bytes took {took:.1f} s"


def test_a_file(guest: Guest) -> None:
    data = os.urandom(100_000)
    guest.put("/tmp/a file", data)
    fetched = guest.check("base64 '/tmp/a file'", timeout=60)
    assert b64decode(fetched) == data
    guest.put("/tmp/a file", b"")
    assert guest.check("wc -c < '/tmp/a file'; rm '/tmp/a file'") == "0\n"


def test_python_knows_the_driver(guest: Guest) -> None:
    guest.put("/tmp/see.py", b"import sys, viommu.layouts, viommu.driver; print(sys.argv[1:])\n")
    assert guest.python("/tmp/see.py one 'two 3'") == "['one', 'two 3']\n"


def test_qmp(guest: Guest) -> None:
    status = guest.qmp("query-status")
    assert isinstance(status, dict)
    assert status["status"] == "running"
    assert guest.qmp("qom-get", path="/machine", property="memory-backend") == "/objects/ram"
    with pytest.raises(ExecuteError, match="no-such-command has not been found"):
        guest.qmp("no-such-command")
    assert guest.check("echo on") == "on\n"


def test_the_logs(guest: Guest) -> None:
    guest.check("echo from a command; echo '<4>from the kernel' > /dev/kmsg")
    assert guest.console_log().endswith(
        "$ echo from a command; echo '<4>from the kernel' > /dev/kmsg\nfrom a command\n"
    )
    assert "from the kernel" in guest.kernel_log()


def test_a_command_is_quick(guest: Guest) -> None:
    times = []
    for _ in range(11):
        started = time.monotonic()
        guest.run("true")
        times.append(time.monotonic() - started)
    assert sorted(times)[5] < 0.5


def test_a_panic(new_guest: NewGuest) -> None:
    guest = new_guest()
    guest.start()
    with pytest.raises(GuestPanic) as raised:
        guest.run("echo c > /proc/sysrq-trigger", timeout=20)
    error = raised.value
    assert error.reason == "Kernel panic - not syncing: sysrq triggered crash"
    assert str(error).startswith(f"the guest kernel panicked: {error.reason}\n")
    assert any("sysrq_handle_crash" in line for line in error.console)
    assert error.exit_code == 0, "a panic ends QEMU"
    assert error.command_line[0] in str(error)
    with pytest.raises(GuestPanic):
        guest.run("true")
    with pytest.raises(GuestPanic):
        guest.qmp("query-status")


@ON_ONE_MACHINE
def test_a_panic_while_nobody_listens(new_guest: NewGuest) -> None:
    guest = new_guest()
    guest.start()
    guest.check("(sleep 0.2; echo c > /proc/sysrq-trigger) >/dev/null 2>&1 &")
    time.sleep(2)
    with pytest.raises(GuestPanic, match="sysrq triggered crash"):
        guest.run("true")


@ON_ONE_MACHINE
def test_qemu_is_killed(new_guest: NewGuest) -> None:
    guest = new_guest()
    guest.start()
    threading.Timer(0.3, os.kill, [guest.pid, signal.SIGKILL]).start()
    started = time.monotonic()
    with pytest.raises(QemuExited) as raised:
        guest.run("echo begun; sleep 20")
    assert time.monotonic() - started < 15
    error = raised.value
    assert error.message == (
        "QEMU killed by SIGKILL (exit code -9) while running 'echo begun; sleep 20'"
    )
    assert error.exit_code == -signal.SIGKILL
    assert error.console[-1] == "begun"
    assert f"-append console={guest.machine.console}" in str(error).replace("'", "")


def test_the_guest_switches_itself_off(new_guest: NewGuest) -> None:
    guest = new_guest()
    guest.start()
    with pytest.raises(QemuExited, match="the guest switched itself off or rebooted") as raised:
        guest.run("poweroff -f")
    assert raised.value.exit_code == 0


@ON_ONE_MACHINE
def test_no_answer_in_time(new_guest: NewGuest) -> None:
    guest = new_guest()
    guest.start()
    started = time.monotonic()
    with pytest.raises(GuestTimeout) as raised:
        guest.run("echo begun; sleep 100", timeout=1)
    assert 1 <= time.monotonic() - started < 10
    error = raised.value
    assert error.message == "no answer within 1 s while running 'echo begun; sleep 100'"
    assert error.exit_code is None
    assert error.console[-1] == "begun"
    assert "QEMU: still running" in str(error)
    with pytest.raises(GuestTimeout):
        guest.run("true")


def test_a_kernel_that_does_not_boot(new_guest: NewGuest) -> None:
    guest = new_guest(command_line="rdinit=/none root=/dev/none")
    with pytest.raises(GuestPanic, match="VFS: Unable to mount root") as raised:
        guest.start()
    assert raised.value.exit_code == 0


@ON_ONE_MACHINE
def test_a_boot_that_takes_too_long(new_guest: NewGuest) -> None:
    guest = new_guest()
    with pytest.raises(GuestTimeout, match=r"no answer within 0.5 s while (booting|setting)"):
        guest.start(timeout=0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(guest.pid, 0)


def test_memory_that_is_not_shared(new_guest: NewGuest, machine: Machine) -> None:
    plain = f"memory-backend-ram,id=plain,size={machine.memory_mib}M"
    guest = new_guest(qemu_arguments=["-object", plain, "-machine", "memory-backend=plain"])
    with pytest.raises(MemoryNotShared, match="guest RAM is not shared, so no vfio-user device"):
        guest.start()


@ON_ONE_MACHINE
def test_an_interrupted_command(new_guest: NewGuest) -> None:
    guest = new_guest()
    guest.start()
    threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        guest.run("sleep 20")
    with pytest.raises(LabError, match="the guest was left alone with 'sleep 20'"):
        guest.run("true")


def test_a_guest_boots_in_time_and_leaves_nothing(new_guest: NewGuest) -> None:
    before = open_descriptors()
    guest = new_guest()
    guest.start()
    # The processor's time: what else the host has to do does not count.
    took = processor_seconds(guest.pid)
    guest.close()
    guest.close()
    assert took < 20, f"booting took {took:.1f} s"
    with pytest.raises(ProcessLookupError):
        os.kill(guest.pid, 0)
    assert open_descriptors() == before
    with pytest.raises(LabError, match="the guest was closed"):
        guest.run("true")


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_a_person_uses_the_console(guest: Guest) -> None:
    person, terminal = os.openpty()
    outcome: list[bool] = []
    thread = threading.Thread(target=lambda: outcome.append(guest.interact(terminal, terminal)))
    thread.start()
    read_until(person, b"# ")
    os.write(person, b"echo $((6*7)) $(tty)\r")
    read_until(person, f"42 /dev/{guest.machine.console}\r\n".encode())
    # Ctrl-C reaches the guest's command, and only that.
    os.write(person, b"sleep 100\r")
    read_until(person, b"sleep 100\r\n")
    time.sleep(0.5)
    os.write(person, b"\x03")
    read_until(person, b"# ")
    os.write(person, b"exit\r")
    thread.join(10)
    assert outcome == [True]
    assert guest.check("echo on") == "on\n"
    os.close(person)
    os.close(terminal)


def read_until(descriptor: int, end: bytes) -> bytes:
    data = b""
    while end not in data:
        ready, _, _ = select.select([descriptor], [], [], 20)
        assert ready, f"no {end!r} in {data!r}"
        data += os.read(descriptor, 1000)
    return data


@ON_ONE_MACHINE
def test_ones_own_kernel_image_and_files(
    new_guest: NewGuest, machine: Machine, assets: Assets, tmp_path: Path
) -> None:
    image = assets.guest_for(machine.arch)
    kernel = shutil.copy(image.kernel, tmp_path / "kernel")
    initramfs = shutil.copy(image.initramfs, tmp_path / "initramfs")
    modules = tmp_path / "6.99.0-own"
    modules.mkdir()
    (modules / "modules.dep").write_text("own.ko:\n")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "own.py").write_text("import viommu.layouts\nprint('own script')\n")
    guest = new_guest(
        kernel=kernel,
        initramfs=initramfs,
        modules=modules,
        scripts=scripts,
        extra_files={"/etc/own": b"own file\n"},
        command_line="own.word=1",
    )
    guest.start()
    assert str(kernel) in guest.command_line
    assert guest.check("cat /etc/own /lib/modules/6.99.0-own/modules.dep") == "own file\nown.ko:\n"
    assert "own.word=1" in guest.check("cat /proc/cmdline").split()
    assert guest.python("/viommu/inside/own.py") == "own script\n"


SCRIPT = """
    import sys
    from viommu.lab.assets import Assets
    from viommu.lab.config import load_machine
    from viommu.lab.guest import Guest
    from viommu.lab.rundir import RunDirectory
    with RunDirectory() as run, Guest(load_machine(sys.argv[1]), Assets.load()) as guest:
        print(guest.pid, run.path, flush=True)
        guest.run("sleep 100")
"""


@ON_ONE_MACHINE
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_after_a_blow(machine: Machine, tmp_path: Path, blow: signal.Signals) -> None:
    """Ctrl-C and `kill -9` of the process that runs a guest."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XDG_RUNTIME_DIR": str(tmp_path),
    }
    script = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), f"{machine.arch}-{machine.machine_type}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with script:
        assert script.stdout is not None
        assert script.stderr is not None
        pid, directory = script.stdout.readline().split()
        qemu = os.pidfd_open(int(pid))
        script.send_signal(blow)
        assert select.select([qemu], [], [], 10)[0], "QEMU is still there"
        os.close(qemu)
        script.wait(10)
        errors = script.stderr.read()
    # A killed process cannot tidy up: the next one does.
    if blow == signal.SIGKILL:
        assert Path(directory).is_dir()
        make = "from viommu.lab.rundir import RunDirectory; RunDirectory().close()"
        subprocess.run([sys.executable, "-c", make], check=True, env=environment)
    else:
        assert "KeyboardInterrupt" in errors
    assert not Path(directory).exists()
    assert [path.name for path in (tmp_path / "viommu").iterdir()] == ["lock"]
