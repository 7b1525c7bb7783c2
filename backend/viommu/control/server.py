"""The server's end of a control socket, for a loop that polls `fileno()` and calls `serve()`."""

import json
import logging
import os
import select
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, ValidationError

from vfio_user import SocketError
from vfio_user.socket_path import claim
from viommu.control.methods import Methods
from viommu.control.protocol import LINE_LIMIT, CallFailed, ErrorCode
from viommu.control.subscribers import Subscribers
from viommu.trace import Tracer

_log = logging.getLogger(__name__)
_CLIENTS = 16
# What is read of one client in one turn: it bounds how long the others wait.
_CHUNK = 4096
_EVENTS = 64
# How many events are put on the way to one client in one turn.
_PEER = struct.Struct("3i")  # pid, uid, gid (unix(7), SO_PEERCRED)


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    jsonrpc: Literal["2.0"]
    method: StrictStr
    params: dict[StrictStr, Any] = {}
    id: StrictInt | StrictStr | None = None


class _Client:
    """A connection: what came in and is no whole line yet, and what goes out when the client takes it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received, self.answers = bytearray(), bytearray()
        self.ending = False
        self.called = False
        """It is told that there are events for it."""


class ControlSocket:
    """Serves `methods` on a socket at `path`, to processes of the same user alone.

    No client harms another, or the loop: each turn takes a bounded part of what it sends; one that does not take its
    answers is not read; one that sends no JSON-RPC, or a line that is too long, is told so and disconnected; and where
    there are too many, the one that has been silent longest goes. One that subscribed to events is sent them between
    its answers, and loses those that it does not take in time. Raises `vfio_user.SocketError` when the socket cannot
    be had.
    """

    def __init__(
        self,
        path: Path,
        methods: Methods,
        *,
        tracer: Tracer | None = None,
        user: int | None = None,
    ) -> None:
        """`tracer` has the events that a client can subscribe to.

        `user` is the user whose processes are served: the server's own, if not said.
        """
        self._methods, self._path = methods, path
        self._user = os.geteuid() if user is None else user
        self._clients: dict[int, _Client] = {}
        tracer = Tracer() if tracer is None else tracer  # one without readers is falsy
        self._subscribers = Subscribers[_Client](tracer, methods, self._call)
        address = claim(path)
        self._listener = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)  # never open to others, not for a moment
        try:
            self._listener.bind(address)
        except OSError as error:
            self._listener.close()
            reason = f"the control socket {path} cannot be made: {error.strerror}"
            raise SocketError(reason) from error
        finally:
            os.umask(mask)
        self._listener.listen()
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when there is something to serve."""
        return self._epoll.fileno()

    def serve(self) -> None:
        """Do what can be done without waiting."""
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._listener.fileno():
                self._accept()
            elif (client := self._clients.pop(descriptor, None)) is not None:
                self._clients[descriptor] = client  # the last to be heard of
                self._talk(client)

    def close(self) -> None:
        """Disconnect everyone and remove the socket. Idempotent."""
        if self._epoll.closed:
            return
        for client in list(self._clients.values()):
            self._drop(client)
        self._listener.close()
        self._epoll.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # gone again, or no descriptor left
            _log.warning("a client could not be accepted: %s", error.strerror)
            return
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        _, user, _ = _PEER.unpack(peer)
        if user != self._user:
            _log.warning("a client of user %d is refused", user)
            connection.close()
            return
        if len(self._clients) == _CLIENTS:
            self._drop(next(iter(self._clients.values())))
        connection.setblocking(False)
        self._clients[connection.fileno()] = _Client(connection)
        self._epoll.register(connection, select.EPOLLIN)

    def _call(self, client: _Client) -> None:
        """There are events for a client: it gets them as soon as it takes any."""
        if not client.called:
            client.called = True
            self._await(client)

    def _await(self, client: _Client) -> None:
        wanted = select.EPOLLOUT if client.answers or client.called else 0
        if not client.answers:
            wanted |= select.EPOLLIN
        self._epoll.modify(client.connection, wanted)

    def _talk(self, client: _Client) -> None:
        try:
            if not client.answers:
                with suppress(BlockingIOError):
                    self._hear(client)
                self._tell(client)
            if client.answers:
                del client.answers[: client.connection.send(client.answers)]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if client.ending and not client.answers:
            self._drop(client)
        else:
            self._await(client)

    def _tell(self, client: _Client) -> None:
        """Put some of the events that wait for a client on their way."""
        subscription = self._subscribers.of(client)
        for _ in range(_EVENTS):
            if not subscription or client.ending:
                break
            client.answers += json.dumps(subscription.take(), default=repr).encode() + b"\n"
        client.called = bool(subscription)

    def _hear(self, client: _Client) -> None:
        chunk = client.connection.recv(_CHUNK)
        client.ending = not chunk
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            client.received += line
            answer = self._answer(client)
            client.received.clear()
            if answer is not None:
                client.answers += json.dumps(answer).encode() + b"\n"
            if client.ending:
                return
        client.received += rest
        if len(client.received) > LINE_LIMIT:
            client.ending = True
            error = _error(ErrorCode.INVALID_REQUEST, f"a request of more than {LINE_LIMIT} bytes")
            client.answers += json.dumps({**error, "id": None}).encode() + b"\n"

    def _answer(self, client: _Client) -> dict[str, Any] | None:
        """The answer to the line in `received`; None if it wants none. What is no request ends the connection."""
        try:
            # Nesting without end is a RecursionError, and text that is no UTF-8 a ValueError.
            request = _Request.model_validate(json.loads(client.received))
        except ValidationError:
            client.ending = True
            message = "the line is not a JSON-RPC 2.0 request with its parameters by name"
            return {**_error(ErrorCode.INVALID_REQUEST, message), "id": None}
        except (ValueError, RecursionError):
            client.ending = True
            return {**_error(ErrorCode.PARSE_ERROR, "the line is not JSON"), "id": None}
        answer: dict[str, Any]
        self._subscribers.caller = client
        try:
            result = self._methods.call(request.method, request.params)
            answer = {"jsonrpc": "2.0", "result": result}
        except CallFailed as failed:
            answer = _error(failed.code, failed.message, failed.data)
        finally:
            self._subscribers.caller = None
        return {**answer, "id": request.id} if "id" in request.model_fields_set else None

    def _drop(self, client: _Client) -> None:
        del self._clients[client.connection.fileno()]
        self._subscribers.drop(client)
        with suppress(OSError):
            self._epoll.unregister(client.connection)
        client.connection.close()


def _error(code: int, message: str, data: Any = None) -> dict[str, Any]:
    error = {"code": code, "message": message} | ({} if data is None else {"data": data})
    return {"jsonrpc": "2.0", "error": error}
