"""`viommu ctl`: calls a method of a running server, or follows its events; tables for people, JSON for programs."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from vfio_user.socket_path import is_live
from viommu.cli.shown import event_line, shown
from viommu.control import ControlClient, ControlError
from viommu.control.subscription import LOST
from viommu.lab.errors import LabError
from viommu.lab.rundir import run_base
from viommu.lab.serving import CONTROL_NAME

FOLLOW = "events"
"""The word that follows the events instead of calling a method."""


def call(console: Console, words: list[str], path: Path | None, *, as_json: bool) -> None:
    """Call the method of `words`, or list the methods when there is none, and print the result."""
    method, *pairs = words or ["methods"]
    parameters = dict(_parameter(pair) for pair in pairs)
    with ControlClient(path or find()) as client:
        result = client.call(method, **parameters)
    if as_json:
        _print(console, json.dumps(result))
    elif result is not None:
        console.print(shown(result), highlight=False)


def follow(
    console: Console, kinds: list[str], streams: list[str], path: Path | None, *, as_json: bool
) -> None:
    """Print events of these kinds and streams, or all, as they come: until Ctrl-C, or the server ends."""
    with ControlClient(path or find()) as client, suppress(KeyboardInterrupt):
        client.call("events.subscribe", kinds=kinds, streams=[_number(each) for each in streams])
        for name, told in client.notifications():
            if as_json:
                _print(console, json.dumps({"kind": "Lost", **told} if name == LOST else told))
            elif name == LOST:
                _print(console, f"              {told['count']} events came too fast, and are lost")
            else:
                _print(console, event_line(told))


def find() -> Path:
    """The control socket of the one server that runs in a directory of its own. Raises `LabError`."""
    found = sorted(path for path in run_base().glob(f"run-*/{CONTROL_NAME}") if is_live(path))
    if len(found) == 1:
        return found[0]
    if not found:
        raise LabError("no server is running: start `viommu serve`, or name its --control")
    raise LabError(f"several servers are running: choose --control {' or '.join(map(str, found))}")


def complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """What the next word can be, as the running server says: a method, its parameters, a kind of event."""
    words = context.params.get("words") or []
    with suppress(ControlError, LabError, OSError):
        with ControlClient(context.params.get("socket") or find(), timeout=1.0) as client:
            choices = list(_choices(client, words))
        return [each for each in choices if each[0].startswith(incomplete)]
    return []


def _choices(client: ControlClient, words: list[str]) -> Iterator[tuple[str, str]]:
    if words and words[0] == FOLLOW:
        for kind in client.call("events.kinds"):
            yield kind["kind"], kind["tells"]
        return
    methods = client.call("methods")
    if not words:
        yield FOLLOW, "Follow the events."
        for method in methods:
            yield method["name"], method["does"]
        return
    given = {word.partition("=")[0] for word in words[1:]}
    for method in methods:
        if method["name"] == words[0]:
            for parameter in method["parameters"]:
                name, equals, _ = parameter.strip("[]").partition("=")
                if name not in given:
                    yield f"{name}=", "may be left out" if equals else "must be given"


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _parameter(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals:
        raise LabError(f"{word!r} is no parameter: write key=value")
    return key, _value(text)


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise LabError(f"{text!r} is no StreamID: write a number, like 0x10") from None


def _value(text: str) -> Any:
    """A JSON value, a number in any base, or else the text itself."""
    try:
        return int(text, 0)
    except ValueError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text
