"""A machine as a test wants it: its devices served, a guest booted with them."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from viommu.closing import Closing
from viommu.lab.assets import Assets
from viommu.lab.config import load_machine
from viommu.lab.guest import Guest
from viommu.lab.linux_smmu import COMMAND_LINE, LinuxSmmu
from viommu.lab.serving import Serving
from viommu.lab.unload import unload


class Rig(Closing):
    """The devices of a machine in a process of their own, and a guest that has them.

    `machine` is a name of `qemu-configs/` or the path of a TOML file. With `linux_driver` the guest's own `arm-smmu-v3`
    drives the SMMU; without, nobody does until a script in the guest comes. `smmu` are lines for the machine's `[smmu]`
    table. Further arguments are those of `Guest`. It
    starts on entering the context, and `close()` leaves nothing behind.
    """

    def __init__(
        self,
        machine: str | Path,
        *,
        assets: Assets | None = None,
        trace: bool = False,
        ledger: bool = False,
        smmu: str = "",
        seed: int = 0,
        faults: Path | None = None,
        linux_driver: bool = False,
        **guest: Any,
    ) -> None:
        self.machine = load_machine(machine, smmu)
        self.smmu: LinuxSmmu | None = None
        """With `linux_driver`, the SMMU that the guest's kernel drives."""
        assets = assets or Assets.load()
        self._open = ExitStack()
        try:
            self.serving = self._open.enter_context(
                Serving(machine, trace=trace, ledger=ledger, smmu=smmu, seed=seed, faults=faults)
            )
            if linux_driver:
                self.smmu = LinuxSmmu.of(self.machine, assets.qemu_for(self.machine.arch))
                tree = self.serving.directory / "machine.dtb"
                tree.write_bytes(self.smmu.tree.blob)
                words = f"{COMMAND_LINE} {guest.get('command_line', '')}"
                guest |= {"device_tree": tree, "command_line": words}
            self.guest = Guest(self.machine, assets, devices=self.serving.sockets, **guest)
        except BaseException:
            self._open.close()
            raise

    @property
    def lost(self) -> bool:
        """Whether the guest or the server can no longer be used."""
        return self.guest.lost or self.serving.exit_code is not None

    def start(self) -> None:
        """Boot the guest. One that does not come up takes the server with it."""
        try:
            self._open.enter_context(self.guest)
            if self.smmu is not None:
                self.smmu.bind(self.guest)
        except BaseException:
            self._open.close()
            raise

    def reboot(self, *, hard: bool = False) -> None:
        """Let the guest reboot, while QEMU and the server stay; with `hard` as by the reset button."""
        self.guest.reboot(hard=hard)
        if self.smmu is not None:
            self.smmu.bind(self.guest)

    def unload(self, driver: str, timeout: float = 30.0) -> None:
        """Unload the driver of functions: they leave the guest, and their sockets close. See `viommu.lab.unload`."""
        unload(self.serving.control, self.guest, driver, timeout)

    def close(self) -> None:
        """End the guest, then the server."""
        self._open.close()

    def __enter__(self) -> Self:
        self.start()
        return self
