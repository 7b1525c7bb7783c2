"""How a machine becomes a QEMU command line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from viommu.lab.config import Device, Machine
from viommu.lab.errors import SocketPathError
from viommu.lab.rundir import check_socket_length

OLDEST = "10.1"

_NO_VFIO_USER = "'vfio-user-pci' is not a valid device model name"


Properties = Mapping[str, object]
"""Of a `-device`, by name."""


@dataclass(frozen=True)
class Boot:
    """What to boot: paths of the kernel and the initial RAM disk, and words for the kernel."""

    kernel: Path
    initramfs: Path
    command_line: str = ""
    device_tree: Path | None = None


def memory_arguments(memory_mib: int) -> list[str]:
    """The arguments that put guest RAM where a vfio-user device can reach it."""
    backend = f"memory-backend-memfd,id=ram,size={memory_mib}M,share=on"
    return ["-m", f"{memory_mib}M", "-object", backend, "-machine", "memory-backend=ram"]


def device_arguments(
    device: Device, socket_path: Path, properties: Properties | None = None
) -> list[str]:
    """The arguments that plug a served device into its slot, or into a root port there."""
    function = {
        "driver": "vfio-user-pci",
        "id": device.name,
        "bus": "pcie.0",
        "addr": f"{device.slot:#x}",
        "socket": {"type": "unix", "path": str(socket_path)},
        **(properties or {}),
    }
    if device.bus is None:
        return ["-device", json.dumps(function)]
    port = f"{device.name}-port"
    root_port = f"pcie-root-port,id={port},bus=pcie.0,addr={device.slot:#x},chassis={device.slot}"
    return ["-device", root_port, "-device", json.dumps(function | {"bus": port, "addr": "0x0"})]


def machine_arguments(machine: Machine) -> list[str]:
    """The arguments that build the bare machine: no network, display or default devices."""
    return [
        *("-no-user-config", "-nodefaults", "-nic", "none", "-display", "none", "-no-reboot"),
        *("-machine", machine.machine, "-accel", machine.accelerator),
        *("-cpu", machine.cpu, "-smp", str(machine.cpus)),
        *memory_arguments(machine.memory_mib),
    ]


def boot_arguments(machine: Machine, boot: Boot) -> list[str]:
    """The arguments that boot a kernel with its console on the first serial port.

    An oops panics and a panic ends QEMU (with `-no-reboot`): a broken guest is never used on.
    """
    words = f"console={machine.console} printk.time=1 oops=panic panic=-1"
    command_line = " ".join(f"{words} {machine.command_line} {boot.command_line}".split())
    arguments = ["-kernel", str(boot.kernel), "-initrd", str(boot.initramfs)]
    if boot.device_tree is not None:
        arguments += ["-dtb", str(boot.device_tree)]
    return [*arguments, "-append", command_line]


def socket_arguments(*, monitor: int, console: int) -> list[str]:
    """The arguments for QMP and the console on inherited, connected sockets."""
    return [
        *("-chardev", f"socket,id=monitor,fd={monitor}", "-qmp", "chardev:monitor"),
        *("-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"),
    ]


def plug(
    machine: Machine,
    sockets: Mapping[str, Path],
    properties: Mapping[str, Properties] | None = None,
) -> list[str]:
    """The arguments for those of the machine's devices that are served, by name; so are `properties` of theirs.

    Raises `ConfigError` for a name that the machine does not have, `SocketPathError` for a
    socket that is not there.
    """
    arguments = []
    for name, path in sockets.items():
        device = machine.device(name)
        check_socket_length(path)
        if not path.is_socket():
            raise SocketPathError(f"nobody serves {name!r}: there is no socket {path}")
        arguments += device_arguments(device, path, (properties or {}).get(name))
    return arguments


def refusal_of_old(arch: str, version: str, output: str) -> str | None:
    """Tell from what QEMU printed when it refused to start whether it is too old.

    Returns the sentence that says so, or None.
    """
    if _NO_VFIO_USER not in output:
        return None
    return f"qemu-system-{arch} {version} has no vfio-user-pci: QEMU {OLDEST} or newer is needed"
