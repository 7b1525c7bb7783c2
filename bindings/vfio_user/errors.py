"""What can go wrong, from one root.

VfioUserError
├── LibraryNotFound     no libvfio-user on this machine
├── LibraryError        a call into libvfio-user failed; has the function and the errno
├── SocketError         the socket path cannot be used
│   └── SocketBusy      … because another server lives there
├── DeviceError         a device was declared or used wrongly
└── ClientLost          the client has closed its connection
"""

import os


class VfioUserError(Exception):
    """Root of all errors that this package raises."""


class LibraryNotFound(VfioUserError):
    """No usable libvfio-user was found; the message says where was looked and what to do."""


class LibraryError(VfioUserError):
    """A function of libvfio-user failed."""

    def __init__(self, function: str, errno: int) -> None:
        super().__init__(
            f"{function}: {os.strerror(errno) if errno else 'failed without an errno'}"
        )
        self.function = function
        self.errno = errno


class SocketError(VfioUserError):
    """The socket path cannot be used: too long, no such directory, not a socket, no permission."""


class SocketBusy(SocketError):
    """Another live server listens on the socket path."""


class DeviceError(VfioUserError):
    """The device was declared or used wrongly: a bad BAR, no room for a capability, closed."""


class ClientLost(VfioUserError):
    """The client closed its connection. `PciDevice.attach` waits for the next one."""
