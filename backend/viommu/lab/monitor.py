"""QMP, without `await`: the few calls that a test makes, on qemu.qmp."""

import asyncio
import socket
from collections.abc import Mapping

from qemu.qmp import ExecInterruptedError, QMPClient, QMPError, StateError


class MonitorClosed(Exception):
    """QEMU closed its monitor."""


class MonitorTimeout(Exception):
    """QEMU did not answer in time."""


class Monitor:
    """A QMP session on a connected socket, which it owns.

    Not for use inside a running asyncio loop: it brings its own.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        """Negotiate with QEMU within `timeout` seconds.

        Raises `MonitorClosed` or `MonitorTimeout`.
        """
        self._runner = asyncio.Runner()
        self._client = QMPClient("lab")
        try:
            self._runner.run(self._connect(connection, timeout))
        except TimeoutError:
            self.close()
            raise MonitorTimeout from None
        except (QMPError, OSError) as error:
            self.close()
            raise MonitorClosed(str(error)) from error

    async def _connect(self, connection: socket.socket, timeout: float) -> None:
        await asyncio.wait_for(self._client.connect(connection), timeout)

    def execute(self, command: str, arguments: Mapping[str, object], timeout: float) -> object:
        """Run one command; raises `qemu.qmp.ExecuteError` when QEMU refuses it.

        Raises `MonitorClosed` and `MonitorTimeout` too.
        """
        try:
            return self._runner.run(self._execute(command, arguments, timeout))
        except TimeoutError:
            raise MonitorTimeout from None
        except (ExecInterruptedError, StateError, OSError) as error:
            raise MonitorClosed(str(error)) from error

    async def _execute(
        self, command: str, arguments: Mapping[str, object], timeout: float
    ) -> object:
        return await asyncio.wait_for(self._client.execute(command, dict(arguments)), timeout)

    def close(self) -> None:
        """End the session, also one that QEMU has already ended."""
        try:
            self._runner.run(self._client.disconnect())
        except (QMPError, OSError, EOFError):
            pass
        finally:
            self._runner.close()
