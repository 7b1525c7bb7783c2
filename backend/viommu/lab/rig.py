"""A machine as a test wants it: its devices served, a guest booted with them."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from viommu.lab.assets import Assets
from viommu.lab.config import load_machine
from viommu.lab.guest import Guest
from viommu.lab.serving import Serving


class Rig:
    """The devices of a machine in a process of their own, and a guest that has them.

    `machine` is a name of `qemu-configs/` or the path of a TOML file; further arguments are those of `Guest`. It
    starts on entering the context, and `close()` leaves nothing behind.
    """

    def __init__(
        self,
        machine: str | Path,
        *,
        assets: Assets | None = None,
        trace: bool = False,
        seed: int = 0,
        **guest: Any,
    ) -> None:
        self.machine = load_machine(machine)
        self._open = ExitStack()
        try:
            self.serving = self._open.enter_context(Serving(machine, trace=trace, seed=seed))
            self.guest = Guest(
                self.machine, assets or Assets.load(), devices=self.serving.sockets, **guest
            )
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
        except BaseException:
            self._open.close()
            raise

    def close(self) -> None:
        """End the guest, then the server."""
        self._open.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
