"""The control socket: JSON-RPC 2.0 over a Unix socket, a message a line. `methods` is what can be called, `server`
serves it in the one event loop, `client` calls it. What a method does is defined where it belongs, not here.
"""

from viommu.control.client import ControlClient
from viommu.control.methods import Checked, Methods
from viommu.control.protocol import CallFailed, ControlError, ControlLost, ErrorCode, Refused
from viommu.control.server import ControlSocket

__all__ = [
    "CallFailed",
    "Checked",
    "ControlClient",
    "ControlError",
    "ControlLost",
    "ControlSocket",
    "ErrorCode",
    "Methods",
    "Refused",
]
