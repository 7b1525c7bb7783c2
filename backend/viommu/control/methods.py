"""The methods of a control socket: functions whose parameters are checked by their annotations."""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model
from pydantic_core import to_jsonable_python

from viommu.control.protocol import CallFailed, ErrorCode

_log = logging.getLogger(__name__)


class Checked:
    """A function or class that is called with plain values, checked by the annotations of its parameters."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        fields: dict[str, Any] = {
            parameter.name: (
                parameter.annotation,
                ... if parameter.default is parameter.empty else parameter.default,
            )
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
        }
        self.parameters = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)

    def arguments(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What to call it with. Raises `CallFailed` with the first thing that is wrong."""
        try:
            return dict(self.parameters.model_validate(dict(parameters)))
        except ValidationError as error:
            raise CallFailed(ErrorCode.INVALID_PARAMS, _sentence(self.name, error)) from None


class Methods:
    """A method is a function of annotated parameters. It is called in the event loop, so it must be quick.

        methods.add("stack.list", self.list)

    What it returns becomes JSON: plain values, dataclasses, pydantic models, enums. It raises `Refused` to say no.
    """

    def __init__(self) -> None:
        self._methods: dict[str, Checked] = {}
        self.add("methods", self.describe)

    def add(self, name: str, function: Callable[..., Any]) -> None:
        """Let `function` be called by `name`."""
        if name in self._methods:
            raise ValueError(f"there is a method {name!r} already")
        self._methods[name] = Checked(name, function)

    def check(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Raises `CallFailed` if a method cannot be called so."""
        self._prepare(name, parameters)

    def _prepare(self, name: str, parameters: Mapping[str, Any]) -> tuple[Checked, dict[str, Any]]:
        method = self._methods.get(name)
        if method is None:
            raise CallFailed(ErrorCode.METHOD_NOT_FOUND, f"there is no method {name!r}")
        return method, method.arguments(parameters)

    def call(self, name: str, parameters: Mapping[str, Any]) -> Any:
        """Call a method; returns its result as plain values. Raises `CallFailed`, and nothing else."""
        method, arguments = self._prepare(name, parameters)
        try:
            return to_jsonable_python(method.function(**arguments))
        except CallFailed:
            raise
        except Exception as error:
            _log.exception("the method %r failed", name)
            raise CallFailed(ErrorCode.INTERNAL_ERROR, f"{name} failed: {error!r}") from None

    def describe(self) -> list[dict[str, Any]]:
        """List the methods: their parameters, and what they do."""
        return [
            {
                "name": name,
                "parameters": [
                    _parameter(*item) for item in method.parameters.model_fields.items()
                ],
                "does": (inspect.getdoc(method.function) or "").partition("\n")[0],
            }
            for name, method in sorted(self._methods.items())
        ]


def _parameter(name: str, field: Any) -> str:
    """`name`, or `[name=default]` when it may be left out."""
    return name if field.is_required() else f"[{name}={field.default}]"


def _sentence(name: str, error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "missing":
            return f"{name}: {key} must be given"
        case "extra_forbidden":
            return f"{name}: there is no parameter {key!r}"
        case _:
            message = first["msg"]
            return f"{name}: {key}: {message[0].lower()}{message[1:]}"
