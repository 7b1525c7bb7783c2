"""The control socket: calls, mistakes, and clients that mean harm."""

import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server_rig import RAND48, Machine
from vfio_user import SocketBusy
from viommu.control import (
    CallFailed,
    ControlClient,
    ControlLost,
    ControlSocket,
    ErrorCode,
    Methods,
    Refused,
)
from viommu.control.protocol import LINE_LIMIT


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    colour: Colour


def point(x: int, colour: Colour = Colour.RED) -> Point:
    """A point.

    And more of it.
    """
    return Point(x, colour)


def refuse(why: str) -> None:
    raise Refused(why, status="STATUS_NO")


def fail() -> None:
    raise ZeroDivisionError("a bug")


class Service:
    """A control socket, served in this thread whenever somebody waits for an answer."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path, self.methods = path, Methods()
        for function in (point, refuse, fail):
            self.methods.add(function.__name__, function)
        self.methods.add("echo", self.echo)
        self.socket = ControlSocket(path, self.methods, **options)
        self._raw = ExitStack()

    @staticmethod
    def echo(text: str, times: int = 1) -> str:
        return text * times

    def connect(self) -> socket.socket:
        client = self._raw.enter_context(socket.socket(socket.AF_UNIX))
        client.setblocking(False)
        client.connect(os.fspath(self.path))
        self.turns(1)
        return client

    def turns(self, count: int = 40) -> None:
        for _ in range(count):
            self.socket.serve()

    def say(self, client: socket.socket, data: bytes) -> list[dict[str, Any]]:
        """Send, and return what was answered until nothing came any more."""
        answers = b""
        while data or not answers.endswith(b"\n"):
            try:
                if data:
                    data = data[client.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                data = b""
            self.turns()
            try:
                more = client.recv(1 << 20)
            except BlockingIOError:
                if not data:
                    break
                continue
            answers += more
            if not more:
                break
        return [json.loads(line) for line in answers.splitlines()]

    def works(self) -> bool:
        """Whether another client is served."""
        with closing(self.connect()) as client:
            return self.say(client, request("echo", text="on")) == [result("on")]

    def ended(self, client: socket.socket) -> bool:
        """Whether the server has closed the connection."""
        self.turns()
        try:
            while client.recv(1 << 20):
                self.turns()
        except BlockingIOError:
            return False
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self._raw.close()
        self.socket.close()


def request(method: str, number: Any = 1, **parameters: Any) -> bytes:
    message = {"jsonrpc": "2.0", "id": number, "method": method, "params": parameters}
    return json.dumps(message).encode() + b"\n"


def result(value: Any, number: Any = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "result": value, "id": number}


def code(answers: list[dict[str, Any]]) -> int:
    (answer,) = answers
    found: int = answer["error"]["code"]
    return found


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ct-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def service(directory: Path) -> Iterator[Service]:
    with closing(Service(directory / "control.sock")) as made:
        yield made


@pytest.fixture
def raw(service: Service) -> socket.socket:
    return service.connect()


# Calls


def test_a_call(service: Service, raw: socket.socket) -> None:
    answers = service.say(raw, request("point", 7, x=3) + request("echo", "b", text="a", times=2))
    assert answers == [result({"x": 3, "colour": "red"}, 7), result("aa", "b")]


def test_a_notification_has_no_answer(service: Service, raw: socket.socket) -> None:
    notification = b'{"jsonrpc": "2.0", "method": "echo", "params": {"text": "a"}}\n'
    assert service.say(raw, notification + request("echo", text="b")) == [result("b")]


def test_a_request_in_pieces(service: Service, raw: socket.socket) -> None:
    for byte in request("echo", text="é")[:-1]:
        assert not service.say(raw, bytes([byte]))
    assert service.say(raw, b"\n") == [result("é")]


def test_a_request_after_which_the_client_only_listens(
    service: Service, raw: socket.socket
) -> None:
    raw.send(request("echo", text="a", times=3 << 20))
    raw.shutdown(socket.SHUT_WR)
    service.turns()
    data = b""
    while not data.endswith(b"\n"):
        data += raw.recv(1 << 20)
        service.turns(1)
    assert json.loads(data)["result"] == "a" * (3 << 20)
    assert service.ended(raw)


@pytest.mark.parametrize(
    ("method", "parameters", "expected", "sentence"),
    [
        ("nope", {}, ErrorCode.METHOD_NOT_FOUND, "there is no method 'nope'"),
        ("point", {}, ErrorCode.INVALID_PARAMS, "point: x must be given"),
        ("point", {"x": 1, "y": 2}, ErrorCode.INVALID_PARAMS, "there is no parameter 'y'"),
        ("point", {"x": "z"}, ErrorCode.INVALID_PARAMS, "point: x: input should be a valid int"),
        ("point", {"x": 1, "colour": "blue"}, ErrorCode.INVALID_PARAMS, "should be 'red'"),
        ("refuse", {"why": "so"}, ErrorCode.REFUSED, "so"),
        ("fail", {}, ErrorCode.INTERNAL_ERROR, r"fail failed: ZeroDivisionError\('a bug'\)"),
    ],
)
def test_a_call_that_fails(
    service: Service, method: str, parameters: dict[str, Any], expected: int, sentence: str
) -> None:
    with pytest.raises(CallFailed, match=sentence) as raised:
        service.methods.call(method, parameters)
    assert raised.value.code == expected
    client = service.connect()
    assert code(service.say(client, request(method, **parameters))) == expected
    assert service.say(client, request("echo", text="a")) == [result("a")]


def test_the_methods_are_listed(service: Service) -> None:
    listed = {each["name"]: each for each in service.methods.describe()}
    own = [name for name in listed if not name.startswith("events.")]
    assert own == ["echo", "fail", "methods", "point", "refuse"]
    assert listed["point"]["parameters"] == ["x", "[colour=Colour.RED]"]
    assert listed["point"]["does"] == "A point."


def test_a_name_is_taken_once(service: Service) -> None:
    with pytest.raises(ValueError, match="there is a method 'echo' already"):
        service.methods.add("echo", fail)


def test_the_client(service: Service) -> None:
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            service.socket.serve()

    server = threading.Thread(target=serve)
    server.start()
    try:
        with ControlClient(service.path) as client:
            assert client.call("echo", text="a", times=100_000) == "a" * 100_000
            with pytest.raises(Refused, match="so") as refused:
                client.call("refuse", why="so")
            assert refused.value.data == {"status": "STATUS_NO"}
            with pytest.raises(CallFailed, match="no method 'nope'") as failed:
                client.call("nope")
            assert failed.value.code == ErrorCode.METHOD_NOT_FOUND
            assert client.call("echo", text="b") == "b"
            stop.set()
            server.join()
            service.socket.close()
            with pytest.raises(ControlLost):
                client.call("echo", text="c")
    finally:
        stop.set()
        server.join()
    with pytest.raises(ControlLost, match="nobody serves"):
        ControlClient(service.path)


def test_an_answer_that_does_not_come(service: Service) -> None:
    client = ControlClient(service.path, timeout=0.05)
    for _ in range(2):
        with pytest.raises(ControlLost, match="the control socket fails"):
            client.call("echo", text="a")
    client.close()


# Whose socket it is


def test_the_socket_is_its_users_alone(service: Service) -> None:
    assert stat.S_IMODE(service.path.stat().st_mode) == 0o600
    with pytest.raises(SocketBusy):
        ControlSocket(service.path, Methods())
    assert service.works()
    service.socket.close()
    service.socket.close()
    assert not service.path.exists()


def test_a_process_of_another_user_is_refused(directory: Path) -> None:
    with closing(Service(directory / "other.sock", user=os.geteuid() + 1)) as service:
        assert service.ended(service.connect())


# Clients that mean harm


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"", ErrorCode.PARSE_ERROR),
        (b"GET / HTTP/1.1", ErrorCode.PARSE_ERROR),
        (b"\xff\xfe\x00", ErrorCode.PARSE_ERROR),
        (b"[" * 60_000, ErrorCode.PARSE_ERROR),
        (b"1" * 60_000, ErrorCode.PARSE_ERROR),
        (b"[]", ErrorCode.INVALID_REQUEST),
        (b"{}", ErrorCode.INVALID_REQUEST),
        (b'{"jsonrpc": "1.0", "id": 1, "method": "echo"}', ErrorCode.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": [], "method": "echo"}', ErrorCode.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": NaN, "method": "echo"}', ErrorCode.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "method": 5}', ErrorCode.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "echo", "params": [1]}', -32600),
    ],
)
def test_what_is_no_request_is_told_so_and_ends(
    service: Service, raw: socket.socket, line: bytes, expected: int
) -> None:
    answers = service.say(raw, line + b"\n" + request("echo", text="never"))
    assert code(answers) == expected
    assert answers[0]["id"] is None
    assert service.ended(raw)
    assert service.works()


def test_a_line_without_end(service: Service, raw: socket.socket) -> None:
    assert code(service.say(raw, b" " * (LINE_LIMIT + 8192))) == ErrorCode.INVALID_REQUEST
    assert service.ended(raw)
    assert service.works()


def test_a_client_that_takes_no_answers_is_not_read(service: Service, raw: socket.socket) -> None:
    sent = 0
    wanted = request("echo", text="x" * 1000, times=100)
    for _ in range(2000):
        try:
            sent += raw.send(wanted)
        except BlockingIOError:
            service.turns(1)
    assert sent < 1 << 20, "what it sends waits in the socket"
    assert service.works()
    assert not service.ended(raw), "once it takes its answers it is served again"
    assert service.say(raw, b"\n")


def test_a_client_that_goes_while_it_is_answered(service: Service, raw: socket.socket) -> None:
    raw.send(request("echo", text="x", times=8 << 20))
    service.turns(2)
    raw.close()
    service.turns()
    assert service.works()


def test_too_many_clients(service: Service) -> None:
    clients = [service.connect() for _ in range(16)]
    assert service.say(clients[0], request("echo", text="a")) == [result("a")]
    more = service.connect()
    assert service.ended(clients[1]), "the one that has been silent longest"
    for client in (clients[0], *clients[2:], more):
        assert service.say(client, request("echo", text="a")) == [result("a")]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.just(request("echo", text="a")), max_size=6))
def test_any_bytes(parts: list[bytes]) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="ct-", dir="/tmp") as path,
        closing(Service(Path(path) / "c.sock")) as service,
    ):
        client = service.connect()
        for part in parts:
            service.say(client, part)
        assert service.works()


# In the server's loop


def test_calls_and_dma_share_the_loop(directory: Path) -> None:
    with Machine(directory, control=directory / "control.sock") as machine:
        engine = machine.connect("engine0", bus_master=True)
        machine.server.methods.add("echo", Service.echo)
        client = socket.socket(socket.AF_UNIX)
        with client:
            client.connect(os.fspath(directory / "control.sock"))
            client.setblocking(False)
            client.send(b" " * 2000)  # a slow one
            with socket.socket(socket.AF_UNIX) as other:
                other.connect(os.fspath(directory / "control.sock"))
                engine.fill(1 << 20, rate=64)
                engine.start(command=RAND48)
                other.send(request("echo", text="on"))
                steps = machine.run()
                assert steps > 256
                assert json.loads(other.recv(4096)) == result("on")
    assert not list(directory.iterdir())
